"""Run by fuzz.py as a rank: does the programs that it is given, each both ways.

Its argument is the folder by which the parent and the ranks talk.
"""

from __future__ import annotations

import collections
import copy
import faulthandler
import importlib
import itertools
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import ranks
import tiny_checkpoint
import tiny_models
from fuzzing import BOTH, CHANGING, write
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.utils import load_model, load_tokenizer, save_model, sharded_load

import mlx_lm_skiphead
from mlx_lm_skiphead import rank_zero_head, share_tokens

# As a program has them that imports them by name before the plugin.
EARLY = dict(vars(importlib.import_module("mlx_lm.generate")))


class Planned(Exception):
    pass


class PlannedStop(BaseException):
    pass


ERRORS = {e.__name__: e for e in (Planned, PlannedStop, SystemExit, StopIteration, ValueError)}


def tokens_of(prompt):
    start, length = prompt
    return [(start + 37 * i + 11 * (i // 5)) % 256 for i in range(length)]


def checksum(array):
    """Shape and bits of an array of MLX; other values are themselves."""

    if not isinstance(array, mx.array):
        return array
    bits = np.array(array.reshape(-1).view(mx.uint8)) if array.size else b""
    return [*array.shape, str(array.dtype), zlib.crc32(bits)]


def positions(array):
    """A checksum of each position of a cache's array (B, heads, positions, D)."""
    if not isinstance(array, mx.array) or array.ndim != 4:
        return checksum(array)
    used = [checksum(array[:, :, i])[-1] % 1000 for i in range(min(array.shape[2], 64))]
    return [*array.shape, str(array.dtype), used]


WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
"""Attention heads wide enough for quantized caches."""


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
        file = self.folder / f"exchange-{session}-{number}"
        if self.rank == 0:
            write(file, ids.tolist())
            return ids
        until = time.monotonic() + 20
        while not file.exists():
            if time.monotonic() > until:
                raise TimeoutError(file.name)
            time.sleep(0.0005)
        return mx.array(json.loads(file.read_text()), mx.uint32)

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


class Session:
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
                    mx.random.seed(0)
                    self.model_of = {w: self.lab.model(self.program, w) for w in self.others()}
                    self.drafts = {d: self.draft(d) for d in self.drafted()}
                    self.seconds = {
                        which: self.lab.second(which, self.program)
                        for which in ("pipelined", "sharded", "whole")
                        if f"['second', '{which}']" in repr(self.program["steps"])
                    }
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

    # What steps are made of.

    def cache_of(self, name, which=0, **options):
        if name is None:
            return None
        key = f"{name}{which}"
        if key not in self.caches:
            self.caches[key] = make_prompt_cache(self.model_of[which], **options)
        return self.caches[key]

    def sampler(self, spec):
        if spec is None:
            return None
        name, *rest = spec
        if name == "temperature":
            return make_sampler(**rest[0])
        calls = itertools.count()
        seed = rest[0] if name in ("own key", "numpy", "numpy choice") else 0
        key = mx.random.key(seed)
        rng = np.random.default_rng(seed)
        second = self.second(rest[0]) if name == "second" else None

        def own_key(logprobs):
            nonlocal key
            key, now = mx.random.split(key)
            return mx.random.categorical(logprobs, key=now)

        def gumbel(logprobs):
            numbers = np.array(logprobs.astype(mx.float32))
            return mx.array((numbers + rng.gumbel(size=numbers.shape)).argmax(-1), mx.uint32)

        def choice(logprobs):  # numpy refuses NaN
            p = np.exp(np.array(logprobs.astype(mx.float32), np.float64))
            return mx.array([rng.choice(len(r), p=r / r.sum()) for r in p], mx.uint32)

        def by_turns(logprobs):
            return mx.argsort(logprobs, axis=-1)[..., -1 - next(calls) % 3]

        def forced(logprobs):  # as a grammar that allows one token only
            if next(calls) % 4 == 3:
                return mx.argmax(logprobs, axis=-1)
            return mx.full(logprobs.shape[:-1], 40, mx.uint32)

        def raises(logprobs):
            if next(calls) == rest[0]:
                raise ERRORS[rest[1]](f"planned, call {rest[0]}")
            return mx.argmax(logprobs, axis=-1)

        def broadcast(logprobs):
            ids = mx.argmax(logprobs, axis=-1).astype(mx.int32)
            if rest[0] == "eager":
                ids.tolist()
            everyone = mx.distributed.all_sum(ids if self.lab.rank == 0 else ids * 0)
            if rest[0] == "eager":
                mx.eval(everyone)
            return everyone.astype(mx.uint32)

        def waits(logprobs):
            logprobs.tolist()
            ids = mx.argmax(logprobs, axis=-1)
            return self.lab.exchange(self.number, next(self.exchanges), ids)

        def guided(logprobs):
            mx.eval(logprobs)
            return mx.argmax(logprobs - 0.5 * second(next(calls)), axis=-1)

        def shape(logprobs):
            if mx.isnan(logprobs).any().item():
                return mx.zeros((rest[0],), mx.uint32)
            return mx.argmax(logprobs, axis=-1)

        return {
            "broadcast": broadcast,
            "waits": waits,
            "second": guided,
            "shape": shape,
            "own key": own_key,
            "numpy": gumbel,
            "numpy choice": choice,
            "by turns": by_turns,
            "forced": forced,
            "raises": raises,
        }[name]

    def processors(self, specs):
        made = []
        for name, *rest in specs or []:
            if name == "usual":
                options = copy.deepcopy(rest[0])
                if "logit_bias" in options:  # keys that JSON has made strings
                    options["logit_bias"] = {int(k): v for k, v in options["logit_bias"].items()}
                made += make_logits_processors(**options)
            elif name in ("sum", "second", "waits"):
                made.append(self.together(name, *rest))
            else:
                made.append(Processor(name, *rest))
                if name in ("done", "reader"):
                    self.ends_to_watch.append(made[-1])
        return made

    def together(self, name, what=None):
        """A processor that goes by what other ranks say, or another model."""
        calls = itertools.count()
        second = self.second(what) if name == "second" else None

        def processor(tokens, logits):
            call = next(calls)
            if what != "lazy":
                mx.eval(logits)
            if name == "second":
                return logits - 0.5 * second(call).astype(logits.dtype)
            if name == "waits":
                logits[0, 0].item()
                ids = mx.argmax(logits, axis=-1)
                best = self.lab.exchange(self.number, next(self.exchanges), ids)
                ids = mx.arange(logits.shape[-1])
                return mx.where(ids == best[:, None], logits - 2.0, logits)
            mine = mx.sin(mx.arange(logits.shape[-1]) * (self.lab.rank + 1.0) + call)
            bias = mx.distributed.all_sum(mine)
            if what != "lazy":
                mx.eval(bias)
            return logits + bias.astype(logits.dtype)

        return processor

    def second(self, which):
        """A function that gives logits ``(1, V)`` of a second model, or of the stage alone."""
        model = self.model_of[0] if which == "stage" else self.seconds[which]
        cache = make_prompt_cache(model)

        def call(number):
            token = mx.array([[number % 50]])
            if which == "stage":
                hidden = model.model(token, cache=cache)[:, -1].astype(mx.float32)
                out = hidden.sum(axis=-1, keepdims=True) * mx.sin(mx.arange(256))
            else:
                out = model(token, cache=cache)[:, -1]
            mx.eval(out)
            return out

        return call

    def changed(self, processors, how, to):
        """The list of processors of a generation is another one from now on."""
        new = self.processors(to)
        if how == "clear":
            processors.clear()
        elif how == "extend":
            processors.extend(new)
        else:
            processors[:1] = new[:1]

    def by_turns(self, steps, n, cache):
        """Each step is asked for in the next thread, and the end where the generator has begun.

        Each evaluates the caches: unpatched leaves lazy arrays to the next thread.
        """

        def ask():
            step = next(steps, None)
            mx.eval([c.state for c in cache if not c.empty()])
            return step

        for number in range(n):
            yield self.lab.turns[number % 2].submit(ask).result()
        self.lab.turns[0].submit(ask).result()

    def follow(self, steps, leave, draws, ends, change=None):
        for number, step in enumerate(steps, 1):
            if change is not None and number == change["at"]:
                self.changed(change["processors"], change["how"], change["to"])
            if isinstance(step, tuple):
                token, logprobs, *rest = step
            else:
                token, logprobs = step.token, step.logprobs
                rest = [step.text, step.from_draft, step.finish_reason, step.generation_tokens]
            self.see_token(token, logprobs, *rest)
            if draws:
                self.see("drawn", mx.random.uniform().item())
            if number == leave or any(end.done for end in ends):
                break

    def see_token(self, token, logprobs, *rest):
        told = logprobs[token].item() if self.lab.rank == 0 else None
        if self.lab.rank and self.way == "plugin":
            self.counts["tokens"] += 1
            self.counts["without a head"] += math.isnan(logprobs[token].item())
        self.see("token", token, told, logprobs.shape, str(logprobs.dtype), *rest)

    # The steps.

    def generate(
        self,
        prompt,
        n,
        sampler=None,
        processors=None,
        stream=False,
        leave=None,
        keep=False,
        draws=False,
        cache=None,
        other=False,
        draft=None,
        callback=None,
        early=False,
        change=None,
        **options,
    ):
        self.ends_to_watch = []
        which = int(other)
        model, ids = self.model_of[which], mx.array(tokens_of(prompt))
        if "kv_bits" in options:
            options |= {"kv_group_size": 32, "quantized_kv_start": 4}
        options |= {"sampler": self.sampler(sampler), "max_tokens": n}
        options["logits_processors"] = self.processors(processors)
        if change is not None:
            change = {**change, "processors": options["logits_processors"]}
        elif not processors:
            options["logits_processors"] = None
        if callback is not None:
            options["prompt_progress_callback"] = self.callback(callback, model)
        if draft is not None:
            small = self.drafts[draft]
            if cache is not None:
                if f"{cache}-draft" not in self.caches:
                    self.caches[f"{cache}-draft"] = make_prompt_cache(model)
                    self.caches[f"{cache}-draft"] += make_prompt_cache(small)
                options["prompt_cache"] = self.caches[f"{cache}-draft"]
        else:
            small = None
            size = options.get("max_kv_size")
            options["prompt_cache"] = self.cache_of(cache, which, max_kv_size=size)
        if "turns" in self.program:
            options["prompt_cache"] = make_prompt_cache(model)
        if stream:
            tokenizer = self.lab.tokenizer
            steps = self.loops.stream_generate(model, tokenizer, ids, draft_model=small, **options)
        else:
            name = "generate_step" if small is None else "speculative_generate_step"
            loop = EARLY[name] if early else getattr(self.loops, name)
            steps = loop(ids, model, *([] if small is None else [small]), **options)
        if keep:
            self.kept.append((steps, self.ends_to_watch))
        ends = self.ends_to_watch
        if "turns" in self.program:
            steps, ends = self.by_turns(steps, n, options["prompt_cache"]), []
        self.follow(steps, leave, draws, ends, change)

    speculate = generate

    def drafted(self):
        return sorted({s["draft"] for s in self.program["steps"] if "draft" in s})

    def draft(self, name):
        case = self.program["case"] if name == "same" else name
        mx.random.seed(1)
        changes = WIDE_HEADS if "heads" in self.program else {}
        key = ("draft", case, changes, self.program.get("thread"))
        return self.lab.kept(key, lambda: tiny_models.make(case, **changes))

    def callback(self, kind, model):
        calls = itertools.count()

        def called(done, total):
            self.see("progress", done, total)
            if kind == "draw":
                self.see("drawn", mx.random.uniform().item())
            elif kind == "model":
                self.see("called", self.visible(model(mx.array([[1, 2]]))))
            elif next(calls) == 1:
                raise Planned("planned, callback")

        return called

    def visible(self, logits):
        """What a direct call gives; on workers in mode "hidden" that is something else."""
        hidden = self.program.get("mode") == "hidden" and self.lab.rank
        told = checksum(logits)  # computed in any case: others wait for what this rank sends
        return None if hidden else told

    def resume(self, which, leave=None):
        if self.kept:
            steps, ends = self.kept[which % len(self.kept)]
            self.follow(steps, leave, False, ends)

    def insert(
        self,
        batch,
        requests,
        sampler=None,
        narrow=False,
        cache=None,
        other=False,
        **options,
    ):
        if batch not in self.batches:
            if narrow:
                options |= {"completion_batch_size": 2, "prefill_batch_size": 1}
            self.batches[batch] = self.loops.BatchGenerator(
                self.model_of[int(other)],
                sampler=self.sampler(sampler),
                stop_tokens=[[t] for t in range(240, 256)],
                **options,
            )
        caches = lists = None
        if cache is not None and f"{cache}{int(other)}" in self.caches:
            self.settle()
            caches = [copy.deepcopy(self.cache_of(cache, int(other))) for _ in requests]
        if any("processors" in r for r in requests):
            lists = [self.processors(r.get("processors")) for r in requests]
            self.lists[batch] += lists
        samplers = [self.sampler(r.get("sampler")) for r in requests]
        self.uids[batch] += self.batches[batch].insert(
            [tokens_of(r["prompt"]) for r in requests],
            max_tokens=[r["n"] for r in requests],
            caches=caches,
            samplers=samplers if any(samplers) else None,
            logits_processors=lists,
        )

    def next(self, batch, times, progress=False):
        for _ in range(times):
            if batch not in self.batches:
                break
            if progress:
                prompts, responses = self.batches[batch].next()
                self.see("progress", [[r.uid, r.progress, r.end_of_prompt] for r in prompts])
            else:
                responses = self.batches[batch].next_generated()
            for r in responses:
                kept = offsets(r.prompt_cache or [])
                self.see_token(r.token, r.logprobs, r.uid, r.finish_reason, r.all_tokens, kept)
            self.see("responses", len(responses))

    def change(self, batch, which, how, to):
        if self.lists[batch]:
            self.changed(self.lists[batch][which % len(self.lists[batch])], how, to)

    def wrap(self, place, who):
        """Another package wraps a function of mlx's or mlx-lm's, on the ranks `who`."""
        if self.lab.rank not in who:
            return
        model = self.model_of[0]
        if place in ("model", "stage"):
            cls, attribute = type(model if place == "model" else model.model), "__call__"
            owner = next(base for base in cls.__mro__ if attribute in vars(base))
        else:
            owner, attribute = {
                "eval": (mx, "eval"),
                "async_eval": (mx, "async_eval"),
                "all_gather": (mx.distributed, "all_gather"),
                "all_sum": (mx.distributed, "all_sum"),
                "batch": (self.loops.GenerationBatch, "_step"),
            }.get(place, (self.loops, place))
        real = getattr(owner, attribute)

        def counting(*args, **kwargs):
            self.counts["calls of closures"] += 1
            return real(*args, **kwargs)

        self.wrapped.append((owner, attribute, vars(owner)[attribute]))
        setattr(owner, attribute, counting)

    def unwrap(self):
        if self.wrapped:
            setattr(*self.wrapped.pop())

    def remove(self, batch, which, cache=None):
        if not self.uids[batch] or batch not in self.batches:
            return
        uid = self.uids[batch][which % len(self.uids[batch])]
        gone = self.batches[batch].remove([uid], return_prompt_caches=cache is not None)
        for cached, tokens in gone.values():
            self.see("removed", tokens)
            if cached:
                self.caches[f"{cache}0"] = cached

    def close(self, batch):
        if batch in self.batches:
            self.batches.pop(batch).close()
            self.uids.pop(batch, None)

    def own(
        self,
        prompt,
        many,
        n,
        sampler=None,
        how="",
        cache=None,
        other=False,
    ):
        model = self.model_of[int(other)]
        sample = self.sampler(sampler) or (lambda logprobs: mx.argmax(logprobs, axis=-1))
        one = many == 1 and self.cache_of(cache, int(other))
        one = one or make_prompt_cache(model)
        two = make_prompt_cache(model)
        inputs = mx.array([tokens_of(prompt)] * many)
        if how == "chunks" and inputs.shape[1] > 1:
            with rank_zero_head():
                model(inputs[:, :-1], cache=one)
            mx.eval([c.state for c in one])
            inputs = inputs[:, -1:]
        for _ in range(n):
            with rank_zero_head():
                logits = model(inputs, cache=one)[:, -1]
                if self.way == "unpatched" and how in ("guidance", "two blocks"):
                    mx.eval(logits)  # upstream's sends have no order within a graph
                if how == "guidance":
                    logits = 2 * logits - model(inputs[:, -1:], cache=two)[:, -1]
            if how == "two blocks":
                with rank_zero_head():
                    logits = 2 * logits - model(inputs[:, -1:], cache=two)[:, -1]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            token = share_tokens(sample(logprobs))
            self.see("shared", token.tolist(), checksum(logprobs) if not self.lab.rank else None)
            inputs = token[:, None]
        if how == "forgets":
            with rank_zero_head():
                model(inputs, cache=one)
            mx.eval([c.state for c in one])

    def direct(self, prompt, cache=None, other=False):
        model = self.model_of[int(other)]
        ids = mx.array([tokens_of(prompt)])
        self.see("logits", self.visible(model(ids, cache=self.cache_of(cache, int(other)))))

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

    def look(self):
        for name, module in self.model_of[0].named_modules():
            if name.endswith(("lm_head", "embed_tokens")) and "weight" in dir(module):
                self.see("weight", name, checksum(module.weight))

    def save(self):
        save_model(self.lab.own / "model", self.model_of[0])
        saved = mx.load(str(self.lab.own / "model" / "model.safetensors"))
        self.see("saved", sorted((name, checksum(array)) for name, array in saved.items()))
        shutil.rmtree(self.lab.own / "model")

    def dtype(self, to):
        self.model_of[0].set_dtype(getattr(mx, to))

    def quantize(self):
        nn.quantize(self.model_of[0], group_size=32, bits=4)

    def new_head(self):
        model = self.model_of[0]
        name = "lm_head" if "lm_head" in model else "model.embed_tokens"
        weight = mx.random.normal((tiny_models.VOCAB, tiny_models.HIDDEN), key=mx.random.key(5))
        model.load_weights([(f"{name}.weight", weight)], strict=False)

    def adapter(self, where):
        model = self.model_of[0]
        parent, name = model.model, "embed_tokens"
        if where == "layer":
            parent, name = model.model.layers[-1].self_attn, "o_proj"
        elif where != "embedding" and "lm_head" in model:
            parent, name = model, "lm_head"
        module = parent[name]
        if where == "wrapped head" and parent is model:
            model.lm_head = Scaled(module)
            return
        kind = LoRAEmbedding if name == "embed_tokens" else LoRALinear
        adapted = kind.from_base(module, r=4, scale=10.0)
        adapted.lora_b = 0.1 * mx.random.normal(adapted.lora_b.shape, key=mx.random.key(3))
        parent[name] = adapted


class Scaled(nn.Module):
    """A head in another one's clothes: no `weight`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x):
        return self.inner(x) * 1.5


class Processor:
    """A logits processor that goes by calls and tokens, not by the values of logits."""

    def __init__(self, name, at=0, error=""):
        self.name, self.at, self.error = name, at, error
        self.calls = self.state = 0
        self.done = False

    def __call__(self, tokens, logits):
        self.calls += 1
        ids = mx.arange(logits.shape[-1])
        if self.name == "calls":
            return logits + 3.0 * (ids % 7 == self.calls % 7)
        if self.name == "automaton" and tokens is not None:
            return mx.where(ids % 5 == tokens[-1] % 5, logits - 20.0, logits)
        if self.name == "eager automaton" and tokens is not None:
            self.state = (3 * self.state + tokens[-1].item()) % 11
            return mx.where(ids % 11 == self.state, -float("inf"), logits)
        if self.name == "noise":
            return logits + mx.random.normal(logits.shape).astype(logits.dtype)
        if self.name == "done":
            self.done = self.calls >= self.at
        if self.name == "reader":  # which ends a loop when it has been fed often enough
            view = memoryview(logits).cast("B")
            fed = len(view) if self.error == "memoryview" else np.frombuffer(logits, "u1").size
            self.state += fed > 0
            self.done = self.state >= self.at
        if self.name == "raises" and self.calls == self.at + 1:
            raise ERRORS[self.error](f"planned, call {self.at}")
        return logits


def offsets(cache):
    told = [getattr(c, "offset", None) for c in cache]
    return [o.tolist() if isinstance(o, mx.array) else o for o in told]


logged = []
"""What the plugin has warned of."""


class Warnings(logging.Handler):
    def emit(self, record):
        logged.append(record.getMessage())


def do(lab, program):
    """Both ways of `program` on this rank: what each saw, if they differ."""
    ways = program.get("ways", BOTH)
    done = []
    for way in ways:
        lab.at(way, "begin")
        lab.sessions += 1
        done.append(Session(lab, program, way))
        if way == "plugin":
            mlx_lm_skiphead.install(program.get("mode", "on"))
        else:
            mlx_lm_skiphead.uninstall()
        logged.clear()
        if program.get("thread"):
            lab.pool.submit(done[-1].run).result()
        else:
            done[-1].run()
        # All ranks have the same prompts: nobody says that they differ.
        done[-1].seen += [text for text in logged if "prompt" in text]
        lab.at(way, "barrier")
        lab.barrier()
        if lab.rank == 0:
            for file in lab.folder.glob("exchange-*"):
                file.unlink()
    seen = [session.seen for session in done]
    counts = sum((session.counts for session in done), collections.Counter())
    failures = done[ways.index("unpatched")].failures
    return {"differs": seen if seen[0] != seen[1] else None, "counts": counts, "failures": failures}


def main(folder):
    """Does the programs that the parent writes, one after another, until that is None."""
    lab = Lab(folder)
    logging.getLogger("mlx_lm_skiphead").addHandler(Warnings(logging.WARNING))
    stacks = open(folder / f"stacks-{lab.rank}", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, stacks)
    for number in itertools.count():
        file = folder / f"{number}.json"
        begun = time.monotonic()
        while not file.exists():
            time.sleep(0.001)
            if time.monotonic() - begun > 900 or not folder.exists():  # the parent is gone
                os._exit(1)
        program = json.loads(file.read_text())
        if program is None:
            os._exit(0)
        try:
            result = do(lab, program)
        except BaseException:
            result = {"differs": [[traceback.format_exc()], []], "broken": True}
        write(folder / f"{number}-{lab.rank}.json", result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
