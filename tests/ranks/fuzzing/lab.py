"""What a rank keeps from one program to the next."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import ranks
import tiny_checkpoint
import tiny_models
from mlx_lm.utils import load_model, load_tokenizer, sharded_load
from pieces import exchange

from fuzzing import CHANGING

WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
"""Attention heads wide enough for quantized caches."""


def tokens_of(prompt):
    start, length = prompt
    return [(start + 37 * i + 11 * (i // 5)) % 256 for i in range(length)]


def checksum(array):
    """Shape and bits of an array of MLX; other values are themselves."""

    if not isinstance(array, mx.array):
        return array
    bits = np.array(array.reshape(-1).view(mx.uint8)) if array.size else b""
    return [*array.shape, str(array.dtype), zlib.crc32(bits)]


class Lab:
    """What a rank keeps from one program to the next."""

    def __init__(self, folder):
        self.group = ranks.join()
        self.rank = self.group.rank()
        self.folder = folder
        self.own = folder / f"own-{self.rank}"
        self.own.mkdir()
        # One thread for all: MLX may abort where a thread ends in which it has computed.
        self.pool = ThreadPoolExecutor(1)
        self.turns = [ThreadPoolExecutor(1) for _ in range(2)]
        self.sessions = 0
        self.models = {}
        folder_of = self.checkpoint("qwen2", {})
        self.tokenizer = load_tokenizer(folder_of, eos_token_ids=tiny_checkpoint.END_ID)
        self.where = open(folder / f"at-{self.rank}", "w")  # noqa: SIM115
        self.where.write(f"{os.getpid()} ")

    def at(self, *what):
        """Say where this rank is, for the parent to read if it stands still."""
        self.where.seek(0)
        self.where.write(f"{os.getpid()} {' '.join(map(str, what)):<300.300}")
        self.where.flush()

    def barrier(self):
        mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))

    def kept(self, key, make):
        key = repr(key)
        if key not in self.models:
            if len(self.models) > 24:
                self.models.clear()
            self.models[key] = make()
        return self.models[key]

    def checkpoint(self, case, changes):
        """A folder with the case as a checkpoint, and a tokenizer; rank 0 writes it."""
        folder = self.folder / f"{case}-{zlib.crc32(repr(changes).encode())}"
        tiny_models.architecture(case)  # also on the ranks that do not write it
        if not folder.exists():
            self.barrier()
            if self.rank == 0:
                (folder.with_suffix(".part")).mkdir()
                tiny_checkpoint.write(case, folder.with_suffix(".part"), **changes)
                folder.with_suffix(".part").rename(folder)
            self.barrier()
        return folder

    def model(self, program, which):
        case, changes = program["case"], WIDE_HEADS if "heads" in program else {}
        source = program.get("source", "memory")
        kept = source == "memory" and not any(s["op"] in CHANGING for s in program["steps"])
        if kept:
            # With the thread: MLX leaves some of what a model is made of to the thread's stream.
            key = (case, changes, program.get("first_layers"), which, program.get("thread"))
            return self.kept(key, lambda: self.build(program, changes))
        return self.build(program, changes)

    def second(self, which, program):
        """A model for samplers and processors to call."""
        return self.kept(("second", which, program.get("thread")), lambda: self.build_second(which))

    def build_second(self, which):
        # With heads enough for two ranks and for three.
        wide = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 96}
        wide |= {"intermediate_size": 192}
        case = {"pipelined": "deepseek_v3"}.get(which, "qwen2-untied")
        changes = wide if which == "sharded" else {}
        model = tiny_models.make(case, num_hidden_layers=3, **changes)
        if which == "pipelined":
            model.model.pipeline(self.group)
        if which == "sharded":
            model.shard(self.group)
        mx.eval(model.parameters())
        return model

    def exchange(self, session, number, ids):
        """Rank 0's ids, by a file for which the other ranks wait, but not for ever."""
        return exchange(self.folder / f"exchange-{session}-{number}", ids, self.rank)

    def build(self, program, changes):
        source = program.get("source", "memory")
        if source == "sharded":
            folder = self.checkpoint(program["case"], changes)
            return sharded_load(str(folder), pipeline_group=self.group)[0]
        if source == "lazy":
            model = load_model(self.checkpoint(program["case"], changes), lazy=True)[0]
        else:
            model = tiny_models.make(program["case"], **changes)
        layers, first = len(model.model.layers), program.get("first_layers")
        if first:
            split = [first] * self.group.size()
            split[0] = layers - first * (self.group.size() - 1)
            model.model.pipeline(self.group, split=split)
        else:
            model.model.pipeline(self.group)
        mx.eval(model.parameters())
        return model
