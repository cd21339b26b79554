"""The formula of the time of a token, for N ranks and a batch of B sequences.

=============================== ====================== ==========================
part                            unpatched              with the plugin
=============================== ====================== ==========================
stages                          T(0) + ... + T(N - 1)  the same
links, from stage to stage      (N - 1) (S + L)        the same
links, rank 0 to the last rank  (N - 1) S + L          (N - 1) s + L
head                            D(N - 1)               D(0)
=============================== ====================== ==========================

- T(r), D(r): the time of rank r for its layers, and for the head. `plan` takes the time to read
  their weights from memory, bytes / bandwidth.
- H: bytes of the hidden states of one token. S = B H / rate, and s = 4 (B + 1) / rate, for the ids.
- L: the latency of a link, one way. Each machine has one port to all others, as with Ethernet.

In the last two rows the last rank counts, since it embeds the next token. A rank r between may take
longer: it knows the token N - r latencies after rank 0 has sent, and then runs its own head, if
unpatched. A rank begins its layers when it knows the token and has the hidden states of rank r + 1.
`token` follows the ranks in this way and takes the longest path. MLX's ring sends an all_gather of
`SPLIT_FROM` bytes or more both ways round, a half each. That takes as long through one port, but
max(r, N - r) latencies to rank r, so N - 1 to the last rank of more than two.

Between equal machines the plugin saves (N - 1) (S - s), and from `SPLIT_FROM` bytes on N - 2
latencies more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

SPLIT_FROM = 2 * 262144
"""From this size on, in bytes, MLX's ring sends an all_gather both ways round, a half each."""


class Link(NamedTuple):
    """What connects a machine with the others: `rate` in Gbit/s, `latency` one way in ms."""

    rate: float = math.inf
    latency: float = 0.0

    def ms(self, size: float) -> float:
        """How long a machine takes to send `size` bytes, without the latency."""
        return 8 * size / self.rate / 1e6


class Token(NamedTuple):
    """The parts of the time of a token, in milliseconds."""

    stages: float = 0.0
    head: float = 0.0
    links: float = 0.0

    @property
    def ms(self) -> float:
        return sum(self)


def token(
    times: Sequence[tuple[float, float]], row: int, link: Link, batch: int, way: str
) -> Token:
    """The time from rank 0's last layer to rank 0's last layer in the next step.

    Args:
        times: T and D of each rank, rank 0 first, in milliseconds.
        row: H, in bytes.
        link: its rate and L.
        batch: B.
        way: "unpatched" or "plugin".
    """
    ranks, size = len(times), batch * row
    gathered = 4 * (batch + 1) if way == "plugin" else size
    path = Token()
    for rank in reversed(range(ranks)):
        head, links = times[0 if way == "plugin" else rank][1], 0.0
        if rank:
            hops = max(rank if gathered >= SPLIT_FROM else 0, ranks - rank)
            links = (ranks - 1) * link.ms(gathered) + hops * link.latency
        path = max(path, Token(0.0, head, links), key=lambda one: one.ms)
        sends = link.ms(size) + link.latency if rank else 0.0
        path = Token(path.stages + times[rank][0], path.head, path.links + sends)
    return path
