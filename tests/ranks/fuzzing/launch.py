"""Ranks that stay up and do programs, and what they tell."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ranks

from fuzzing import BOTH, write

SCRIPT = Path(__file__).parents[1] / "rank_fuzz.py"
STARTING = 120  # seconds that ranks have until they are up
Told = list[Any] | str
"""What each rank says of a program; or where they all are, if they stand still."""


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

    def do(self, program: dict[str, Any], limit: float) -> Told:
        """Does `program`, in so many seconds from when the ranks are up."""
        up = [self.folder / f"at-{r}" for r in range(self.count)]
        if not self.wait(up, STARTING):
            return self._give_up()
        write(self.folder / f"{self.number}.json", program)
        files = [self.folder / f"{self.number}-{r}.json" for r in range(self.count)]
        self.number += 1
        if not self.wait(files, limit):
            return self._give_up()
        return [json.loads(file.read_text()) for file in files]

    def wait(self, files: list[Path], seconds: float) -> bool:
        """Whether all files come in this time; not if the ranks have ended."""
        limit = time.monotonic() + seconds
        while not all(file.exists() for file in files):
            if time.monotonic() > limit or not self.thread.is_alive():
                return False
            time.sleep(0.002)
        return True

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


def differs(told: Told) -> bool:
    return isinstance(told, str) or any(result["differs"] for result in told)


def difference(told: Told, program: dict[str, Any]) -> str:
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
