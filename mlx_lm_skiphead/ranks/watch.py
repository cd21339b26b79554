"""A watch: where a step does not end, this rank says so once, and what it waits for.

One thread for a process looks at what is under way. It is started by the first step of a pipelined
model, and never where ``MLX_LM_SKIPHEAD_WATCH`` is ``0``. Not watched: a loop of the user's own.
"""

from __future__ import annotations

import faulthandler
import functools
import io
import logging
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


class _Step:
    def __init__(self, describe: Callable[[float], str]) -> None:
        self.describe = describe
        self.began = time.monotonic()
        self.told = ""


_under_way: set[_Step] = set()


def under_way() -> list[str]:
    """What this process has under way, one line each."""
    now = time.monotonic()
    return [step.describe(now - step.began) for step in list(_under_way)]


@contextmanager
def watched(describe: Callable[[float], str]) -> Iterator[None]:
    """The ``with`` block is a step; `describe` says of its seconds who waits, and for what."""
    step = _Step(describe)
    _under_way.add(step)
    if config.watch:
        _start()
    try:
        yield
    finally:
        _under_way.discard(step)
        if step.told:
            log.warning("%s: went on after %.0f s", step.told, time.monotonic() - step.began)


@functools.cache
def _start() -> None:
    threading.Thread(target=_look, name="skiphead-watch", daemon=True).start()


def _look() -> None:
    last = time.monotonic()
    while True:
        pause = min(1.0, config.watch / 4) or 1.0  # 0: an install() without a watch has followed
        time.sleep(pause)
        now = time.monotonic()
        stopped, last = now - last - 2 * pause, now
        _tell(now, stopped if stopped > pause else 0.0)


def _tell(now: float, stopped: float) -> None:
    """A function of its own, so that no step, and with it a model, is kept until the next."""
    for step in list(_under_way):
        if stopped:  # this process itself was
            step.began += stopped
        elif 0 < config.watch < now - step.began and not step.told:
            step.told = step.describe(now - step.began)
            usual = "" if agreed else NOT_COMPARED
            usual = f"usually {usual}{CAUSES}; " if "rank" in step.told.partition(": ")[2] else ""
            log.warning("%s; %sthe stacks of all threads follow", step.told, usual)
            with suppress(io.UnsupportedOperation, AttributeError, ValueError):
                faulthandler.dump_traceback()
