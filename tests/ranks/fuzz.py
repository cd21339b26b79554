"""A differential fuzzer: random programs on real ranks, unpatched and with the plugin in turn.

A seed gives a program: a model and a list of steps (`random_program`). Ranks that stay up do each
program both ways, in the same processes, from the same random state and with fresh objects, and
each compares what it saw (`Session.see`): tokens, drafts, texts, stop reasons, errors and when
they come, random numbers, prompt caches, and on rank 0 logprobs. A program that differs, or that
stands still, is done again on fresh ranks: alone, or else after those before it. One that does not
come again is counted apart, and so is one in which unpatched differs from itself. Another is made
smaller by leaving things out, and printed with the command that does it again.

    python tests/ranks/fuzz.py --minutes 60
    python tests/ranks/fuzz.py --only 1234
    python tests/ranks/fuzz.py --program '{"ranks": 2, "case": "qwen2-tied", "steps": [...]}'

Left out, as README.md says that they differ: what decides by values of logits on workers. Left out
since unpatched stands still or differs from itself: lazy collectives in speculation or two of them
in a step, lazy second models, and by turns of threads all but `generate_step` without random
numbers. Left out since no worker can know it: a collective behind a call that raises, in one step.
Left out since README.md says so: a cache that is quantized in the step in which a processor raises.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ranks
import tiny_models

Program = dict[str, Any]
Step = dict[str, Any]
Told = list[Any] | str

BLOCK = 128  # seeds that share their ranks and few cases, so that models are built once
BOTH = ["unpatched", "plugin"]
DENSE = ["qwen2-tied", "qwen2-untied", "ministral3-tied", "ministral3-untied"]
ERRORS = ["Planned", "PlannedStop", "SystemExit", "StopIteration", "ValueError"]
PLACES = [
    *("eval", "async_eval", "all_gather", "all_sum"),
    *("generate_step", "speculative_generate_step", "batch", "model", "stage"),
]
"""What other packages wrap, for `Session.wrap`."""
SCRIPT = Path(__file__).with_name("rank_fuzz.py")
CHANGING = ("dtype", "adapter", "quantize", "new_head")


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
    if rng.random() < 0.2 and program.get("source") != "sharded" and "_" not in case:
        program["first_layers"] = rng.choice([1, 2])  # of the last rank; rank 0 has what is left
    if rng.random() < 0.3:
        program["ways"] = BOTH[::-1]
    if rng.random() < 0.15:
        program["thread"] = True
    if rng.random() < 0.1:
        program["mode"] = "hidden"
    if case.startswith("qwen2") and rng.random() < 0.3:
        program["heads"] = 2  # attention heads wide enough for quantized caches
    if rng.random() < 0.4:
        program["together"] = True  # samplers and processors talk to other ranks, and none raises
    if rng.random() < 0.06:  # every step is asked for in another thread
        case = rng.choice(["qwen2-tied", "qwen2-untied"])
        program = {"seed": seed, "ranks": program["ranks"], "case": case, "turns": True}
    kinds = {
        "generate": 6, "speculate": 2, "resume": 2, "insert": 3, "next": 4, "remove": 1,
        "close": 1, "own": 2, "direct": 1, "draw": 1, "seed": 0.5, "store": 0.7, "trim": 0.5,
        "look": 0.2, "save": 0.1, "wrap": 1, "unwrap": 0.7, "change": 0.5,
    }  # fmt: skip
    if case in DENSE and rng.random() < 0.4:
        kinds |= {"dtype": 1, "adapter": 2, "quantize": 0.5, "new_head": 0.7}
    if rng.random() < 0.4:  # a program of batches
        kinds |= {"insert": 9, "next": 14, "remove": 4, "close": 2}
    if rng.random() < 0.2:  # one in which other packages come and go
        kinds |= {"wrap": 6, "unwrap": 4}
    if "turns" in program:
        kinds = {"generate": 5, "wrap": 1, "unwrap": 1}
    names = rng.choices(list(kinds), list(kinds.values()), k=rng.randint(1, 7))
    program["steps"] = [{"op": name, **_options(name, rng, program)} for name in names]
    return program


def write(file: Path, value: Any) -> None:
    """For the other side to read: all of it, or nothing yet."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(file)


