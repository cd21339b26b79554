"""The links between ranks, without a model: what a step sends, and each link by itself.

A step of a pipeline is hidden states from rank to rank, down to rank 0, and then the token share,
a small ``all_gather``. Data is compared with what was sent, since a broken link may also garble.
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

ROUNDS = 200
SECONDS = 15.0
"""After which no further round begins."""
STANDS_STILL = 30.0
"""Seconds without a message, after which a rank says so and ends."""

HIDDEN = 4096
"""Numbers of 4 bytes in the hidden states of a token."""
PINGS = 20
LEAST_BYTES, MOST_BYTES = 1 << 18, 1 << 24
LONG_ENOUGH = 0.05
"""Seconds that a transfer must take for its throughput to count."""


def measure(group: mx.distributed.Group) -> dict[str, Any]:
    """Measure the links of all ranks, which all must call this: see ``links`` in `examine`.

    Ends the process with exit code 1, and a line on standard error, if nothing moves any more.
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
            if group.rank() in pair:
                watch.sees(f"the link between ranks {pair[0]} and {pair[1]}")
                other = sum(pair) - group.rank()
                mine = _link(other, is_first=group.rank() == pair[0])
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


def _link(other: int, *, is_first: bool) -> list[float]:
    """Latency in ms, its highest, and MB/s there and back; of the second rank zeros."""
    ping = mx.zeros(1, mx.uint8)
    times = []
    for _ in range(PINGS + 1):
        start = time.perf_counter()
        if is_first:
            _send(ping, other)
        _receive(ping, other)
        if not is_first:
            _send(ping, other)
        times.append(1000 * (time.perf_counter() - start) / 2)
    latency = statistics.median(times[1:])
    there = _throughput(other, latency, sends=is_first)
    back = _throughput(other, latency, sends=not is_first)
    return [latency, max(times[1:]), there, back] if is_first else [0.0] * 4


def _throughput(other: int, latency: float, *, sends: bool) -> float:
    """MB/s to or from another rank. The one that sends measures, and tells the other."""
    size, speed, long = LEAST_BYTES, 0.0, 0
    while size:
        data = mx.zeros(size, mx.uint8)
        mx.eval(data)
        if sends:
            start = time.perf_counter()
            _send(data, other)
            _receive(mx.zeros(1, mx.uint8), other)  # it has come
            seconds = max(1e-6, time.perf_counter() - start - 2 * latency / 1000)
            speed = max(speed, size / seconds / 1e6)
            long += seconds > LONG_ENOUGH
            # Several, since a pause of the machine makes one of them look slow.
            size = 0 if long == 3 or size == MOST_BYTES else size if long else 2 * size
            _send(mx.array([size, round(speed * 1000)], mx.uint32), other)
        else:
            _receive(data, other)
            _send(mx.zeros(1, mx.uint8), other)
            told: Any = _receive(mx.zeros(2, mx.uint32), other).tolist()
            size, speed = told[0], told[1] / 1000
    return speed


def _send(data: mx.array, to: int) -> None:
    mx.eval(mx.distributed.send(data, to))


def _receive(like: mx.array, source: int) -> mx.array:
    received = mx.distributed.recv_like(like, source)
    mx.eval(received)
    return received


class _Watch:
    """Ends the process if it waits for too long, inside a ``with`` block."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._ended = threading.Event()
        self.sees("the other ranks")

    def sees(self, what: str) -> None:
        """What is waited for from now on."""
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
