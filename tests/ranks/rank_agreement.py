"""Run by test_agreement.py as a rank: loads a model where ranks disagree.

Its arguments are the folder of a checkpoint and how this goes: "each" tries every disagreement in
turn and reports the errors, "alike" generates, anything else is the number of the rank that
differs, a "+" and what `MLX_LM_SKIPHEAD` is there, a "/" and what it is elsewhere; then it
generates, or does with `mlx-lm-skiphead run` what further arguments say.
"""

from __future__ import annotations

import json
import os
import sys
import types

import ranks

rank = ranks.rank()
folder, how, *program = sys.argv[1:]
if "+" in how:
    odd, _, values = how.partition("+")
    os.environ["MLX_LM_SKIPHEAD"] = values.split("/")[rank != int(odd)]

import mlx.core as mx  # noqa: E402
from mlx_lm import stream_generate, utils  # noqa: E402
from mlx_lm.utils import sharded_load  # noqa: E402

import mlx_lm_skiphead  # noqa: E402
from mlx_lm_skiphead.patching import registry  # noqa: E402
from mlx_lm_skiphead.ranks import agreement  # noqa: E402

if program:
    from mlx_lm_skiphead.cli import main

    sys.exit(main(["run", *program]))

group = ranks.join()


def load(folder=folder, loader=sharded_load):
    """The error, if there is one."""
    try:
        loader(folder, pipeline_group=group)
    except (mlx_lm_skiphead.SkipheadError, FileNotFoundError) as error:
        return str(error)
    return None


def fail():
    """Where a load fails, it has to be looked up in mlx-lm when it is called."""
    return load("/", utils.sharded_load)


def busy():
    """This rank loads nothing, and waits for the others in a sum of its own."""
    mx.eval(mx.distributed.all_sum(0))


def changed(module, name, value):
    """Load while something of the plugin is otherwise."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        return load()
    finally:
        setattr(module, name, before)


def off():
    mlx_lm_skiphead.uninstall()
    return load()


def hidden():
    mlx_lm_skiphead.install("hidden")
    return load()


def refused():
    """As if a family did not fit here."""
    registry.outcomes["mistral4"] = registry.Outcome(registry.Target("refused", "for a test"))
    try:
        return load()
    finally:
        del registry.outcomes["mistral4"]


def other_mlx_lm():
    version = agreement.metadata.version
    try:
        agreement.metadata.version = lambda name: "0.0.1"
        return load()
    finally:
        agreement.metadata.version = version


GARBLED = types.SimpleNamespace(dumps=lambda _: "{ this", loads=json.loads)
DIFFERENCES = {
    "nothing": load,
    "off": off,
    "hidden": hidden,
    "plugin": lambda: changed(mlx_lm_skiphead, "__version__", "9.9"),
    "protocol": lambda: changed(agreement, "MARK", 4195),
    "mlx-lm": other_mlx_lm,
    "table": lambda: changed(agreement, "FAMILIES", ()),
    "refused": refused,
    "fails": fail,
    "busy": busy,
    "garbage": lambda: changed(agreement, "json", GARBLED),
}

if how == "each":
    told = {}
    for name, differ in DIFFERENCES.items():
        for odd in range(group.size()):
            mlx_lm_skiphead.install()
            told[f"{name} {odd}"] = differ() if rank == odd else load()
    mlx_lm_skiphead.install()
    for odd in range(group.size()):  # and on for one rank only
        if rank != odd:
            mlx_lm_skiphead.uninstall()
        told[f"on {odd}"] = load()
        mlx_lm_skiphead.install()
    told["all fail"] = fail()
    told["right"] = load()
    ranks.report(told)
else:
    model, tokenizer = sharded_load(folder, pipeline_group=group)
    text = "".join(r.text for r in stream_generate(model, tokenizer, "Hello", max_tokens=5))
    ranks.report(text)
