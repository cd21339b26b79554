"""A differential fuzzer: random programs on real ranks, unpatched and with the plugin in turn.

A seed gives a program: a model and a list of steps (`random_program`). Ranks that stay up do each
program both ways, in the same processes, from the same random state and with fresh objects, and
each compares what it saw (`Session.see`): tokens, drafts, texts, stop reasons, errors and when
they come, random numbers, prompt caches, and on rank 0 logprobs. A program that differs, or that
stands still, is done again unpatched only, to tell apart what is mlx-lm's own; then it is made
smaller by leaving things out, and printed with the command that does it again.

    python tests/fuzz.py --minutes 60
    python tests/fuzz.py --only 1234
    python tests/fuzz.py --program '{"ranks": 2, "case": "qwen2-tied", "steps": [...]}'

Left out, as README.md says that they differ: what decides by values of logits on workers.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import collections
import contextlib
import copy
import faulthandler
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ranks
import tiny_models

Program = dict[str, Any]
Step = dict[str, Any]

BLOCK = 128  # seeds that share their ranks and few cases, so that models are built once
BOTH = ["unpatched", "plugin"]
DENSE = ["qwen2-tied", "qwen2-untied", "ministral3-tied", "ministral3-untied"]
CHANGING = ("dtype", "adapter", "quantize", "new_head")


# --- programs


def random_program(seed: int, count: int | None = None) -> Program:
    """The program of `seed`, on `count` ranks if it is given."""
    block = random.Random(f"block {seed // BLOCK}")
    cases = [block.choice(DENSE), *block.sample(sorted(tiny_models.CONFIGS), 3)]
    size = block.choice([2, 2, 3])
    rng = random.Random(f"program {seed}")
    case = rng.choice([cases[0], *cases])
    program: Program = {"seed": seed, "ranks": count or size, "case": case}
    if rng.random() < 0.3:
        program["source"] = rng.choice(["lazy", "sharded"])
    if rng.random() < 0.2 and program.get("source") != "sharded":
        program["first_layers"] = rng.choice([1, 2])  # of the last rank; rank 0 has what is left
    if rng.random() < 0.3:
        program["ways"] = BOTH[::-1]
    if rng.random() < 0.15:
        program["thread"] = True
    if rng.random() < 0.1:
        program["mode"] = "hidden"
    if case.startswith("qwen2") and rng.random() < 0.3:
        program["heads"] = 2  # attention heads wide enough for quantized caches
    kinds = {
        "generate": 6, "speculate": 2, "resume": 2, "insert": 3, "next": 4, "remove": 1,
        "close": 1, "own": 2, "direct": 1, "draw": 1, "seed": 0.5, "store": 0.7, "trim": 0.5,
        "look": 0.2, "save": 0.1,
    }  # fmt: skip
    if case in DENSE and rng.random() < 0.4:
        kinds |= {"dtype": 1, "adapter": 2, "quantize": 0.5, "new_head": 0.7}
    if rng.random() < 0.4:  # a program of batches
        kinds |= {"insert": 9, "next": 14, "remove": 4, "close": 2}
    names = rng.choices(list(kinds), list(kinds.values()), k=rng.randint(1, 7))
    program["steps"] = [{"op": name, **_options(name, rng, program)} for name in names]
    return program


def _options(name: str, rng: random.Random, program: Program) -> Step:
    """Options of a step; those that are left out have a default."""

    def maybe(chance: float, **options: Any) -> Step:
        return {k: v() for k, v in options.items()} if rng.random() < chance else {}

    def prompt() -> list[int]:  # where it begins, and how many tokens
        return [rng.randrange(256), rng.choice([1, 1, 2, 5, 9, 17, 40])]

    def sampler(strict: bool = True) -> list[Any]:
        return rng.choice(
            [
                ["temperature", {"temp": rng.choice([0.3, 0.8, 1.5])}],
                ["temperature", {"temp": 0.9, "min_p": 0.05}],
                ["temperature", {"temp": 0.9, "top_p": 0.9, "top_k": 20}],
                ["temperature", {"temp": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.05}],
                ["own key", rng.randrange(100)],
                ["numpy", rng.randrange(100)],
                ["numpy choice" if strict else "numpy", rng.randrange(100)],
                ["by turns"],
                ["raises", rng.randrange(8), rng.choice(sorted(ERRORS))],
            ]
        )

    def processor() -> list[Any]:
        return rng.choice(
            [
                ["usual", {"logit_bias": {255: 4.0, 7: -3.0}}],
                ["usual", {"repetition_penalty": 1.3, "repetition_context_size": 5}],
                ["usual", {"presence_penalty": 0.5, "frequency_penalty": 0.3}],
                ["calls"],
                ["automaton"],
                ["eager automaton"],
                ["noise"],
                ["done", rng.randrange(1, 8)],
                ["raises", rng.randrange(8), rng.choice(sorted(ERRORS))],
            ]
        )

    def processors() -> list[Any]:
        return [processor() for _ in range(rng.choice([1, 1, 2]))]

    slot = maybe(0.35, cache=lambda: rng.choice("ab"))
    other = maybe(0.1, other=lambda: True)
    if name in ("generate", "speculate"):
        speculating = name == "speculate"
        return {
            "prompt": prompt(),
            "n": rng.choice([1, 2, 4, 6, 9, 12]),
            **maybe(0.55, sampler=lambda: sampler(not speculating)),
            **maybe(0.45, processors=processors),
            **maybe(0.3, stream=lambda: True),
            **maybe(0.3, leave=lambda: rng.randrange(1, 6)),
            **maybe(0.2, keep=lambda: True),
            **maybe(0.2, draws=lambda: True),
            **maybe(0.3, prefill_step_size=lambda: rng.choice([4, 16])),
            **maybe(0.5 * ("heads" in program), kv_bits=lambda: rng.choice([4, 8])),
            **slot,
            **(
                {"draft": rng.choice(["same", "qwen2-untied"])}
                | maybe(0.5, num_draft_tokens=lambda: rng.choice([1, 3, 5]))
                if speculating
                else maybe(0.15, max_kv_size=lambda: rng.choice([8, 16]))
                | maybe(0.1, callback=lambda: rng.choice(["draw", "model", "raise"]))
                | other
            ),
        }
    batch = {"batch": rng.choice("xxy")}
    if name == "insert":
        many = rng.choice([1, 1, 2, 3])
        return {
            **batch,
            "prompts": [prompt() for _ in range(many)],
            "n": [rng.choice([1, 3, 6, 10]) for _ in range(many)],
            **maybe(0.5, samplers=lambda: [rng.choice([None, sampler()]) for _ in range(many)]),
            **maybe(0.4, processors=lambda: [rng.choice([[], processors()]) for _ in range(many)]),
            # These are of the batch; they count where this step makes it.
            **maybe(0.3, sampler=sampler),
            **maybe(0.2, max_kv_size=lambda: 16),
            **maybe(0.3, prefill_step_size=lambda: 8),
            **maybe(0.2, completion_batch_size=lambda: 2, prefill_batch_size=lambda: 1),
            **slot,
            **other,
        }
    return {
        "next": lambda: {**batch, "times": rng.choice([1, 2, 5, 12])},
        "remove": lambda: {**batch, "which": rng.randrange(4), **slot},
        "close": lambda: batch,
        "resume": lambda: {"which": rng.randrange(3), **maybe(0.5, leave=lambda: 3)},
        "own": lambda: {
            "prompts": [[rng.randrange(256), rng.choice([1, 7, 20])]] * rng.choice([1, 1, 3]),
            "n": rng.choice([1, 4, 8]),
            **maybe(0.5, sampler=lambda: sampler(strict=False)),
            **maybe(0.4, how=lambda: rng.choice(["chunks", "guidance", "two blocks", "forgets"])),
            **slot,
            **other,
        },
        "direct": lambda: {"prompt": prompt(), **slot, **other},
        "seed": lambda: {"to": rng.randrange(100)},
        "store": lambda: {"cache": rng.choice("ab"), **maybe(0.3, copies=lambda: True)},
        "trim": lambda: {"cache": rng.choice("ab"), "by": rng.choice([1, 3, 50])},
        "dtype": lambda: {"to": rng.choice(["float16", "bfloat16", "float32"])},
        "adapter": lambda: {"where": rng.choice(["head", "embedding", "layer", "wrapped head"])},
    }.get(name, dict)()


# --- ranks: one program, one way


class Planned(Exception):
    pass


class PlannedStop(BaseException):
    pass


ERRORS = {e.__name__: e for e in (Planned, PlannedStop, SystemExit, StopIteration, ValueError)}


def tokens_of(prompt: list[int]) -> list[int]:
    start, length = prompt
    return [(start + 37 * i + 11 * (i // 5)) % 256 for i in range(length)]


def checksum(array: Any) -> Any:
    """Shape and bits of an array of MLX; other values are themselves."""
    import mlx.core as mx
    import numpy as np

    if not isinstance(array, mx.array):
        return array
    bits = np.array(array.reshape(-1).view(mx.uint8)) if array.size else b""
    return [*array.shape, str(array.dtype), zlib.crc32(bits)]


class Lab:
    """What a rank keeps from one program to the next."""

    def __init__(self, folder: Path) -> None:
        import mlx.core as mx

        self.group = mx.distributed.init()
        self.rank = self.group.rank()
        self.folder = folder
        self.own = folder / f"own-{self.rank}"
        self.own.mkdir()
        # One thread for all: MLX may abort where a thread ends in which it has computed.
        self.pool = ThreadPoolExecutor(1)
        self.models: dict[str, Any] = {}
        self.drafts: dict[str, Any] = {}
        self.tokenizer: Any = None
        self.where = open(folder / f"at-{self.rank}", "w")
        self.where.write(f"{os.getpid()} ")

    def at(self, *what: Any) -> None:
        """Say where this rank is, for the parent to read if it stands still."""
        self.where.seek(0)
        self.where.write(f"{os.getpid()} {' '.join(map(str, what)):<300.300}")
        self.where.flush()

    def barrier(self) -> None:
        import mlx.core as mx

        mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))

    def kept(self, key: Any, make: Any) -> Any:
        key = repr(key)
        if key not in self.models:
            if len(self.models) > 24:
                self.models.clear()
            self.models[key] = make()
        return self.models[key]

    def checkpoint(self, case: str, changes: Any) -> Path:
        """A folder with the case as a checkpoint, and a tokenizer; rank 0 writes it."""
        import tiny_checkpoint

        folder = self.folder / f"{case}-{zlib.crc32(repr(changes).encode())}"
        if not folder.exists():
            self.barrier()
            if self.rank == 0:
                (folder.with_suffix(".part")).mkdir()
                tiny_checkpoint.write(case, folder.with_suffix(".part"), **changes)
                folder.with_suffix(".part").rename(folder)
            self.barrier()
        return folder

    def model(self, program: Program, which: int) -> Any:
        case, changes = program["case"], {}
        if "heads" in program:
            changes = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
        source = program.get("source", "memory")
        kept = source == "memory" and not any(s["op"] in CHANGING for s in program["steps"])
        if kept:
            key = (case, changes, program.get("first_layers"), which)
            return self.kept(key, lambda: self.build(program, changes))
        return self.build(program, changes)

    def build(self, program: Program, changes: Any) -> Any:
        import mlx.core as mx
        from mlx_lm.utils import load_model, sharded_load

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

    def __init__(self, lab: Lab, program: Program) -> None:
        self.lab, self.program = lab, program
        self.seen: list[Any] = []
        self.model_of: dict[int, Any] = {}
        self.caches: dict[str, list[Any]] = {}
        self.kept: list[tuple[Any, list[Any]]] = []
        self.batches: dict[str, Any] = {}
        self.uids: dict[str, list[int]] = collections.defaultdict(list)
        self.ends_to_watch: list[Any] = []
        self.way = ""
        self.rows = 1  # of the last own loop
        self.tokens = self.not_computed = 0  # with the plugin on a worker: all; without logprobs

    def see(self, *what: Any) -> None:
        self.seen.append(repr(what))

    def run(self, way: str) -> None:
        import mlx.core as mx

        self.way = way
        for number, step in enumerate(self.program["steps"]):
            self.lab.at(way, number, step)
            options = {k: v for k, v in step.items() if k != "op"}
            if step["op"] not in ("generate", "speculate", "resume", "insert", "next", "remove"):
                self.settle()
            self.see("step", number, step["op"])
            try:
                if number == 0:
                    self.model_of = {w: self.lab.model(self.program, w) for w in self.others()}
                    mx.random.seed(self.program.get("seed", 0))
                getattr(self, step["op"])(**options)
            except BaseException as error:
                planned = "planned" in str(error)
                self.see("error", type(error).__name__, str(error) if planned else "")
            self.see("random", mx.random.state[0].tolist())
            for name, cache in self.caches.items():
                self.see("offsets", name, [_number(getattr(c, "offset", None)) for c in cache])
        self.lab.at(way, "end")
        for steps, _ in self.kept:
            steps.close()
        for name in list(self.batches):
            self.close(name)
        # What an own loop has not shared must not meet the other way.
        from mlx_lm_skiphead import share_tokens

        mx.eval(share_tokens(mx.zeros((self.rows,), mx.uint32)))
        self.settle()
        from mlx.utils import tree_flatten

        for name, cache in sorted(self.caches.items()):
            for c in cache:
                flat = tree_flatten(c.state) if getattr(c, "keys", 1) is not None else []
                self.see("cache", name, type(c).__name__, [checksum(v) for _, v in flat])
        self.see("random", mx.random.uniform().item())

    def others(self) -> list[int]:
        return [0, 1] if any("other" in s for s in self.program["steps"]) else [0]

    def settle(self) -> None:
        """Let the loops' steps in flight end: other streams and threads follow."""
        import mlx.core as mx

        mx.synchronize(self.loops.generation_stream)
        mx.synchronize()

    @property
    def loops(self) -> Any:
        return importlib.import_module("mlx_lm.generate")

    # What steps are made of.

    def cache_of(self, name: str | None, which: int = 0, **options: Any) -> Any:
        from mlx_lm.models.cache import make_prompt_cache

        if name is None:
            return None
        key = f"{name}{which}"
        if key not in self.caches:
            self.caches[key] = make_prompt_cache(self.model_of[which], **options)
        return self.caches[key]

    def sampler(self, spec: list[Any] | None) -> Any:
        import mlx.core as mx
        import numpy as np
        from mlx_lm.sample_utils import make_sampler

        if spec is None:
            return None
        name, *rest = spec
        if name == "temperature":
            return make_sampler(**rest[0])
        calls = iter(range(10**9))
        key = mx.random.key(rest[0] if rest else 0)
        rng = np.random.default_rng(rest[0] if rest else 0)

        def own_key(logprobs: Any) -> Any:
            nonlocal key
            key, now = mx.random.split(key)
            return mx.random.categorical(logprobs, key=now)

        def gumbel(logprobs: Any) -> Any:
            numbers = np.array(logprobs.astype(mx.float32))
            return mx.array((numbers + rng.gumbel(size=numbers.shape)).argmax(-1), mx.uint32)

        def choice(logprobs: Any) -> Any:  # numpy refuses NaN
            p = np.exp(np.array(logprobs.astype(mx.float32), np.float64))
            return mx.array([rng.choice(len(r), p=r / r.sum()) for r in p], mx.uint32)

        def by_turns(logprobs: Any) -> Any:
            return mx.argsort(logprobs, axis=-1)[..., -1 - next(calls) % 3]

        def raises(logprobs: Any) -> Any:
            if next(calls) == rest[0]:
                raise ERRORS[rest[1]](f"planned, call {rest[0]}")
            return mx.argmax(logprobs, axis=-1)

        return {
            "own key": own_key,
            "numpy": gumbel,
            "numpy choice": choice,
            "by turns": by_turns,
            "raises": raises,
        }[name]

    def processors(self, specs: list[Any] | None) -> Any:
        from mlx_lm.sample_utils import make_logits_processors

        made: list[Any] = []
        for name, *rest in specs or []:
            if name == "usual":
                options = copy.deepcopy(rest[0])
                if "logit_bias" in options:  # keys that JSON has made strings
                    options["logit_bias"] = {int(k): v for k, v in options["logit_bias"].items()}
                made += make_logits_processors(**options)
            else:
                made.append(Processor(name, *rest))
                if name == "done":
                    self.ends_to_watch.append(made[-1])
        return made or None

    def follow(self, steps: Any, leave: int | None, draws: bool, ends: list[Any]) -> None:
        import mlx.core as mx

        for number, step in enumerate(steps, 1):
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

    def see_token(self, token: int, logprobs: Any, *rest: Any) -> None:
        told = logprobs[token].item() if self.lab.rank == 0 else None
        if self.lab.rank and self.way == "plugin":
            self.tokens += 1
            self.not_computed += math.isnan(logprobs[token].item())
        self.see("token", token, told, logprobs.shape, str(logprobs.dtype), *rest)

    # The steps.

    def generate(
        self,
        prompt: list[int] = [3, 5],  # noqa: B006
        n: int = 6,
        sampler: Any = None,
        processors: Any = None,
        stream: bool = False,
        leave: int | None = None,
        keep: bool = False,
        draws: bool = False,
        cache: str | None = None,
        other: bool = False,
        draft: str | None = None,
        callback: str | None = None,
        **options: Any,
    ) -> None:
        import mlx.core as mx

        self.ends_to_watch = []
        which = int(other)
        model, ids = self.model_of[which], mx.array(tokens_of(prompt))
        if "kv_bits" in options:
            options |= {"kv_group_size": 32, "quantized_kv_start": 4}
        options |= {"sampler": self.sampler(sampler), "max_tokens": n}
        options["logits_processors"] = self.processors(processors)
        if callback is not None:
            options["prompt_progress_callback"] = self.callback(callback, model)
        if draft is not None:
            small = self.draft(draft)
            if cache is not None:
                from mlx_lm.models.cache import make_prompt_cache

                if f"{cache}-draft" not in self.caches:
                    self.caches[f"{cache}-draft"] = make_prompt_cache(model)
                    self.caches[f"{cache}-draft"] += make_prompt_cache(small)
                options["prompt_cache"] = self.caches[f"{cache}-draft"]
        else:
            small = None
            options["prompt_cache"] = self.cache_of(cache, which)
        if stream:
            tokenizer = self.lab.tokenizer
            steps = self.loops.stream_generate(model, tokenizer, ids, draft_model=small, **options)
        elif small is not None:
            steps = self.loops.speculative_generate_step(ids, model, small, **options)
        else:
            steps = self.loops.generate_step(ids, model, **options)
        if keep:
            self.kept.append((steps, self.ends_to_watch))
        self.follow(steps, leave, draws, self.ends_to_watch)

    speculate = generate

    def draft(self, name: str) -> Any:
        case = self.program["case"] if name == "same" else name
        return self.lab.drafts[case]

    def callback(self, kind: str, model: Any) -> Any:
        import mlx.core as mx

        calls = iter(range(10**9))

        def called(done: int, total: int) -> None:
            self.see("progress", done, total)
            if kind == "draw":
                self.see("drawn", mx.random.uniform().item())
            elif kind == "model":
                self.see("called", self.visible(model(mx.array([[1, 2]]))))
            elif next(calls) == 1:
                raise Planned("planned, callback")

        return called

    def visible(self, logits: Any) -> Any:
        """What a direct call gives; on workers in mode "hidden" that is something else."""
        hidden = self.program.get("mode") == "hidden" and self.lab.rank
        told = checksum(logits)  # computed in any case: others wait for what this rank sends
        return None if hidden else told

    def resume(self, which: int = 0, leave: int | None = None) -> None:
        if self.kept:
            steps, ends = self.kept[which % len(self.kept)]
            self.follow(steps, leave, False, ends)

    def insert(
        self,
        batch: str = "x",
        prompts: Any = ((3, 5),),
        n: Any = None,
        samplers: Any = None,
        processors: Any = None,
        sampler: Any = None,
        cache: str | None = None,
        other: bool = False,
        **options: Any,
    ) -> None:
        if batch not in self.batches:
            self.batches[batch] = self.loops.BatchGenerator(
                self.model_of[int(other)],
                sampler=self.sampler(sampler),
                stop_tokens=[[t] for t in range(240, 256)],
                **options,
            )
        many = len(prompts)
        caches = None
        if cache is not None and f"{cache}{int(other)}" in self.caches:
            self.settle()
            caches = [copy.deepcopy(self.cache_of(cache, int(other))) for _ in prompts]
        self.uids[batch] += self.batches[batch].insert(
            [tokens_of(prompt) for prompt in prompts],
            max_tokens=n or [6] * many,
            caches=caches,
            samplers=[self.sampler(s) for s in samplers] if samplers else None,
            logits_processors=[self.processors(p) or [] for p in processors]
            if processors
            else None,
        )

    def next(self, batch: str = "x", times: int = 1) -> None:
        for _ in range(times):
            if batch not in self.batches:
                break
            responses = self.batches[batch].next_generated()
            for r in responses:
                self.see_token(r.token, r.logprobs, r.uid, r.finish_reason, r.all_tokens)
            self.see("responses", len(responses))

    def remove(self, batch: str = "x", which: int = 0, cache: str | None = None) -> None:
        if not self.uids[batch] or batch not in self.batches:
            return
        uid = self.uids[batch][which % len(self.uids[batch])]
        gone = self.batches[batch].remove([uid], return_prompt_caches=cache is not None)
        for cached, tokens in gone.values():
            self.see("removed", tokens)
            if cached:
                self.caches[f"{cache}0"] = cached

    def close(self, batch: str = "x") -> None:
        if batch in self.batches:
            self.batches.pop(batch).close()
            self.uids.pop(batch, None)

    def own(
        self,
        prompts: Any = ((3, 5),),
        n: int = 4,
        sampler: Any = None,
        how: str = "",
        cache: str | None = None,
        other: bool = False,
    ) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        from mlx_lm_skiphead import rank_zero_head, share_tokens

        model = self.model_of[int(other)]
        sample = self.sampler(sampler) or (lambda logprobs: mx.argmax(logprobs, axis=-1))
        one = len(prompts) == 1 and self.cache_of(cache, int(other))
        one = one or make_prompt_cache(model)
        two = make_prompt_cache(model)
        self.rows = len(prompts)
        inputs = mx.array([tokens_of(prompt) for prompt in prompts])
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

    def direct(self, prompt: Any = (3, 5), cache: str | None = None, other: bool = False) -> None:
        import mlx.core as mx

        model = self.model_of[int(other)]
        ids = mx.array([tokens_of(prompt)])
        self.see("logits", self.visible(model(ids, cache=self.cache_of(cache, int(other)))))

    def draw(self) -> None:
        import mlx.core as mx

        self.see("drawn", mx.random.normal((3,)).tolist())

    def seed(self, to: int = 0) -> None:
        import mlx.core as mx

        mx.random.seed(to)

    def store(self, cache: str = "a", copies: bool = False) -> None:
        from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

        key = f"{cache}0"
        if key not in self.caches:
            return
        if copies:
            self.caches[key] = copy.deepcopy(self.caches[key])
            return
        file = str(self.lab.own / "cache.safetensors")
        save_prompt_cache(file, self.caches[key])
        self.caches[key] = load_prompt_cache(file)

    def trim(self, cache: str = "a", by: int = 1) -> None:
        from mlx_lm.models.cache import trim_prompt_cache

        if f"{cache}0" in self.caches:
            self.see("trimmed", trim_prompt_cache(self.caches[f"{cache}0"], by))

    def parts(self) -> tuple[Any, Any]:
        """Where the head and the embedding of the model are: the module that has them."""
        model = self.model_of[0]
        return model if "lm_head" in model else None, model.model

    def look(self) -> None:
        for name, module in self.model_of[0].named_modules():
            if name.endswith(("lm_head", "embed_tokens")) and "weight" in dir(module):
                self.see("weight", name, checksum(module.weight))

    def save(self) -> None:
        import mlx.core as mx
        from mlx_lm.utils import save_model

        save_model(self.lab.own / "model", self.model_of[0])
        saved = mx.load(str(self.lab.own / "model" / "model.safetensors"))
        self.see("saved", sorted((name, checksum(array)) for name, array in saved.items()))
        shutil.rmtree(self.lab.own / "model")

    def dtype(self, to: str = "float16") -> None:
        import mlx.core as mx

        self.model_of[0].set_dtype(getattr(mx, to))

    def quantize(self) -> None:
        import mlx.nn as nn

        nn.quantize(self.model_of[0], group_size=32, bits=4)

    def new_head(self) -> None:
        import mlx.core as mx

        model = self.model_of[0]
        name = "lm_head" if "lm_head" in model else "model.embed_tokens"
        weight = mx.random.normal((tiny_models.VOCAB, tiny_models.HIDDEN), key=mx.random.key(5))
        model.load_weights([(f"{name}.weight", weight)], strict=False)

    def adapter(self, where: str = "head") -> None:
        import mlx.core as mx
        from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

        head, stage = self.parts()
        parent, name = (head, "lm_head") if head is not None else (stage, "embed_tokens")
        if where == "embedding":
            parent, name = stage, "embed_tokens"
        if where == "layer":
            parent, name = stage.layers[-1].self_attn, "o_proj"
        module = getattr(parent, name)
        if where == "wrapped head" and name == "lm_head":
            parent[name] = Scaled(module)
        else:
            kind = LoRAEmbedding if name == "embed_tokens" else LoRALinear
            adapted = kind.from_base(module, r=4, scale=10.0)
            adapted.lora_b = 0.1 * mx.random.normal(adapted.lora_b.shape, key=mx.random.key(3))
            setattr(parent, name, adapted)
        mx.random.seed(9)


