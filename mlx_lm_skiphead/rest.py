"""Where ranks share the cores of a machine: a worker that waits for rank 0 leaves it a core.

MLX's ring backend waits actively. A worker with no head to run would wait for rank 0's token
instead, and keep its core as busy as the head did: nothing is gained where rank 0 needs that core.
So it sleeps through a part of the wait, and only then joins in the token share.

Only with CPUs, and with more ranks than cores on one machine (`crowded`). Where each rank has a
core of its own an active wait costs nothing, and over a slow link a worker that joins in late
would hold up what it is to pass on.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections import deque
from pathlib import Path

import mlx.core as mx

PART = 0.75
"""Of the shortest of the last waits, how much is slept through."""

MARGIN = 0.003
"""Seconds less than that, for what wakes up late and for the next step, which is to be built."""

SHORTEST = 0.005
"""Seconds under which it is not worth it."""

WAITS = 8
"""So many of the last waits count, and half as many must be known."""

AT_ONCE = 0.0002
"""Seconds in which an array that has been computed is there."""


class Rest:
    """The waits of one worker, from its send to rank 0's token."""

    def __init__(self) -> None:
        self._waits: deque[float] = deque(maxlen=WAITS)
        self._sent_at: float | None = None

    def take(self, last: mx.array | None, sent: mx.array) -> None:
        """Sleep, where the next share is to be waited for. Evaluates what it is given.

        Args:
            last: the token share of the step before; None if there was none, or one of another
                size, whose waits say nothing.
            sent: what this step's share waits for.
        """
        if last is None or self._sent_at is None:
            self._waits.clear()
        else:
            begin = time.monotonic()
            mx.eval(last)
            end = time.monotonic()
            if end - begin > AT_ONCE:
                self._waits.append(end - self._sent_at)
            elif self._waits:
                # It slept for too long, or the caller took its time: how long is not known.
                self._waits.append(min(self._waits) / 2)
        mx.eval(sent)
        self._sent_at = time.monotonic()
        if len(self._waits) >= WAITS // 2:
            seconds = PART * min(self._waits) - MARGIN
            if seconds > SHORTEST:
                time.sleep(seconds)


def rest() -> Rest | None:
    """For a loop on a worker; None where it is not to rest."""
    return Rest() if mx.default_device() == mx.cpu and crowded() else None


@functools.cache
def crowded() -> bool:
    """Whether all ranks of the ring are on this machine and are more than its cores."""
    try:
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text())
        addresses = [address.rpartition(":")[0] for rank in hosts for address in rank]
    except (KeyError, OSError, ValueError, TypeError, AttributeError):
        return False  # another backend, or another format
    return len(set(addresses)) == 1 and len(hosts) > (os.cpu_count() or 1)
