"""A program that is done one way."""

from __future__ import annotations

import collections
import copy
import importlib
import itertools

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from fuzzing import CHANGING
from fuzzing.batches import Batches, offsets
from fuzzing.changes import Changes
from fuzzing.lab import checksum
from fuzzing.loops import Loops
from fuzzing.samplers import Samplers


class Session(Samplers, Loops, Batches, Changes):
    """A program that is done one way on this rank; its public methods are the steps."""

    def __init__(self, lab, program, way):
        self.lab, self.program, self.way = lab, program, way
        self.seen = []
        self.model_of = {}
        self.caches = {}
        self.kept = []
        self.batches = {}
        self.uids = collections.defaultdict(list)
        self.ends_to_watch = []
        self.failures = []
        self.counts = collections.Counter()
        self.number = lab.sessions
        self.exchanges = itertools.count()
        self.lists = collections.defaultdict(list)
        self.wrapped = []

    def see(self, *what):
        self.seen.append(repr(what))

    def run(self):
        for number, step in enumerate(self.program["steps"]):
            self.lab.at(self.way, number, step)
            options = {k: v for k, v in step.items() if k != "op"}
            if step["op"] not in ("generate", "speculate", "resume", "insert", "next", "remove"):
                self.settle()
            self.see("step", number, step["op"])
            try:
                if number == 0:
                    try:
                        self.prepare()
                    finally:  # which draws, and the first time more
                        mx.random.seed(self.program.get("seed", 0))
                getattr(self, step["op"])(**options)
                if step["op"] in CHANGING:  # which draws for each module that a rank has
                    mx.random.seed(number)
            except BaseException as error:
                planned = "planned" in str(error)
                self.see("error", type(error).__name__, str(error))
                # Upstream leaves a step in flight, which would mix with what comes next.
                self.settle()
                batches = [b._generation_batch for b in self.batches.values()]
                caches = [*self.caches.values(), *(b.prompt_cache for b in batches)]
                mx.eval([c.state for cache in caches for c in cache if not c.empty()])
                self.settle()
                if step["op"] == "speculate":  # what drafting has raised comes after the step here
                    self.caches.pop(f"{step.get('cache')}-draft", None)
                if not planned:
                    self.failures.append(f"{type(error).__name__}: {error}"[:90])
            self.see("random", mx.random.state[0].tolist())
            for name, cache in self.caches.items():
                self.see("offsets", name, offsets(cache))
        self.lab.at(self.way, "end")
        for steps, _ in self.kept:
            steps.close()
        for name in list(self.batches):
            self.close(name)
        while self.wrapped:
            self.unwrap()
        self.settle()
        for name, cache in sorted(self.caches.items()):
            for c in cache:
                flat = tree_flatten(c.state) if getattr(c, "keys", 1) is not None else []
                self.see("cache", name, type(c).__name__, [positions(v) for _, v in flat])
        self.see("random", mx.random.uniform().item())

    def prepare(self):
        mx.random.seed(0)
        self.model_of = {w: self.lab.model(self.program, w) for w in self.others()}
        self.drafts = {d: self.draft(d) for d in self.drafted()}
        self.seconds = {
            which: self.lab.second(which, self.program)
            for which in ("pipelined", "sharded", "whole")
            if f"['second', '{which}']" in repr(self.program["steps"])
        }

    def others(self):
        return [0, 1] if any("other" in s for s in self.program["steps"]) else [0]

    def settle(self):
        """Let the loops' steps in flight end: other streams and threads follow."""
        mx.synchronize(self.loops.generation_stream)
        mx.synchronize()
        if "turns" in self.program:
            for thread in self.lab.turns:
                thread.submit(mx.synchronize, self.loops.generation_stream).result()
                thread.submit(mx.synchronize).result()

    @property
    def loops(self):
        return importlib.import_module("mlx_lm.generate")

    def cache_of(self, name, which=0, **options):
        if name is None:
            return None
        key = f"{name}{which}"
        if key not in self.caches:
            self.caches[key] = make_prompt_cache(self.model_of[which], **options)
        return self.caches[key]

    def draw(self):
        self.see("drawn", mx.random.normal((3,)).tolist())

    def seed(self, to):
        mx.random.seed(to)

    def store(self, cache, copies=False):
        key = f"{cache}0"
        if key not in self.caches:
            return
        if copies:
            self.caches[key] = copy.deepcopy(self.caches[key])
            return
        file = str(self.lab.own / "cache.safetensors")
        save_prompt_cache(file, self.caches[key])
        self.caches[key] = load_prompt_cache(file)

    def trim(self, cache, by):
        if f"{cache}0" in self.caches:
            self.see("trimmed", trim_prompt_cache(self.caches[f"{cache}0"], by))


def positions(array):
    """A checksum of each position of a cache's array (B, heads, positions, D)."""
    if not isinstance(array, mx.array) or array.ndim != 4:
        return checksum(array)
    used = [checksum(array[:, :, i])[-1] % 1000 for i in range(min(array.shape[2], 64))]
    return [*array.shape, str(array.dtype), used]
