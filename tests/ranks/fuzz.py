"""A differential fuzzer: random programs on real ranks, unpatched and with the plugin in turn.

A program is a model and a list of steps. hypothesis draws it (`fuzzing.programs`). Ranks that stay
up do each program both ways, in the same processes, from the same random state and with fresh
objects, and each compares what it saw (`Session.see`): tokens, drafts, texts, stop reasons, errors
and when they come, random numbers, prompt caches, and on rank 0 logprobs. A program that differs,
or that stands still, is done again on fresh ranks: alone, or else after those before it. One that
does not come again is counted apart, and so is one in which unpatched differs from itself. Another
is shrunk by hypothesis, and printed with the command that does it again. It stays in `.hypothesis/`
and is done first the next time, until it does not differ any more.

    python tests/ranks/fuzz.py --minutes 60
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
import random
import signal
import sys
import time
import unittest
from collections.abc import Collection
from pathlib import Path

import hypothesis
from fuzzing.launch import Launch, Told, difference, differs
from fuzzing.programs import BATCHES, Program, batch_of, programs
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import NoSuchExample
from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS

FAILURES = Path(__file__).parents[2] / ".hypothesis" / "fuzz"
BATCH = 128  # programs, after which ranks start anew

# Every program is drawn on its own. hypothesis's own backend would mostly splice earlier ones.
AVAILABLE_PROVIDERS["independent"] = AVAILABLE_PROVIDERS["hypothesis"]


class Fuzzer:
    """Does programs, and starts ranks anew where it must."""

    def __init__(self, limit: float, until: float, programs: float) -> None:
        self.limit, self.until, self.programs = limit, until, programs
        self.launch: Launch | None = None
        self.before: collections.deque[Program] = collections.deque(maxlen=6)
        """What these ranks did last."""
        self.kind: type | None = None
        """How the program differs that is shrunk: standing still is another thing than a list."""
        self.known: dict[str, str] = {}
        """Programs of this search, and how they differ: hypothesis gets one answer for each."""
        self.reported: set[str] = set()
        self.counts: collections.Counter[str] = collections.Counter()
        self.steps: collections.Counter[str] = collections.Counter()
        self.failures: collections.Counter[str] = collections.Counter()

    def is_over(self) -> bool:
        return time.monotonic() > self.until or self.counts["programs"] >= self.programs

    def end(self) -> None:
        if self.launch is not None:
            self.launch.end()
        self.launch = None
        self.before.clear()

    def search(self, batch: int, seed: float, phases: Collection[hypothesis.Phase]) -> None:
        """Look for a program of this batch that differs; say the smallest."""
        self.kind, self.known = None, {}
        # As pytest's --hypothesis-seed: `find(..., random=...)` would have no database.
        hypothesis.core.global_force_seed = seed
        settings = hypothesis.settings(
            max_examples=BATCH,
            phases=phases,
            deadline=None,
            database=DirectoryBasedExampleDatabase(FAILURES),
            backend="independent",
        )
        try:
            smallest = hypothesis.find(
                programs(batch),
                self.finds,
                settings=settings,
                database_key=f"batch {batch}".encode(),
            )
        except (NoSuchExample, unittest.SkipTest):  # none, or nothing in the database
            return
        self.reported.add(repr(smallest))
        self.count("differences")
        print(f"Smallest:\n{self.known[repr(smallest)]}\n{command(smallest)}", flush=True)

    def finds(self, program: Program) -> bool:
        """Whether the program differs; while one is shrunk, whether it does so in the same way."""
        key = repr(program)
        if key in self.reported or (self.kind is None and self.is_over()):
            return False
        if key not in self.known:
            self.known[key] = self.judge(program) if self.kind is None else self.shrunk(program)
        return bool(self.known[key])

    def judge(self, program: Program) -> str:
        """Do the program and count what became of it; the difference, if it comes again alone."""
        before = list(self.before)
        told = self.do(program)
        self.counts["programs"] += 1
        self.steps.update(step["op"] for step in program["steps"])
        if not isinstance(told, str) and not differs(told):
            self.counts["the same, an error of upstream's in it"] += bool(told[0]["failures"])
            self.failures.update(told[0]["failures"])
            self.counts.update(told[-1]["counts"])
            return ""
        print(f"DIFFERENCE: {program}\n{difference(told, program)}", flush=True)
        kind = type(told)
        if self.comes([program], kind):
            if self.fails_itself(program):
                self.count("unpatched differs from itself or stands still")
                return ""
            self.kind = kind
            return difference(told, program)
        if self.comes([*before, program], kind):
            # One of those before it, or all that there are, has left something to it.
            while before and self.comes([*before[1:], program], kind):
                before = before[1:]
            print("Only after:", *before, sep="\n    ")
            self.count("differences")
            print(command(program), flush=True)
        else:
            self.count("differences that do not come again")
        return ""

    def shrunk(self, program: Program) -> str:
        """How the program differs, if it is in the same way as the one that is shrunk."""
        self.counts["tried while shrinking"] += 1
        limit = self.limit / 8  # or there would be few attempts where each stands still
        told = self.do(program, limit)
        same = differs(told) and type(told) is self.kind and not self.fails_itself(program, limit)
        return difference(told, program) if same else ""

    def do(self, program: Program, limit: float | None = None) -> Told:
        if self.launch is None or self.launch.count != program["ranks"]:
            self.end()
            self.launch = Launch(program["ranks"])
        told = self.launch.do(program, limit or self.limit)
        self.before.append(program)
        if differs(told):  # what it has left in flight must not meet the next one
            self.end()
        return told

    def fails_itself(self, program: Program, limit: float | None = None) -> bool:
        """Whether unpatched stands still too, or differs from itself."""
        return differs(self.do({**program, "ways": ["unpatched", "unpatched"]}, limit))

    def comes(self, programs: list[Program], kind: type, times: int = 3) -> bool:
        """Whether the last one differs in this way, on fresh ranks, in one of some attempts."""
        for _ in range(times):
            self.end()
            *_, told = (self.do(program) for program in programs)
            if differs(told) and isinstance(told, kind):
                return True
        return False

    def count(self, what: str) -> None:
        self.counts[what] += 1
        print(f"Counted as: {what}", flush=True)


def command(program: Program) -> str:
    return f'python tests/ranks/fuzz.py --program "{program}"\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other programs")
    parser.add_argument("--programs", type=int, help="at most so many")
    parser.add_argument("--ranks", type=int, choices=[2, 3], help="only programs with so many")
    parser.add_argument("--program", help="only this one, a Python literal")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a program")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SystemExit would be a failure
    begun = time.monotonic()
    fuzzer = Fuzzer(args.limit, begun + 60 * args.minutes, args.programs or float("inf"))
    try:
        if args.program:
            for _ in range(args.programs or 1):
                fuzzer.counts["differences"] += bool(fuzzer.judge(ast.literal_eval(args.program)))
        else:
            fuzz(fuzzer, args.seed, args.ranks)
    finally:
        fuzzer.end()
        print(f"seed {args.seed}, {time.monotonic() - begun:.0f} s")
        for title in ("counts", "steps", "failures"):
            print(f"{title}: {dict(getattr(fuzzer, title))}")
    sys.exit(1 if fuzzer.counts["differences"] else 0)


def fuzz(fuzzer: Fuzzer, seed: int, ranks: int | None) -> None:
    """Programs that differed before, and then new ones until it is over."""
    for batch in range(BATCHES):
        fuzzer.search(batch, seed, [hypothesis.Phase.reuse, hypothesis.Phase.shrink])
    rng = random.Random(seed)
    while not fuzzer.is_over():
        batch = rng.randrange(BATCHES)
        if ranks in (None, batch_of(batch)[0]):
            fuzzer.search(batch, rng.random(), [hypothesis.Phase.generate, hypothesis.Phase.shrink])
            fuzzer.end()


if __name__ == "__main__":
    main()
