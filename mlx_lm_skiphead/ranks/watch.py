"""A watch: where a step does not go on, this rank says so, and what it waits for, or ends.

One thread for a process looks at what is under way. It is started by the first step of a pipelined
model, unless ``MLX_LM_SKIPHEAD_WATCH`` is ``0`` and there is no ``MLX_LM_SKIPHEAD_DEADLINE``. Not
watched: a loop of the user's own.
"""

from __future__ import annotations

import faulthandler
import functools
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .. import config

log = logging.getLogger("mlx_lm_skiphead")

agreed = False
"""Whether all ranks are known to have the plugin on: `sharded_load` has compared them, or a step
has ended."""

CAUSES = (
    "another rank has ended or is stopped, a link is down, a prompt is very long, or a rank slow"
)
NOT_COMPARED = (
    "mlx-lm-skiphead is off on another rank (this model was split by pipeline(), where ranks are "
    "not compared as in sharded_load), "
)
EXIT_CODE = 75
"""Of a process that is past the deadline: EX_TEMPFAIL, "try again later"."""


class _Step:
    """What a thread waits for, since the last thing that has happened in it.

    Attributes:
        describe: says of the seconds since then who waits, and for what.
        times: after how many times the seconds of the watch it is told of, with all stacks at last.
        is_programs: whether it is the program that runs, and no rank that is waited for.
    """

    def __init__(
        self, describe: Callable[[float], str], times: tuple[int, ...], is_programs: bool
    ) -> None:
        self.describe, self.times, self.is_programs = describe, times, is_programs
        self.told, self.began = "", 0.0
        self.goes_on()

    def goes_on(self) -> None:
        if self.told:
            log.warning("%s: went on after %.0f s", self.told, time.monotonic() - self.began)
        self.told, self.left, self.began = "", list(self.times), time.monotonic()


_innermost: dict[int, _Step] = {}
"""By thread, the step that it is in; not those around it."""


def under_way() -> list[str]:
    """What this process has under way, one line a thread."""
    now = time.monotonic()
    return [step.describe(now - step.began) for step in list(_innermost.values())]


@contextmanager
def watched(
    describe: Callable[[float], str], is_slow: bool = True, is_programs: bool = False
) -> Iterator[None]:
    """The ``with`` block is a step, and the one around it begins anew behind it.

    Args:
        describe: says of the seconds since the last thing happened who waits, and for what.
        is_slow: whether it may well take long; then stacks wait for three times the time.
        is_programs: whether the block runs a function of the program's. It has no deadline.
    """
    goes_on()
    thread = threading.get_ident()
    around = _innermost.get(thread)
    _innermost[thread] = step = _Step(describe, (1, 3) if is_slow else (1,), is_programs)
    if config.watch or config.deadline:
        _start()
    try:
        yield
    finally:
        step.goes_on()
        if around is None:
            del _innermost[thread]
        else:
            _innermost[thread] = around
            goes_on()


def goes_on() -> None:
    """Something has happened in the step of this thread, if it is in one: its time begins anew."""
    if step := _innermost.get(threading.get_ident()):
        step.goes_on()


@functools.cache
def _start() -> None:
    threading.Thread(target=_look, name="skiphead-watch", daemon=True).start()


def _look() -> None:
    last = time.monotonic()
    while True:
        # Neither: an install() without them has followed.
        pause = min(1.0, *(seconds / 4 or 1.0 for seconds in (config.watch, config.deadline)))
        time.sleep(pause)
        now = time.monotonic()
        _tell(now, now - last - pause)
        last = now


def _tell(now: float, late: float) -> None:
    """A function of its own, so that no step, and with it a model, is kept until the next look.

    Args:
        now: the time.
        late: the seconds that this process was stopped itself, or too busy to look. They do not
            count.
    """
    for step in list(_innermost.values()):
        step.began = min(now, step.began + late)
        seconds = now - step.began
        if 0 < config.deadline < seconds and not step.is_programs:
            _end(step.describe(seconds))
        if step.left and 0 < config.watch * step.left[0] < seconds:
            del step.left[0]
            step.told = step.describe(seconds)
            usual = "" if agreed else NOT_COMPARED
            usual = "" if step.is_programs else f"; usually {usual}{CAUSES}"
            stacks = "" if step.left else "; the stacks of all threads follow"
            log.warning("%s%s%s", step.told, usual, stacks)
            if stacks:
                with suppress(io.UnsupportedOperation, AttributeError, ValueError):
                    faulthandler.dump_traceback()


def _end(line: str) -> None:
    """End this process, whatever its threads wait for, so that a launcher ends the other ranks."""
    try:
        line = f"mlx-lm-skiphead: {line}; {config.DEADLINE}={config.deadline:g} is over"
        print(f"{line}, so this rank ends with exit code {EXIT_CODE}", file=sys.stderr, flush=True)
    finally:
        os._exit(EXIT_CODE)
