"""Measures the links between ranks without a model: what a step sends, and each link alone.

In a step of a pipeline, hidden states go from rank to rank down to rank 0. Then comes the token
share, a small ``all_gather``. Data is compared with what was sent, since a broken link may change
it.
"""

from __future__ import annotations

import inspect
import statistics
import time
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx

from ..ranks import watch

ROUNDS = 10
"""How often each of the shorter rows is shared."""

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
    """Measure the links between all ranks. All must call this. Where nothing moves any more, each
    rank says what it waits for (see ranks/watch.py).

    Returns:
        ``steps``: how many steps of a pipeline the ranks took, without a model. ``step_ms``,
        ``highest_step_ms``: the time of a step, median and highest without the first ones.
        ``garbled``: the first data that did not arrive as sent, a line or "". ``links``: see
        `each_link`.
    """
    with mx.stream(mx.cpu):
        return {**_steps(group), "links": each_link(group)}


def _waits(group: mx.distributed.Group, what: str) -> AbstractContextManager[None]:
    here = f"rank {group.rank()}, links"
    return watch.watched(lambda seconds: f"{here}: has waited {seconds:.0f} s for {what}")


def each_link(group: mx.distributed.Group) -> list[dict[str, Any]]:
    """Measure one link after the other, on the stream of the CPU. All ranks must call this.

    Returns:
        ``between``: two ranks. ``latency_ms``: half the time of a round trip, median.
        ``there_mb_s``, ``back_mb_s``: MB per second each way.
    """
    rank, last = group.rank(), group.size() - 1
    found = []
    for pair in [*((r, r + 1) for r in range(last)), *([(0, last)] if last > 1 else [])]:
        with _waits(group, f"the link between ranks {pair[0]} and {pair[1]}"):
            found.append({"between": pair, **_one_link(rank, pair)})
    return found


def _one_link(rank: int, pair: tuple[int, int]) -> dict[str, float]:
    trips = [_exchange(rank, pair, 1, 1) for _ in range(PINGS)]
    trip, trial = _sum([statistics.median(trips), _exchange(rank, pair, TRIAL, 1)])
    # As long as it takes for its throughput to count; the same on both ranks.
    size = int(min(MOST, TRIAL * max(1.0, LONG_ENOUGH / max(trial - trip, 1e-5))))
    # The best of three: a pause of the machine makes one of them look slow.
    there = min(_exchange(rank, pair, size, 1) for _ in range(3))
    back = min(_exchange(rank, pair, 1, size) for _ in range(3))
    there, back = (size / max(s - trip, s / 2) / 1e6 for s in _sum([there, back]))
    return {"latency_ms": 500 * trip, "there_mb_s": there, "back_mb_s": back}


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


def _steps(group: mx.distributed.Group) -> dict[str, Any]:
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
            with _waits(group, f"what rank {rank + 1} sends in step {number}"):
                hidden = _receive(sent, rank + 1)
        mine = rows[rank : rank + 1]
        if rank > 0:
            mine = mx.depends(mine, mx.distributed.send(hidden, rank - 1))
        with _waits(group, f"the share of step {number}, {length} bytes of each rank"):
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
