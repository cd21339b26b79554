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
from dataclasses import dataclass, field

from .. import config

log = logging.getLogger("mlx_lm_skiphead")

CAUSES = (
    "usually another rank has ended or is stopped, a link is down, a rank is slow, or "
    "mlx-lm-skiphead is off on one (after pipeline() ranks are not compared as in sharded_load)"
)


@dataclass
class _Step:
    """What a thread waits for, since the last thing that has happened in it."""

    describe: Callable[[float], str]
    """Says of the seconds since then who waits, and for what."""
    is_slow: bool
    """Whether it may well take long; then stacks wait for three times the time."""
    is_programs: bool
    """Whether it is the program that runs, and no rank that is waited for. It has no deadline."""
    began: float = field(default_factory=time.monotonic)
    told: str = ""
    has_stacks: bool = False


_innermost: dict[int, _Step | None] = {}
"""By thread, the step that it is in; not those around it."""


def under_way() -> list[str]:
    """What this process has under way, one line a thread."""
    now = time.monotonic()
    return [step.describe(now - step.began) for step in list(_innermost.values()) if step]


@contextmanager
def watched(
    describe: Callable[[float], str], is_slow: bool = True, is_programs: bool = False
) -> Iterator[None]:
    """The ``with`` block is a step. The step around it begins anew behind it.

    Args:
        describe, is_slow, is_programs: as in `_Step`.
    """
    goes_on()
    thread = threading.get_ident()
    around = _innermost.get(thread)
    _innermost[thread] = _Step(describe, is_slow, is_programs)
    if config.watch or config.deadline:
        _start()
    try:
        yield
    finally:
        goes_on()
        _innermost[thread] = around
        goes_on()


def goes_on() -> None:
    """Something has happened in the step of this thread, if it is in one: its time begins anew."""
    thread = threading.get_ident()
    if step := _innermost.get(thread):
        if step.told:
            log.warning("%s: went on after %.0f s", step.told, time.monotonic() - step.began)
        _innermost[thread] = _Step(step.describe, step.is_slow, step.is_programs)


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
    for step in filter(None, list(_innermost.values())):
        step.began = min(now, step.began + late)
        seconds = now - step.began
        if 0 < config.deadline < seconds and not step.is_programs:
            end = f"{step.describe(seconds)}; {config.DEADLINE}={config.deadline:g} is over"
            with suppress(Exception):
                print(f"mlx-lm-skiphead: {end}, exit code 75", file=sys.stderr, flush=True)
            # At once, whatever threads wait for: so a launcher ends the other ranks. EX_TEMPFAIL.
            os._exit(75)
        limit = config.watch * (3 if step.told else 1)
        if 0 < limit < seconds and not step.has_stacks:
            step.has_stacks = bool(step.told) or not step.is_slow
            step.told = step.describe(seconds)
            causes = "" if step.is_programs else f"; {CAUSES}"
            stacks = "; the stacks of all threads follow" if step.has_stacks else ""
            log.warning("%s%s%s", step.told, causes, stacks)
            if step.has_stacks:
                with suppress(io.UnsupportedOperation, AttributeError, ValueError):
                    faulthandler.dump_traceback()
