"""``python tests/ranks/run.py NAME [-n 2]``: programs on real ranks by hand, both ways.

Runs all whose names have NAME in them, unpatched and with the plugin, and prints for each rank what
it saw and whether that is right, then what it wrote to its outputs. ``--list`` prints the names.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ranks
from programs.judging import SCRIPT, WAYS, problems


def listed(part: str) -> int:
    """Prints names, under their story and the reports that it comes from."""
    programs = [p for p in ranks.alone(SCRIPT, "--list").results[0] if part in p[0]]
    for (story, reports), group in itertools.groupby(programs, key=lambda p: (p[1], p[2])):
        print(f"{story} ({', '.join(reports)})" if reports else story)
        print(*[f"    {name}" for name, *_ in group], sep="\n")
    return 0


def launched(way: str, part: str, count: int, folder: Path, timeout: float) -> list[Any]:
    """What the ranks report, with their outputs in files of `folder`."""
    env = {**WAYS[way], "RANK_OUTPUT": str(folder)}
    try:
        launch = ranks.launch(SCRIPT, part, ranks=count, env=env, timeout=timeout, check=False)
        return launch.results
    except ranks.RanksTimeout as error:
        print(f"{way}: {str(error).splitlines()[0]}")
        return [None] * count


def run(part: str, count: int, timeout: float) -> int:
    """Runs and prints; 1 if something is not right."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folders = {way: Path(name, way) for way in WAYS}
        running = {}
        for way, folder in folders.items():
            folder.mkdir()
            running[way] = pool.submit(launched, way, part, count, folder, timeout)
        is_right = compared(count, **{way: launch.result() for way, launch in running.items()})
        for way, folder in folders.items():
            for file in sorted(folder.iterdir()):
                print(f"\n--- output of rank {file.name}, {way}")
                print(file.read_text(errors="replace").rstrip())
    return 0 if is_right else 1


def compared(count: int, unpatched: list[Any], plugin: list[Any]) -> bool:
    """Prints what each rank saw both ways, by program; whether all of it is right."""
    if None in unpatched or None in plugin:
        for way, reports in zip(WAYS, (unpatched, plugin), strict=True):
            silent = [rank for rank, report in enumerate(reports) if report is None]
            print(f"{way}: no report of ranks {silent}")
        return False
    wrong = []
    for name, judged in plugin[0]["judged"].items():
        print(f"\n{name} ({judged})")
        for rank, both in enumerate(zip(unpatched, plugin, strict=True)):
            right, seen = (report["programs"].get(name, "not run") for report in both)
            if seen == right:
                print(f"  rank {rank}, both ways: {seen}")
            else:
                print(f"  rank {rank}, unpatched: {right}\n  rank {rank}, plugin:    {seen}")
        found = [*problems(name, unpatched, plugin)]
        print(*[f"  WRONG: {problem}" for problem in found] or ["  right on all ranks"], sep="\n")
        wrong += found
    if not plugin[0]["judged"]:
        print("No program has that in its name: --list prints them.")
    return bool(plugin[0]["judged"]) and not wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="", help="a name, or a part of names")
    parser.add_argument("-n", dest="count", type=int, default=2, help="how many ranks (2)")
    parser.add_argument("--list", action="store_true", help="print names and stories, run nothing")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each way (120)")
    given = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not given.list and not given.name:
        parser.error("a NAME, or --list")
    sys.exit(listed(given.name) if given.list else run(given.name, given.count, given.timeout))