def _options(name: str, rng: random.Random, program: Program) -> Step:
    """Options of a step; those that are left out have a default."""

    def maybe(chance: float, **options: Any) -> Step:
        return {k: v() for k, v in options.items()} if rng.random() < chance else {}

    def prompt() -> list[int]:  # where it begins, and how many tokens
        return [rng.randrange(256), rng.choice([1, 1, 2, 5, 9, 17, 40])]

    second = ["pipelined", "sharded", "whole"] + ["stage"] * (program["case"] in DENSE)
    # Two in one graph have no order: only where there is one sequence, and one of them.
    lazy = ["eager", "eager"] + ["lazy"] * (name == "generate")

    def together(*more: list[Any]) -> list[Any]:
        return rng.choice([["second", rng.choice(second)], ["waits"], *more])

    def sampler(strict: bool = True, forced: bool = True, own: bool = False) -> list[Any]:
        by_shape = ["shape", rng.choice([0, 3])]
        if "turns" in program:
            return rng.choice([["by turns"], by_shape, ["broadcast", "eager"], ["waits"]])
        if "together" in program and rng.random() < 0.4:
            return together(["broadcast", rng.choice(lazy)])
        return rng.choice(
            [
                ["temperature", {"temp": rng.choice([0.3, 0.8, 1.5])}],
                ["temperature", {"temp": 0.9, "min_p": 0.05}],
                ["temperature", {"temp": 0.9, "top_p": 0.9, "top_k": 20}],
                ["temperature", {"temp": 0.9, "xtc_probability": 0.5, "xtc_threshold": 0.05}],
                ["own key", rng.randrange(100)],
                ["numpy", rng.randrange(100)],
                ["numpy choice" if strict else "numpy", rng.randrange(100)],
                # Elsewhere unpatched is wrong with ids that do not come from logits.
                ["forced" if strict and forced else "by turns"],
                ["by turns"],
                *([] if own else [by_shape]),  # `share_tokens` wants one shape on all ranks
                *([] if "together" in program else [raises()]),
            ]
        )

    def raises() -> list[Any]:
        return ["raises", rng.randrange(8), rng.choice(ERRORS)]

    def in_batch() -> list[Any]:
        return sampler(forced=False)

    def processor() -> list[Any]:
        reader = ["reader", rng.randrange(1, 8), rng.choice(["memoryview", "frombuffer"])]
        if "turns" in program:
            return rng.choice([["calls"], ["automaton"], reader, ["sum", "eager"], ["waits"]])
        if "together" in program and rng.random() < 0.4:
            return together(["sum", "eager"])
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
                reader,
                *([] if "together" in program else [raises()]),
            ]
        )

    def processors() -> list[Any]:
        if lazy[-1] == "lazy" and "together" in program and rng.random() < 0.1:
            return [["sum", "lazy"]]
        return [processor() for _ in range(rng.choice([1, 1, 2]))]

    def change() -> Step:
        return {"how": rng.choice(["clear", "extend", "swap"]), "to": processors()}

    slot = maybe(0.35, cache=lambda: rng.choice("ab"))
    other = maybe(0.1, other=lambda: True)
    if name in ("generate", "speculate"):
        speculating = name == "speculate"
        if "turns" in program:
            return {
                "prompt": prompt(),
                "n": rng.choice([1, 2, 4, 6, 9, 12]),
                **maybe(0.6, sampler=sampler),
                **maybe(0.6, processors=processors),
            }
        options = {
            "prompt": prompt(),
            "n": rng.choice([1, 2, 4, 6, 9, 12]),
            **maybe(0.55, sampler=lambda: sampler(not speculating)),
            **maybe(0.45, processors=processors),
            **maybe(0.3, stream=lambda: True),
            **maybe(0.3, leave=lambda: rng.randrange(1, 6)),
            **maybe(0.2, keep=lambda: True),
            **maybe(0.2, draws=lambda: True),
            **maybe(0.15, change=lambda: {"at": rng.randrange(1, 6), **change()}),
            **maybe(0.05, early=lambda: True),
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
        if "raises" in repr(options):
            options.pop("kv_bits", None)
        return options
    batch = {"batch": rng.choice("xxy")}
    if name == "insert":
        many = rng.choice([1, 1, 2, 3])
        return {
            **batch,
            "prompts": [prompt() for _ in range(many)],
            "n": [rng.choice([1, 3, 6, 10]) for _ in range(many)],
            **maybe(0.5, samplers=lambda: [rng.choice([None, in_batch()]) for _ in range(many)]),
            **maybe(0.4, processors=lambda: [rng.choice([[], processors()]) for _ in range(many)]),
            # These are of the batch; they count where this step makes it.
            **maybe(0.3, sampler=in_batch),
            **maybe(0.2, max_kv_size=lambda: 16),
            **maybe(0.3, prefill_step_size=lambda: 8),
            **maybe(0.2, completion_batch_size=lambda: 2, prefill_batch_size=lambda: 1),
            **slot,
            **other,
        }
    return {
        "next": lambda: (
            {**batch, "times": rng.choice([1, 2, 5, 12])} | maybe(0.2, progress=lambda: True)
        ),
        "remove": lambda: {**batch, "which": rng.randrange(4), **slot},
        "close": lambda: batch,
        "change": lambda: {**batch, "which": rng.randrange(4), **change()},
        "wrap": lambda: {
            "place": rng.choice(PLACES),
            "who": rng.choice([[0], [0], [1], [0, 1, 2]]),
        },
        "resume": lambda: {"which": rng.randrange(3), **maybe(0.5, leave=lambda: 3)},
        "own": lambda: {
            "prompts": [[rng.randrange(256), rng.choice([1, 7, 20])]] * rng.choice([1, 1, 3]),
            "n": rng.choice([1, 4, 8]),
            **maybe(0.5, sampler=lambda: sampler(strict=False, own=True)),
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
        folder = str(self.folder)
        done = ranks.launch(SCRIPT, folder, ranks=self.count, timeout=7200, check=False)
        self.output = done.stderr[-3000:]

    def do(self, program: Program, limit: float) -> Told:
        """What each rank says of `program`; or where they all are, if they stand still."""
        write(self.folder / f"{self.number}.json", program)
        files = [self.folder / f"{self.number}-{r}.json" for r in range(self.count)]
        limit = time.monotonic() + limit + (120 if self.number == 0 else 0)
        self.number += 1
        while not all(file.exists() for file in files):
            if time.monotonic() > limit or not self.thread.is_alive():
                return self._give_up()
            time.sleep(0.002)
        return [json.loads(file.read_text()) for file in files]

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
            write(self.folder / f"{self.number}.json", None)
            self.thread.join(10)
            if self.thread.is_alive():
                self._give_up()
        shutil.rmtree(self.folder, ignore_errors=True)


class Fuzzer:
    """Does programs, starts ranks anew where it must, and makes programs that differ smaller."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.launch: Launch | None = None
        self.before: collections.deque[Program] = collections.deque(maxlen=6)
        """What these ranks did last."""
        self.counts: collections.Counter[str] = collections.Counter()
        self.steps: collections.Counter[str] = collections.Counter()
        self.failures: collections.Counter[str] = collections.Counter()

    def end(self) -> None:
        if self.launch is not None:
            self.launch.end()
        self.launch = None
        self.before.clear()

    def do(self, program: Program, limit: float | None = None) -> Told:
        if self.launch is None or self.launch.count != program["ranks"]:
            self.end()
            self.launch = Launch(program["ranks"])
        told = self.launch.do(program, limit or self.limit)
        self.before.append(program)
        if differs(told):  # what it has left in flight must not meet the next one
            self.end()
        return told

    def fails_itself(self, program: Program) -> bool:
        """Whether unpatched stands still too, or differs from itself."""
        return differs(self.do({**program, "ways": ["unpatched", "unpatched"]}))

    def judge(self, program: Program) -> None:
        """Do the program, count what became of it, and say so if it differs."""
        before = list(self.before)
        told = self.do(program)
        self.counts["programs"] += 1
        self.steps.update(step["op"] for step in program["steps"])
        if not isinstance(told, str) and not differs(told):
            self.counts["the same, an error of upstream's in it"] += bool(told[0]["failures"])
            self.failures.update(told[0]["failures"])
            self.counts.update(told[-1]["counts"])
            return
        print(f"DIFFERENCE: {program}\n{difference(told, program)}", flush=True)
        kind = type(told)  # standing still is another thing than a difference
        if self.comes([program], kind):
            if self.fails_itself(program):
                self.count("unpatched differs from itself or stands still")
                return
            program = self.minimised(program, kind)
        elif self.comes([*before, program], kind):
            # One of those before it, or all that there are, has left something to it.
            while before and self.comes([*before[1:], program], kind):
                before = before[1:]
            print("Only after:", *before, sep="\n    ", flush=True)
        else:
            self.count("differences that do not come again")
            return
        self.count("differences")
        print(f'python tests/ranks/fuzz.py --program "{program}"\n', flush=True)

    def count(self, what: str) -> None:
        self.counts[what] += 1
        print(f"Counted as: {what}", flush=True)

    def comes(self, programs: list[Program], kind: type, times: int = 3) -> bool:
        """Whether the last one differs in this way, on fresh ranks, in one of some attempts."""
        for _ in range(times):
            self.end()
            *_, told = (self.do(program) for program in programs)
            if differs(told) and isinstance(told, kind):
                return True
        return False

    def minimised(self, program: Program, kind: type, seconds: float = 300) -> Program:
        """The program with as much left out as still differs in this way."""
        until = time.monotonic() + seconds
        candidates = leave_outs(program)
        while (smaller := next(candidates, None)) and time.monotonic() < until:
            told = self.do(smaller, self.limit / 2)
            if differs(told) and isinstance(told, kind) and not self.fails_itself(smaller):
                program, candidates = smaller, leave_outs(smaller)
        print(f"Smallest:\n{difference(self.do(program), program)}")
        return program


def leave_outs(program: Program) -> Iterator[Program]:
    """The program with one thing less, for each of its things."""
    steps = program["steps"]
    for i in reversed(range(len(steps))):
        yield {**program, "steps": steps[:i] + steps[i + 1 :]}
    names = ("thread", "mode", "source", "first_layers", "heads", "ways", "turns", "together")
    for name in names:
        if name in program:
            yield {k: v for k, v in program.items() if k != name}
    for i, step in enumerate(steps):
        for name in step:
            if name not in ("op", "draft"):
                less = {k: v for k, v in step.items() if k != name}
                yield {**program, "steps": [*steps[:i], less, *steps[i + 1 :]]}


def differs(told: Told) -> bool:
    return isinstance(told, str) or any(result["differs"] for result in told)


def difference(told: Told, program: Program) -> str:
    """The first thing in which each rank differs."""
    if isinstance(told, str):
        return told
    lines = []
    for r, result in enumerate(told):
        if result["differs"]:
            pairs = list(itertools.zip_longest(*result["differs"]))
            at = next(i for i, (one, two) in enumerate(pairs) if one != two)
            step = next((s for s, _ in pairs[at::-1] if s and s.startswith("('step'")), "")
            lines.append(f"rank {r}, in {step}:")
            ways = zip(program.get("ways", BOTH), pairs[at], strict=True)
            lines += [f"  {way}: {seen}"[:2000] for way, seen in ways]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--programs", type=int, help="at most so many")
    parser.add_argument("--ranks", type=int, help="for all programs; else two or three by the seed")
    parser.add_argument("--only", type=int, help="the program of this seed")
    parser.add_argument("--program", help="this one, a Python literal")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a program")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    programs = (random_program(seed, args.ranks) for seed in itertools.count(args.seed))
    if args.only is not None:
        programs = iter([random_program(args.only, args.ranks)])
    if args.program:
        programs = itertools.repeat(ast.literal_eval(args.program), args.programs or 1)
    fuzzer, begun, number = Fuzzer(args.limit), time.monotonic(), 0
    try:
        for number, program in enumerate(itertools.islice(programs, args.programs), 1):
            fuzzer.judge(program)
            if time.monotonic() - begun > 60 * args.minutes:
                break
            if number % BLOCK == 0:
                fuzzer.end()
    finally:
        fuzzer.end()
        print(f"{number} programs, seeds from {args.seed}, {time.monotonic() - begun:.0f} s")
        for title in ("counts", "steps", "failures"):
            print(f"{title}: {dict(getattr(fuzzer, title))}")
    sys.exit(1 if fuzzer.counts["differences"] else 0)


if __name__ == "__main__":
    main()
