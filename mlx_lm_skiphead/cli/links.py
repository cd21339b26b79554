"""Looks at the links between ranks without a model: what arrives, and how fast each link is.

In a step of a pipeline, hidden states go from rank to rank down to rank 0. Then comes the token
share, a small ``all_gather``. Such data is compared with what was sent, since a broken link, or a
broken MLX, may change it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
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
TRIAL, MOST = 1 << 14, 1 << 24
"""Bytes of the first transfer, and of the largest."""
LONG_ENOUGH = 0.05
"""Seconds that a transfer must take for its throughput to count."""
SLOW_MS, UNEVEN = 5.0, 5.0
"""A latency that no wired link has, and how many times slower than the best one a link may be."""


def measure(group: mx.distributed.Group) -> dict[str, Any]:
    """Measure the links between all ranks. All must call this. Where nothing moves any more, each
    rank says what it waits for (see ranks/watch.py).

    Returns:
        ``garbled``: data that did not arrive as sent, a line or "". ``links``: see `each_link`.
    """
    with mx.stream(mx.cpu):
        return {"garbled": _garbled(group), "links": each_link(group)}


def judge(links: list[dict[str, Any]]) -> Iterator[tuple[bool, str]]:
    """A line about each link, after whether it is slow: beside the best one, or for any wire."""
    # The faster way of each link: a machine with other work to do makes one of them look slow.
    speeds = [max(link["there_mb_s"], link["back_mb_s"]) for link in links]
    best, most = min(link["latency_ms"] for link in links), max(speeds)
    for link, speed in zip(links, speeds, strict=True):
        line = "The link between ranks {between[0]} and {between[1]} has a latency of "
        line += "{latency_ms:.2f} ms, carries {there_mb_s:.1f} MB/s there and {back_mb_s:.1f} back"
        line = line.format_map(link)
        is_late = link["latency_ms"] > min(SLOW_MS, max(UNEVEN * best, 1.0))
        if is_late or speed < most / UNEVEN:
            waits = "each token waits" if is_late else "prompts wait"
            line += f": {waits} for it, and the best have {best:.2f} ms and {most:.1f} MB/s"
        yield is_late or speed < most / UNEVEN, f"{line}."


def total(number: float = 0.0) -> float:
    """The sum of the numbers of all ranks, for all of which it waits."""
    result: Any = mx.distributed.all_sum(mx.array(float(number)), stream=mx.cpu).item()
    return float(result)


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
    def seconds(there: int, back: int, times: int) -> float:
        """The median, since a pause of the machine makes one exchange look slow."""
        return total(statistics.median(_exchange(rank, pair, there, back) for _ in range(times)))

    trip, trial = seconds(1, 1, 20), seconds(TRIAL, 1, 1)
    # As long as it takes for its throughput to count; the same on both ranks.
    size = int(min(MOST, TRIAL * max(1.0, LONG_ENOUGH / max(trial - trip, 1e-5))))
    took = seconds(size, 1, 3), seconds(1, size, 3)
    there, back = (size / max(s - trip, s / 2) / 1e6 for s in took)
    return {"latency_ms": 500 * trip, "there_mb_s": there, "back_mb_s": back}


def _exchange(rank: int, pair: tuple[int, int], there: int, back: int) -> float:
    """The first of a pair of ranks sends some bytes, and the second one sends some back.

    Returns:
        The seconds that this takes, on the first one; 0 on all others.
    """
    first, second = pair
    sent = (first, second, mx.zeros(there, mx.uint8)), (second, first, mx.zeros(back, mx.uint8))
    mx.eval([data for *_, data in sent])
    start = time.perf_counter()
    for source, target, data in sent:
        if rank == source:
            mx.eval(mx.distributed.send(data, target))
        elif rank == target:
            mx.eval(mx.distributed.recv_like(data, source))
    return time.perf_counter() - start if rank == first else 0.0


def _waits(group: mx.distributed.Group, what: str) -> AbstractContextManager[None]:
    here = f"rank {group.rank()}, links"
    return watch.watched(lambda seconds: f"{here}: has waited {seconds:.0f} s for {what}")


def _garbled(group: mx.distributed.Group) -> str:
    """What arrives otherwise than it was sent in steps of a pipeline, without a model; or ""."""
    rank, last, garbled = group.rank(), group.size() - 1, ""
    for number, length in enumerate((*ODD, *ODD[:-2] * ROUNDS)):
        hidden = sent = mx.full((1, 1, HIDDEN), number, mx.float32)
        rows = mx.stack([(mx.arange(length) * 31 + r).astype(mx.uint8) for r in range(last + 1)])
        if rank < last:
            with _waits(group, f"what rank {rank + 1} sends in step {number}"):
                hidden = mx.distributed.recv_like(sent, rank + 1)
                mx.eval(hidden)
        mine = rows[rank : rank + 1]
        if rank > 0:
            mine = mx.depends(mine, mx.distributed.send(hidden, rank - 1))
        with _waits(group, f"the share of step {number}, {length} bytes of each rank"):
            everyone = mx.distributed.all_gather(mine)
            mx.eval(everyone)
        if not (mx.array_equal(hidden, sent) and mx.array_equal(everyone, rows)):
            garbled = f"rank {rank} got other data than were sent in step {number}"
    # Rank 0, which prints the report, may itself have got what was sent.
    if total(len(garbled)) and not garbled:
        garbled = "another rank got other data than were sent"
    return garbled
