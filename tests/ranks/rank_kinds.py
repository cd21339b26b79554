"""Run by test_kinds.py as a rank: kinds of programs that do more while they sample than to sample.

A program is a function below; `kind` names the loops of mlx-lm, and the other choices, in which it
is done. It gives what a user sees of it on this rank, and with the plugin that must be what it is
without it. What unpatched cannot be asked, since it stands still, is `alone_with_the_plugin`: such
a program gives what was seen and what ought to be.

Its arguments are names of programs; without any, all are done.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time

import mlx.core as mx
import ranks
from programs import (  # noqa: F401
    closures,
    collectives,
    failures,
    generations,
    samplers,
    second_models,
    threads,
)
from programs.common import MODE, RANK, rest
from programs.processors import NORM_SAW_NAN
from programs.prompts import DIFFERENT
from programs.registry import ALONE, BY_VALUE, PROGRAMS

STUCK = 30  # seconds after which a program that has not ended says where it is, and ends


def run():
    logged = []

    class Handler(logging.Handler):
        def emit(self, record):
            logged.append(record.getMessage())

    logging.getLogger("mlx_lm_skiphead").addHandler(Handler(logging.WARNING))
    programs = PROGRAMS | BY_VALUE | (ALONE if MODE != "off" else {})
    names = sys.argv[1:] or [*programs]
    told, warnings, seconds = {}, {}, {}
    rest()
    for name in names:
        faulthandler.dump_traceback_later(STUCK, exit=True)
        print(RANK, name, file=sys.stderr, flush=True)
        mx.random.seed(7)
        begun = time.monotonic()
        try:
            told[name] = programs[name]()
        except BaseException as error:
            told[name] = f"{type(error).__name__}: {error}"
            print(told[name], file=sys.stderr, flush=True)
        rest()
        seconds[name] = round(time.monotonic() - begun, 2)
        warnings[name] = [*logged]
        logged.clear()
    faulthandler.cancel_dump_traceback_later()
    ranks.report(
        {
            "programs": told,
            "alone": [*ALONE],
            "by value": [*BY_VALUE],
            "warnings": warnings,
            "different": DIFFERENT,
            "norm saw NaN": NORM_SAW_NAN,
            "seconds": seconds,
        }
    )


run()

os._exit(0)  # MLX may abort at the exit of a process in which a thread has computed