class Processor:
    """A logits processor that goes by calls and tokens, not by the values of logits."""

    def __init__(self, name: str, at: int = 0, error: str = "") -> None:
        self.name, self.at, self.error = name, at, error
        self.calls = self.state = 0
        self.done = False

    def __call__(self, tokens: Any, logits: Any) -> Any:
        import mlx.core as mx

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
        if self.name == "raises" and self.calls == self.at + 1:
            raise ERRORS[self.error](f"planned, call {self.at}")
        return logits


def Scaled(inner: Any) -> Any:
    """A head in another one's clothes: no `weight`."""
    import mlx.nn as nn

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def __call__(self, x: Any) -> Any:
            return self.inner(x) * 1.5

    return Scaled()


def _number(offset: Any) -> Any:
    return offset.tolist() if hasattr(offset, "tolist") else offset


def do(lab: Lab, program: Program) -> dict[str, Any]:
    """Both ways of `program` on this rank: what each saw, if they differ."""
    import mlx.core as mx

    import mlx_lm_skiphead

    ways = program.get("ways", BOTH)
    lab.at("prepare")
    cases = {s["draft"] for s in program["steps"] if "draft" in s}
    for case in {program["case"] if c == "same" else c for c in cases}:
        if case not in lab.drafts:
            lab.drafts[case] = tiny_models.make(case)
    seen, tokens, not_computed = [], 0, 0
    for way in ways:
        lab.at(way, "begin")
        if way == "plugin":
            mlx_lm_skiphead.install(program.get("mode", "on"))
        else:
            mlx_lm_skiphead.uninstall()
        session = Session(lab, program)
        if program.get("thread"):
            lab.pool.submit(session.run, way).result()
        else:
            session.run(way)
        seen.append(session.seen)
        tokens += session.tokens
        not_computed += session.not_computed
        del session
        lab.at(way, "barrier")
        lab.barrier()
    mx.clear_cache()
    unplanned = [s for s in seen[ways.index("unpatched")] if s.startswith("('error'")]
    unplanned = [s for s in unplanned if "planned" not in s]
    told = {"same": seen[0] == seen[1], "seen": seen if seen[0] != seen[1] else unplanned}
    return {**told, "tokens": tokens, "not computed": not_computed}


