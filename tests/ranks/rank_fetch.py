"""Run by test_fetch.py as a rank: loads models of a hub, and says what came of it.

Its argument is a list of tasks, in JSON: `repo`, and in `then` names of `afterwards`. The hub is at
HF_ENDPOINT, and the cache in HF_HOME, each with "RANK" in it.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import ranks

for name in ("HF_HOME", "HF_ENDPOINT"):
    os.environ[name] = os.environ[name].replace("RANK", str(ranks.rank()))
if "huggingface_hub" in sys.modules:  # in a warm Python, and has read them
    importlib.reload(sys.modules["huggingface_hub.constants"])

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

import mlx_lm_skiphead  # noqa: E402

loops = importlib.import_module("mlx_lm.generate")
utils = importlib.import_module("mlx_lm.utils")

GROUP = ranks.join()  # before the hub's client has connections of its own
afterwards = ranks.ByName()
"""What a task may do when the model has generated."""
PROMPT = [3, 141, 59, 26, 53, 58, 97]


def load(repo):
    return utils.sharded_load(repo, pipeline_group=GROUP)[0]


def generate(model):
    tokens = [token for token, _ in loops.generate_step(mx.array(PROMPT), model, max_tokens=8)]
    mx.synchronize(loops.generation_stream)
    return tokens


def numbers(out):
    return [*out[0, -1, :8].tolist(), out.shape[-1]]


def error_of(function, *args, **kwargs):
    """What `function` raises of the plugin's, or None."""
    try:
        function(*args, **kwargs)
    except mlx_lm_skiphead.SkipheadError as error:
        return str(error)
    return None


@afterwards
def direct(model, repo):
    """A direct call's last numbers, or its error."""
    try:
        return numbers(model(mx.array([PROMPT])))
    except mlx_lm_skiphead.SkipheadError as error:
        return str(error)


@afterwards
def inner(model, repo):
    """The last numbers of a direct call of the pipelined model, or its error."""
    try:
        told = numbers(model.model(mx.array([PROMPT])))
    except mlx_lm_skiphead.SkipheadError as error:
        told = str(error)
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
    return told


@afterwards
def read(model, repo):
    """By kind of reading weights, the error."""
    absent = [m for m in model.modules() if type(m).__name__ == "Absent"]
    if not absent:
        return {"absent": 0, "errors": {}}
    folder = Path(tempfile.mkdtemp())
    told = {
        "parameters": error_of(model.parameters),
        "trainable": error_of(model.trainable_parameters),
        "save_weights": error_of(model.save_weights, str(folder / "all.safetensors")),
        "save_model": error_of(utils.save_model, folder, model),
        "cast": error_of(model.set_dtype, mx.float16),
        "quantize": error_of(nn.quantize, model, 32, 4, class_predicate=lambda _, m: m in absent),
        "a copy": error_of(copy.deepcopy(model).parameters),
    }
    for module in absent:
        told |= {
            f"weight of {module.name}": error_of(getattr, module, "weight"),
            f"call of {module.name}": error_of(module, mx.zeros((1, 2, 64))),
            f"{module.name} as the head": error_of(module.as_linear, mx.zeros((1, 2, 64))),
        }
    assert not list(folder.glob("*.safetensors"))
    return {"absent": len(absent), "errors": told}


@afterwards
def same_as_before(model, repo):
    """Nothing that `read` tried has changed the model."""
    return generate(model)


@afterwards
def bring(model, repo):
    """Run the commands of this rank's errors, load again, and call directly."""
    missing = [m.missing for m in model.modules() if type(m).__name__ == "Absent"]
    for command in {re.search("`(hf download .*)`", line)[1] for line in missing}:
        own = Path(sys.prefix, "bin", "hf")
        subprocess.run([own, *command.split()[1:]], check=True, stdout=subprocess.DEVNULL)
    model = load(repo)
    return [direct(model, repo), left(), len(tree_flatten(model.parameters())) > 0]


@afterwards
def fetch_all(model, repo):
    """Ask for all files, load again, and call directly."""
    del os.environ["MLX_LM_SKIPHEAD_DOWNLOAD"]
    mlx_lm_skiphead.install()
    model = load(repo)
    told = [direct(model, repo), left()]
    os.environ["MLX_LM_SKIPHEAD_DOWNLOAD"] = "needed"
    mlx_lm_skiphead.install()
    return told


@afterwards
def asked(model=None, repo=None):
    """The files of weights that this rank has asked the hub for."""
    with urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/asked") as answer:
        return json.loads(answer.read())


@afterwards
def left(model=None, repo=None):
    """What `status` says of modules that are not on this machine."""
    return list(mlx_lm_skiphead.status().models[-1].not_here)


def main(tasks):
    told = []
    for task in tasks:
        repo = task["repo"].replace("RANK", str(GROUP.rank()))
        try:
            model = load(repo)
        except Exception as error:
            ranks.report(f"{type(error).__module__}: {error}")
            raise
        results = {"tokens": generate(model), "asked": asked()}
        if mlx_lm_skiphead.status().mode != "off":
            results["left"] = left()
        results["then"] = {what: afterwards[what](model, repo) for what in task.get("then", ())}
        told.append(results)
        del model
    ranks.report(told)


main(json.loads(sys.argv[1]))
