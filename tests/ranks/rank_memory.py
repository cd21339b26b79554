"""Run by test_memory.py as a rank: what a model takes in memory, and what it has left on disk.

Its argument is a dict of tasks, in JSON. A task has the `folder` of a checkpoint, or of one for
each rank; `then` names one of `afterwards`.
"""

from __future__ import annotations

import copy
import gc
import importlib
import json
import os
import sys
import threading
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import ranks
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

import mlx_lm_skiphead
from mlx_lm_skiphead.families import family_of

# Not by name: it is imported before the plugin.
loops = importlib.import_module("mlx_lm.generate")
utils = importlib.import_module("mlx_lm.utils")

afterwards = ranks.ByName()
"""What a task may do when the model has generated."""
PROMPT = [3, 141, 59, 26, 53, 58, 97]


def generate(model):
    mx.random.seed(7)
    tokens = [token for token, _ in loops.generate_step(mx.array(PROMPT), model, max_tokens=8)]
    # Upstream leaves a step in flight, which would mix with what a direct call receives.
    mx.synchronize(loops.generation_stream)
    return tokens


def direct(model):
    """The first numbers of a direct call's logits."""
    logits = model(mx.array([PROMPT]))
    return logits[0, -1, :8].tolist()


@afterwards
def grown(model, rank):
    """A direct call, and how many bytes of memory are in use after it that were not before."""
    mx.synchronize()
    before = mx.get_active_memory()
    numbers = direct(model)
    mx.synchronize()
    return {"numbers": numbers, "bytes": mx.get_active_memory() - before, "again": direct(model)}


@afterwards
def in_thread(model, rank):
    """As `grown`, in a thread that has not loaded the model."""
    told = []
    thread = threading.Thread(target=lambda: told.append(grown(model, rank)))
    thread.start()
    thread.join()
    return told[0]


@afterwards
def uninstalled(model, rank):
    mlx_lm_skiphead.uninstall()
    return {"tokens": generate(model), "numbers": direct(model), "left": left_on_disk()}


def left_on_disk():
    """What `status` says of the models that are alive; there should be one."""
    gc.collect()
    return [model._asdict() for model in mlx_lm_skiphead.status().models]


@afterwards
def used_otherwise(model, rank):
    """What a program may do with a model besides calling it."""
    family = family_of(model)
    owner = family.owner_of(model)
    head, embedding = family.head_of(owner), getattr(family.stage_of(owner), family.embedding)
    model.eval()
    copied = copy.deepcopy(model)
    arrays = [array for _, array in tree_flatten(model.parameters())]
    told = {
        "bytes": sum(array.nbytes for array in arrays),
        "copy": sum(a.nbytes for _, a in tree_flatten(copied.parameters())),
        "modules": [isinstance(module, nn.Module) for module in (head, embedding)],
        "weights": [[m["weight"].shape, str(m["weight"].dtype)] for m in (head, embedding)],
        "layers": len(model.layers),
        "repr": len(repr(model)) > 100,
    }
    told["left"] = left_on_disk()
    file = Path(os.environ["RANK_RESULTS"], f"saved-{rank}.safetensors")
    model.save_weights(str(file))
    saved = mx.load(str(file))
    told["saved"] = {key: [a.shape, a.sum().item()] for key, a in saved.items()}
    told["left after saving"] = left_on_disk()
    told["compiled"] = mx.compile(model)(mx.array([PROMPT]))[0, -1, :8].tolist()
    told["copied"] = direct(copied)
    return told


@afterwards
def refused(model, rank):
    """The errors of two direct calls on a worker."""
    return [error_of(lambda: model(mx.array([PROMPT]))) for _ in range(2 * bool(rank))]


@afterwards
def refused_on_all_ranks(model, rank):
    """The errors of two direct calls, and of what else needs weights that are not there."""
    owner = family_of(model).owner_of(model)
    module = owner.lm_head if rank else owner.model.embed_tokens
    hidden = mx.zeros((1, 1, 256))
    others = {
        "weight": lambda: module.weight,
        "parameters": model.parameters,
        "save": lambda: model.save_weights(os.devnull),
        "cast": lambda: model.set_dtype(mx.float16),
        "quantize": lambda: nn.quantize(model, group_size=32),
        "call": lambda: module(hidden) if rank else module.as_linear(hidden),
        "adapter": lambda: LoRALinear.from_base(module),
    }
    calls = [error_of(lambda: model(mx.array([PROMPT]))) for _ in range(2)]
    model.eval()
    return calls, {name: error_of(function) for name, function in others.items()}


def error_of(function):
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return "none"


def run(task):
    group = ranks.join()
    rank = group.rank()
    gc.collect()
    mx.clear_cache()  # a buffer from it may be larger than what it is used for
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    folder = Path(task["folder"])
    if task.get("a folder each"):
        folder /= str(rank)
    if task.get("own pipeline"):
        model, _ = utils.load_model(folder, lazy=True)
        model.model.pipeline(group)
        mx.eval(model.parameters())
    else:
        model, _ = utils.sharded_load(str(folder), pipeline_group=group)
    gc.collect()
    told = {"loaded": mx.get_active_memory() - before, "left": left_on_disk()}
    told["peak of loading"] = mx.get_peak_memory() - before
    mx.reset_peak_memory()
    told["tokens"] = generate(model)
    told["peak"] = mx.get_peak_memory() - before
    told["left after"] = left_on_disk()
    if file := task.get("spoilt"):
        os.truncate(folder / file, 100)
    if what := task.get("then"):
        told[what] = afterwards[what](model, rank)
    return told


def main(tasks):
    ranks.report({name: run(task) for name, task in tasks.items()})
    os._exit(0)  # MLX may abort at the exit of a process in which a thread has computed


main(json.loads(sys.argv[1]))