def rank(folder: Path) -> None:
    """Does the programs that the parent writes, one after another."""
    import tiny_checkpoint
    from mlx_lm.utils import load_tokenizer

    lab = Lab(folder)
    stacks = open(folder / f"stacks-{lab.rank}", "w")
    faulthandler.register(signal.SIGUSR1, stacks)
    folder_of = lab.checkpoint("qwen2", {})
    lab.tokenizer = load_tokenizer(folder_of, eos_token_ids=tiny_checkpoint.END_ID)
    number = 0
    while True:
        file = folder / f"{number}.json"
        begun = time.monotonic()
        while not file.exists():
            time.sleep(0.001)
            if time.monotonic() - begun > 900 or not folder.exists():
                os._exit(1)
        program = json.loads(file.read_text())
        if program is None:
            os._exit(0)
        try:
            result = do(lab, program)
        except BaseException as error:
            import traceback

            result = {"same": False, "seen": [[repr(error), traceback.format_exc()], []]}
        part = folder / f"{number}-{lab.rank}.part"
        part.write_text(json.dumps(result))
        part.rename(part.with_suffix(".json"))
        number += 1


# --- the parent


class Launch:
    """Ranks that stay up."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.number = 0
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.output = "?"
        self.thread = threading.Thread(target=self._launch, daemon=True)
        self.thread.start()

    def _launch(self) -> None:
        args = ("--as-rank", str(self.folder))
        done = ranks.launch(__file__, *args, ranks=self.count, timeout=3600, check=False)
        self.output = done.stderr[-3000:]

    def do(self, program: Program, limit: float) -> list[Any] | str:
        """What each rank says of `program`; or where they all are, if they stand still."""
        part = self.folder / "program.part"
        part.write_text(json.dumps(program))
        part.rename(self.folder / f"{self.number}.json")
        files = [self.folder / f"{self.number}-{r}.json" for r in range(self.count)]
        limit = time.monotonic() + limit + (30 if self.number == 0 else 0)
        self.number += 1
        while not all(file.exists() for file in files):
            if time.monotonic() > limit or not self.thread.is_alive():
                return self._give_up()
            time.sleep(0.002)
        results = [json.loads(file.read_text()) for file in files]
        for file in files:
            file.unlink()
        return results

    def _give_up(self) -> str:
        told = ["they ended" if not self.thread.is_alive() else "they stand still"]
        for r in range(self.count):
            with contextlib.suppress(OSError, ValueError):
                pid, _, where = (self.folder / f"at-{r}").read_text().partition(" ")
                told.append(f"rank {r}: {where.strip()}")
                os.kill(int(pid), signal.SIGUSR1)
                time.sleep(0.3)
                stack = (self.folder / f"stacks-{r}").read_text().splitlines()
                told += [
                    f"    {line.strip()}"
                    for line in stack[:40]
                    if "tests" in line or "skiph" in line or "mlx_lm" in line
                ]
                os.kill(int(pid), signal.SIGKILL)
        self.thread.join()
        return "\n".join([*told, *self.output.splitlines()[-15:]])

    def end(self) -> None:
        if self.thread.is_alive():
            part = self.folder / "program.part"
            part.write_text("null")
            part.rename(self.folder / f"{self.number}.json")
            self.thread.join(10)
            if self.thread.is_alive():
                self._give_up()
        shutil.rmtree(self.folder, ignore_errors=True)


class Fuzzer:
    """Does programs, starts ranks anew where it must, and makes programs that differ smaller."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.launch: Launch | None = None
        self.block: Any = None

    def do(self, program: Program, limit: float | None = None) -> list[Any] | str:
        if self.launch is None or self.launch.count != program["ranks"]:
            self.end()
            self.launch = Launch(program["ranks"])
        told = self.launch.do(program, limit or self.limit)
        if isinstance(told, str):
            self.end()
        return told

    def end(self) -> None:
        if self.launch is not None:
            self.launch.end()
        self.launch = None

    def minimised(self, program: Program, seconds: float = 240) -> Program:
        """The program with as much left out as still differs in this way."""
        until = time.monotonic() + seconds
        stands_still = isinstance(self.do(program), str)
        found = True
        while found and time.monotonic() < until:
            found = False
            for smaller in leave_outs(program):
                if time.monotonic() > until:
                    break
                told = self.do(smaller, min(self.limit, 15))
                same_kind = isinstance(told, str) == stands_still
                if differs(told) and same_kind and not self.fails_itself(smaller):
                    program, found = smaller, True
                    break
        return program

    def fails_itself(self, program: Program) -> bool:
        """Whether unpatched stands still too, or differs from itself."""
        return differs(self.do({**program, "ways": ["unpatched", "unpatched"]}))


