"""Run by test_fetch.py as a rank: loads models of a hub, and says what came of it.

Its argument is a list of tasks, in JSON: `repo`, and in `then` names of functions of this file to
call after generating. The hub is at HF_ENDPOINT, and the cache in HF_HOME, each with "RANK" in it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
import urllib.request
from pathlib import Path

import ranks

for name in ("HF_HOME", "HF_ENDPOINT"):
    os.environ[name] = os.environ[name].replace("RANK", str(ranks.rank()))
if "huggingface_hub" in sys.modules:  # in a warm Python, and has read them
    importlib.reload(sys.modules["huggingface_hub.constants"])

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

import mlx_lm_skiphead  # noqa: E402

loops = importlib.import_module("mlx_lm.generate")
utils = importlib.import_module("mlx_lm.utils")

PROMPT = [3, 141, 59, 26, 53, 58, 97]
said: list[str] = []


class Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


def generate(model):
    tokens = [token for token, _ in loops.generate_step(mx.array(PROMPT), model, max_tokens=8)]
    mx.synchronize(loops.generation_stream)
    return tokens


def direct(model, group):
    """A direct call's last numbers, and what it said in the log."""
    said.clear()
    out = model(mx.array([PROMPT]))
    return {"numbers": out[0, -1, :8].tolist(), "width": out.shape[-1], "said": list(said)}


def recast(model, group):
    """A direct call in another type, which what is read for it gets too."""
    model.set_dtype(mx.float16)
    told = [generate(model)]
    if "ALL_FILES" in os.environ:  # they come only now
        shutil.copytree(os.environ["ALL_FILES"], repo(group), dirs_exist_ok=True)
    return [*told, direct(model, group)["numbers"], str(model.model.norm.weight.dtype)]


def quantized(model, group):
    """A worker's head made from weights that are not here must not be used."""
    if isinstance(model.lm_head, nn.Linear):  # rank 0's is quantized in its file
        model.lm_head = model.lm_head.to_quantized(group_size=32)
    return [generate(model), errors(model, group)]


def inner(model, group):
    """A direct call of the pipelined model."""
    said.clear()
    return {"numbers": model.model(mx.array([PROMPT]))[0, -1, :8].tolist(), "said": list(said)}


def hub(word):
    with urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/{word}") as answer:
        return json.loads(answer.read() or "null")


def asked(model=None, group=None):
    """The files of weights that this rank has asked the hub for."""
    return hub("asked")


def refused(model, group):
    """The errors of two direct calls on a worker while the hub is gone."""
    hub("gone")
    told = errors(model, group)
    hub("back")
    return told


def errors(model, group):
    told = []
    while group.rank() and len(told) < 2:
        try:
            model(mx.array([PROMPT]))
        except RuntimeError as error:
            told.append(str(error))
    return told


def modelscope_gone(model, group):
    """The errors of rank 1, which fetches in vain."""
    gone = Path(os.environ["GONE"])
    gone.touch()
    told = errors(model, group) if group.rank() == 1 else []
    mx.eval(mx.distributed.all_sum(mx.array(1), stream=mx.cpu))
    gone.unlink(missing_ok=True)
    mx.eval(mx.distributed.all_sum(mx.array(1), stream=mx.cpu))
    return told


def uninstall_refused(model, group):
    try:
        mlx_lm_skiphead.uninstall()
    except RuntimeError as error:
        return str(error)
    return ""


def uninstalled(model, group):
    mlx_lm_skiphead.uninstall()
    return {"tokens": generate(model), "left": left()}


def left(model=None, group=None):
    return [list(status.not_here) for status in mlx_lm_skiphead.status().models][-1:]


def text(model, group):
    return str(mlx_lm_skiphead.status().models[-1])


def repo(group):
    return os.environ["FOLDER"].replace("RANK", str(group.rank()))


def main(tasks):
    logging.getLogger("mlx_lm_skiphead").addHandler(Said())
    group = ranks.join()
    told = []
    for task in tasks:
        repo = task["repo"].replace("RANK", str(group.rank()))
        try:
            model, _ = utils.sharded_load(repo, pipeline_group=group)
        except Exception as error:
            ranks.report(f"{type(error).__module__}: {error}")
            raise
        results = {"tokens": generate(model), "left": left(), "asked": asked()}
        results["then"] = [globals()[what](model, group) for what in task.get("then", ())]
        told.append(results)
        del model
    ranks.report(told)


main(json.loads(sys.argv[1]))
