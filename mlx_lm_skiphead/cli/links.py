"""Measures the links between ranks without a model: what a step sends, and each link alone.

In a step of a pipeline, hidden states go from rank to rank down to rank 0. Then comes the token
share, a small ``all_gather``. Data is compared with what was sent, since a broken link may change
it.
"""

from __future__ import annotations

import inspect
import os
import statistics
import sys
import threading
import time
from typing import Any

import mlx.core as mx

ROUNDS = 10
"""How often each of the shorter rows is shared."""
STANDS_STILL = 30.0
"""Seconds without a message after which a rank prints a line and exits."""

HIDDEN = 4096
"""Numbers of 4 bytes in the hidden states of a token."""
ODD = (1, 3, 7, 17, 1001, 4097, 65537, 1048579)
"""Lengths in bytes that no number of ranks, wires or buffers divides: mlx #4443 was seen so."""
PINGS = 20
TRIAL, MOST = 1 << 14, 1 << 24
"""Bytes of the first transfer, and of the largest."""
LONG_ENOUGH = 0.05
"""Seconds that a transfer must take for its throughput to count."""


def measure(group: mx.distributed.Group) -> dict[str, Any]:
    """Measure the links between all ranks. All must call this.

    Ends the process with exit code 1, and a line on standard error, if nothing moves any more.

    Returns:
        ``steps``: how many steps of a pipeline the ranks took, without a model. ``step_ms``,
        ``highest_step_ms``: the time of a step, median and highest without the first ones.
        ``garbled``: the first data that did not arrive as sent, a line or "". ``links``: see
        `each_link`.
    """
    with Patience(group.rank()) as patience, mx.stream(mx.cpu):
        return {**_steps(group, patience), "links": each_link(group, patience)}


def each_link(group: mx.distributed.Group, patience: Patience) -> list[dict[str, Any]]:
    """Measure one link after the other, on the stream of the CPU. All ranks must call this.

    Returns:
        ``between``: two ranks. ``latency_ms``: half the time of a round trip, median.
        ``there_mb_s``, ``back_mb_s``: MB per second each way.
    """
    rank, last = group.rank(), group.size() - 1
    found = []
    for pair in [*((r, r + 1) for r in range(last)), *([(0, last)] if last > 1 else [])]:
        patience.waits_for(f"the link between ranks {pair[0]} and {pair[1]}")
        trips = [_exchange(rank, pair, 1, 1) for _ in range(PINGS)]
        trip, trial = _sum([statistics.median(trips), _exchange(rank, pair, TRIAL, 1)])
        # As long as it takes for its throughput to count; the same on both ranks.
        size = int(min(MOST, TRIAL * max(1.0, LONG_ENOUGH / max(trial - trip, 1e-5))))
        # The best of three: a pause of the machine makes one of them look slow.
        there = min(_exchange(rank, pair, size, 1) for _ in range(3))
        back = min(_exchange(rank, pair, 1, size) for _ in range(3))
        there, back = (size / max(s - trip, s / 2) / 1e6 for s in _sum([there, back]))
        speeds = {"there_mb_s": there, "back_mb_s": back}
        found.append({"between": pair, "latency_ms": 500 * trip, **speeds})
    return found


def _exchange(rank: int, pair: tuple[int, int], there: int, back: int) -> float:
    """The first of a pair of ranks sends some bytes, and the second one sends some back.

    Returns:
        The seconds that this takes, on the first one; 0 on all others.
    """
    data = mx.zeros(there, mx.uint8), mx.zeros(back, mx.uint8)
    mx.eval(data)
    start = time.perf_counter()
    if rank == pair[0]:
        mx.eval(mx.distributed.send(data[0], pair[1]))
        _receive(data[1], pair[1])
        return time.perf_counter() - start
    if rank == pair[1]:
        _receive(data[0], pair[0])
        mx.eval(mx.distributed.send(data[1], pair[0]))
    return 0.0


def _sum(mine: list[float]) -> list[float]:
    """The sums of all ranks' numbers."""
    total: Any = inspect.unwrap(mx.distributed.all_sum)(mx.array(mine)).tolist()
    return list(total)


def _steps(group: mx.distributed.Group, patience: Patience) -> dict[str, Any]:
    rank, last = group.rank(), group.size() - 1
    gather = inspect.unwrap(mx.distributed.all_gather)
    times: list[float] = []
    garbled = ""
    for number, length in enumerate((*ODD, *ODD[:-2] * ROUNDS)):
        hidden = sent = mx.full((1, 1, HIDDEN), number, mx.float32)
        rows = mx.stack([(mx.arange(length) * 31 + r).astype(mx.uint8) for r in range(last + 1)])
        mx.eval(sent, rows)
        start = time.perf_counter()
        if rank < last:
            patience.waits_for(f"what rank {rank + 1} sends in step {number}")
            hidden = _receive(sent, rank + 1)
        mine = rows[rank : rank + 1]
        if rank > 0:
            mine = mx.depends(mine, mx.distributed.send(hidden, rank - 1))
        patience.waits_for(f"the share of step {number}, {length} bytes of each rank")
        everyone = gather(mine)
        mx.eval(everyone)
        times.append(1000 * (time.perf_counter() - start))
        if not mx.array_equal(hidden, sent):
            garbled = f"rank {rank} got other hidden states than were sent in step {number}"
        if not mx.array_equal(everyone, rows):
            garbled = f"rank {rank} got other bytes than were shared in step {number}"
    # Rank 0, which prints the report, may itself have got what was sent.
    if _sum([float(bool(garbled))])[0] and not garbled:
        garbled = "another rank got other data than were sent"
    middle, highest = statistics.median(times), max(times[len(ODD) :])  # the first ones connect
    ms = {"step_ms": middle, "highest_step_ms": highest}
    return {"steps": len(times), **ms, "garbled": garbled}


def _receive(like: mx.array, source: int) -> mx.array:
    received = mx.distributed.recv_like(like, source)
    mx.eval(received)
    return received


class Patience:
    """Ends the process if it waits for too long; a context manager."""

    def __init__(self, rank: int) -> None:
        self._rank, self._ended = rank, threading.Event()
        self.waits_for("the other ranks")

    def waits_for(self, what: str) -> None:
        """Note what this rank waits for from now on."""
        self._what, self._since = what, time.monotonic()

    def __enter__(self) -> Patience:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _look(self) -> None:
        while not self._ended.wait(0.5):
            if time.monotonic() - self._since > STANDS_STILL:
                line = f"rank {self._rank} has waited {STANDS_STILL:.0f} s for {self._what}"
                print(f"mlx-lm-skiphead: {line}", file=sys.stderr, flush=True)
                self._ended.wait(2)  # so that the others say the same: mlx.launch ends them all
                os._exit(1)
