"""Run by test_programs.py and run.py as a rank: programs, one after another.

Its arguments are parts of their names; without any, all are run. With ``--list`` it runs none and
reports their names and stories.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
from pathlib import Path

import ranks

if folder := os.environ.get("RANK_OUTPUT"):  # a file of each rank's, for run.py
    with open(Path(folder, str(ranks.rank())), "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

import mlx.core as mx
from programs.common import MODE, RANK, rest
from programs.registry import ALONE, NOTES, PROGRAMS, all_programs

STUCK = 30  # seconds after which a program that has not ended says where it is, and ends


class Kept(logging.Handler):
    """Keeps what the plugin warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())
        print(record.getMessage(), file=sys.stderr, flush=True)


def run(programs):
    kept = Kept()
    logging.getLogger("mlx_lm_skiphead").addHandler(kept)
    told = {"programs": {}, "judged": {}, "warnings": {}, "notes": {}, "seconds": {}}
    rest()
    for name, program in programs.items():
        told["judged"][name] = program.judged
        if program.judged == ALONE and MODE == "off":
            continue
        faulthandler.dump_traceback_later(STUCK, exit=True)
        print(RANK, name, file=sys.stderr, flush=True)
        mx.random.seed(7)
        begun = time.monotonic()
        try:
            told["programs"][name] = program.run()
        except BaseException as error:
            told["programs"][name] = f"{type(error).__name__}: {error}"
            print(told["programs"][name], file=sys.stderr, flush=True)
        rest()
        told["seconds"][name] = round(time.monotonic() - begun, 2)
        told["warnings"][name], told["notes"][name] = [*kept.lines], dict(NOTES)
        kept.lines.clear()
        NOTES.clear()
    faulthandler.cancel_dump_traceback_later()
    return told


def is_meant(name, parts):
    """Whether a program is to be run: all are without `parts`, and one by its whole name alone."""
    return not parts or name in parts or any(p in name for p in parts if p not in PROGRAMS)


def main(*names):
    programs = all_programs()
    if names == ("--list",):
        ranks.report([[name, p.story, p.reports] for name, p in programs.items()])
    else:
        ranks.report(run({name: p for name, p in programs.items() if is_meant(name, names)}))
    os._exit(0)  # MLX may abort at the exit of a process in which a thread has computed


main(*sys.argv[1:])
