"""The models that programs use, in memory or loaded from checkpoints of their own."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import mlx.core as mx
import ranks
import tiny_checkpoint
import tiny_models
from mlx_lm.utils import load_model, sharded_load

GROUP = ranks.join()
RANK, SIZE = GROUP.rank(), GROUP.size()
FILES = Path(os.environ["RANK_RESULTS"])
"""A folder that the ranks share."""


def pipelined(case, **changes):
    model = tiny_models.make(case, **changes)
    model.model.pipeline(GROUP)
    return model


def noisy(case, **changes):
    """A draft model for that of `case`: the same, but for some noise. Now and then it is right."""
    model = tiny_models.make(case, **changes)
    head = model.lm_head
    head.weight += 0.03 * mx.random.normal(head.weight.shape, key=mx.random.key(4))
    mx.eval(model.parameters())
    return model


MODEL = pipelined("qwen2-untied", num_hidden_layers=3)
DRAFT = noisy("qwen2-untied", num_hidden_layers=3)


@functools.cache
def second():
    """Another pipelined model."""
    return pipelined("deepseek_v3", num_hidden_layers=3)


@functools.cache
def whole():
    """A model that is whole on each rank."""
    return tiny_models.make("qwen2-tied", num_hidden_layers=2)


@functools.cache
def sharded():
    """A tensor-parallel model, with heads enough for two ranks and for three."""
    wide = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 96}
    model = tiny_models.make("qwen2-untied", num_hidden_layers=2, intermediate_size=192, **wide)
    model.shard(GROUP)
    return model


@functools.cache
def draft_of_loaded(kind):
    """For `loaded`: a "noisy" model, or one that is "wrong", of another family and hardly ever
    right."""
    if kind == "wrong":
        return tiny_models.make("glm4_moe", num_hidden_layers=2)
    return noisy("qwen2-untied")


@functools.cache
def checkpoint(case):
    """The folder of a checkpoint that all ranks load, which rank 0 has written."""
    folder = FILES / case
    if RANK == 0:
        folder.mkdir()
        tiny_checkpoint.write(case, folder)
    mx.eval(mx.distributed.all_sum(mx.zeros((1,))))
    mx.random.seed(7)  # making a model has drawn numbers, on rank 0 alone
    return folder


def load(case="qwen2-untied"):
    """A model fresh from its checkpoint."""
    return sharded_load(str(checkpoint(case)), pipeline_group=GROUP)[0]


@functools.cache
def loaded():
    """A model from a checkpoint, for programs that leave its weights as they are."""
    return load()


def own_pipeline(folder):
    """A model whose pipeline the program sets up itself."""
    model, _ = load_model(folder, lazy=True)
    model.model.pipeline(GROUP)
    mx.eval(model.parameters())
    return model