def leave_outs(program: Program) -> Any:
    """The program with one thing less, for each of its things."""
    steps = program["steps"]
    for i in reversed(range(len(steps))):
        yield {**program, "steps": steps[:i] + steps[i + 1 :]}
    for name in ("thread", "mode", "source", "first_layers", "heads", "ways"):
        if name in program:
            yield {k: v for k, v in program.items() if k != name}
    for i, step in enumerate(steps):
        for name in step:
            if name not in ("op", "draft"):
                less = {k: v for k, v in step.items() if k != name}
                yield {**program, "steps": [*steps[:i], less, *steps[i + 1 :]]}


def differs(told: list[Any] | str) -> bool:
    return isinstance(told, str) or not all(result["same"] for result in told)


def difference(told: list[Any] | str, ways: list[str]) -> str:
    """The first thing in which each rank differs."""
    if isinstance(told, str):
        return told
    lines = []
    for r, result in enumerate(told):
        if result["same"]:
            continue
        one, two = result["seen"]
        at = next(
            (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b),
            min(len(one), len(two)),
        )
        step = next((s for s in reversed(one[: at + 1]) if s.startswith("('step'")), "")
        lines += [f"rank {r}, in {step}:"]
        lines += [
            f"  {way}: {' '.join(seen[at : at + 2])[:3000]}"
            for way, seen in zip(ways, (one, two), strict=True)
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--programs", type=int, default=10**9, help="at most so many")
    parser.add_argument("--ranks", type=int, help="for all programs; else two or three by the seed")
    parser.add_argument("--only", type=int, help="the program of this seed")
    parser.add_argument("--program", help="this one, a Python literal")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a program")
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if args.as_rank:
        rank(Path(args.as_rank))
    seeds = range(args.seed, args.seed + args.programs)
    if args.only is not None:
        seeds = range(args.only, args.only + 1)
    programs = (random_program(seed, args.ranks) for seed in seeds)
    if args.program:
        programs = iter([ast.literal_eval(args.program)])
    fuzzer, counts, begun = Fuzzer(args.limit), collections.Counter(), time.monotonic()
    steps: collections.Counter[str] = collections.Counter()
    errors: collections.Counter[str] = collections.Counter()
    first = last = None
    atexit.register(fuzzer.end)
    for number, program in enumerate(programs):
        if time.monotonic() - begun > 60 * args.minutes:
            break
        if number % BLOCK == 0:
            fuzzer.end()
        told = fuzzer.do(program)
        last = program.get("seed")
        first = last if first is None else first
        counts["programs"] += 1
        steps.update(step["op"] for step in program["steps"])
        if not differs(told):
            assert not isinstance(told, str)
            counts["unpatched fails, and the plugin alike"] += bool(told[0]["seen"])
            errors.update(told[0]["seen"])
            for name in ("tokens", "not computed"):
                counts[name] += told[-1][name]
            if args.only is not None or args.program:
                print(program, told)
            continue
        if fuzzer.fails_itself(program):
            counts["unpatched differs from itself, or stands still"] += 1
            print(f"unpatched fails: seed {last}\n{difference(told, BOTH)}\n", flush=True)
            continue
        counts["differences"] += 1
        print(
            f"DIFFERENCE: seed {last}",
            difference(told, program.get("ways", BOTH)),
            sep="\n",
            flush=True,
        )
        small = fuzzer.minimised(program)
        again = fuzzer.do(small)
        print(difference(again, small.get("ways", BOTH)) if differs(again) else "not again")
        print(f"python tests/fuzz.py --program {str(small)!r}\n", flush=True)
    fuzzer.end()
    seconds = time.monotonic() - begun
    print(f"seeds {first} to {last} in {seconds:.0f} s: {dict(counts)}")
    print(f"steps: {dict(steps)}\nerrors of upstream's: {dict(errors)}")
    sys.exit(1 if counts["differences"] else 0)


if __name__ == "__main__":
    main()
