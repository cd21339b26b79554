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
from collections.abc import Callable
from typing import Any

import mlx.core as mx

ROUNDS = 200
SECONDS = 15.0
"""The time after which no further round begins."""
STANDS_STILL = 30.0
"""Seconds without a message after which a rank prints a line and exits."""

HIDDEN = 4096
"""Numbers of 4 bytes in the hidden states of a token."""
PINGS = 20
LEAST_BYTES, MOST_BYTES = 1 << 18, 1 << 24
LONG_ENOUGH = 0.05
"""Seconds that a transfer must take for its throughput to count."""


def measure(group: mx.distributed.Group) -> dict[str, Any]:
    """Measure the links between all ranks. All must call this.

    Ends the process with exit code 1, and a line on standard error, if nothing moves any more.

    Returns:
        ``steps``: how many steps of a pipeline the ranks took, without a model. ``step_ms``,
        ``highest_step_ms``: the time of a step, median and highest without the first one.
        ``garbled``: the first data that did not arrive as sent, a line or "". ``links``: a list of
        ``{"between", "latency_ms", "highest_ms", "there_mb_s", "back_mb_s"}``: the two ranks, half
        the time of a round trip, its highest, and MB per second each way.
    """
    with _Watch(group.rank()) as watch, mx.stream(mx.cpu):
        found = _steps(group, watch)
        pairs = [(rank, rank + 1) for rank in range(group.size() - 1)]
        if group.size() > 2:
            pairs.append((0, group.size() - 1))
        # By pair: latency, its highest, throughput there and back. One rank of each fills it in.
        numbers = []
        for pair in pairs:
            mine = [0.0] * 4
            watch.sees(f"the link between ranks {pair[0]} and {pair[1]}")
            if group.rank() == pair[0]:
                mine = _link(pair[1])
            elif group.rank() == pair[1]:
                _answer(pair[0])
            watch.sees("the end of a measurement of other ranks")
            total = inspect.unwrap(mx.distributed.all_sum)(mx.array(mine))
            numbers.append(total.tolist())
    names = ("latency_ms", "highest_ms", "there_mb_s", "back_mb_s")
    found["links"] = [
        {"between": list(pair), **dict(zip(names, values, strict=True))}
        for pair, values in zip(pairs, numbers, strict=True)
    ]
    return found


def _steps(group: mx.distributed.Group, watch: _Watch) -> dict[str, Any]:
    rank, last = group.rank(), group.size() - 1
    gather = inspect.unwrap(mx.distributed.all_gather)
    times: list[float] = []
    garbled = ""
    goes_on, begin = True, time.perf_counter()
    while goes_on:
        number, start = len(times), time.perf_counter()
        expected = mx.full((1, 1, HIDDEN), number, mx.float32)
        hidden = expected
        if rank < last:
            watch.sees(f"what rank {rank + 1} sends in step {number}")
            hidden = mx.distributed.recv_like(expected, rank + 1)
            mx.eval(hidden)
        goes_on = number + 1 < ROUNDS and start - begin < SECONDS
        mine = mx.array([number, rank, int(goes_on)], mx.uint32)
        if rank > 0:
            mine = mx.depends(mine, mx.distributed.send(hidden, rank - 1))
        watch.sees(f"the share of step {number}")
        everyone = gather(mine)
        mx.eval(everyone)
        times.append(1000 * (time.perf_counter() - start))
        rows = everyone.reshape(-1, 3).tolist()
        goes_on = rows[0][2] == 1 and len(times) < ROUNDS  # as rank 0 says
        if not garbled and rank < last and not mx.array_equal(hidden, expected):
            garbled = f"rank {rank} got other hidden states than were sent in step {number}"
        if not garbled and [row[:2] for row in rows] != [[number, r] for r in range(last + 1)]:
            garbled = f"rank {rank} got other ids than were shared in step {number}"
    return {
        "steps": len(times),
        "step_ms": statistics.median(times),
        "highest_step_ms": max(times[1:], default=times[0]),  # the first one connects
        "garbled": garbled,
    }


def _link(other: int) -> list[float]:
    """The latency in ms, its highest, and MB/s there and back. The other rank runs `_answer`."""
    times = [1000 * _exchange(other, 1, 1) / 2 for _ in range(PINGS + 1)][1:]
    latency = statistics.median(times)
    there = _throughput(lambda size: _exchange(other, size, 1), latency)
    back = _throughput(lambda size: _exchange(other, 1, size), latency)
    _exchange(other, 0, 0)
    return [latency, max(times), there, back]


def _exchange(other: int, there: int, back: int) -> float:
    """Send some bytes and receive some; the seconds that this takes. Nothing ends `_answer`."""
    _send(mx.array([there, back], mx.uint32), other)
    if not there:
        return 0.0
    data = mx.zeros(there, mx.uint8)
    mx.eval(data)
    start = time.perf_counter()
    _send(data, other)
    _receive(mx.zeros(back, mx.uint8), other)
    return time.perf_counter() - start


def _answer(other: int) -> None:
    while True:
        sizes: Any = _receive(mx.zeros(2, mx.uint32), other).tolist()
        there, back = sizes
        if not there:
            return
        _receive(mx.zeros(there, mx.uint8), other)
        _send(mx.zeros(back, mx.uint8), other)


def _throughput(exchange: Callable[[int], float], latency: float) -> float:
    """MB/s: the highest of three transfers that take long enough to count."""
    size, fastest, left = LEAST_BYTES, 0.0, 3
    while left:
        elapsed = exchange(size)
        seconds = elapsed - min(2 * latency / 1000, elapsed / 2)
        fastest = max(fastest, size / seconds / 1e6)
        if seconds > LONG_ENOUGH or size == MOST_BYTES:
            left -= 1  # several, since a pause of the machine makes one of them look slow
        else:
            size *= 2
    return fastest


def _send(data: mx.array, to: int) -> None:
    mx.eval(mx.distributed.send(data, to))


def _receive(like: mx.array, source: int) -> mx.array:
    received = mx.distributed.recv_like(like, source)
    mx.eval(received)
    return received


class _Watch:
    """Ends the process if it waits for too long; a context manager."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._ended = threading.Event()
        self.sees("the other ranks")

    def sees(self, what: str) -> None:
        """Note what this rank waits for from now on."""
        self._what, self._since = what, time.monotonic()

    def __enter__(self) -> _Watch:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _look(self) -> None:
        while not self._ended.wait(0.5):
            if time.monotonic() - self._since > STANDS_STILL:
                print(
                    f"mlx-lm-skiphead doctor: rank {self._rank} has waited {STANDS_STILL:.0f} s "
                    f"for {self._what}",
                    file=sys.stderr,
                    flush=True,
                )
                self._ended.wait(2)  # so that the others say the same: mlx.launch ends them all
                os._exit(1)
