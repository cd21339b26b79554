"""Run by fuzz.py as a rank: does the programs that it is given, each both ways.

Its argument is the folder by which the parent and the ranks talk.
"""

from __future__ import annotations

import collections
import faulthandler
import itertools
import json
import logging
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from fuzzing import BOTH, write
from fuzzing.lab import Lab
from fuzzing.session import Session

import mlx_lm_skiphead

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
