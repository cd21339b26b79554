"""The best split: which machine is to be which rank, and with how many layers.

With the plugin a token takes the time of all ranks for their layers, that of rank 0 for the head,
and that of the links, which is the same for every split (see `formula`). So the search is exact and
yet small. It goes from the last rank, which has the first layers, to rank 0. Of all ways to have
the layers up to one of them on the same machines, it goes on with the fastest (a dynamic program).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from .sizes import Layers, Plan, Size, Stage

TIE, EVEN = 1e-5, 1e-10
"""In ms: a difference that is none; and what counts for the square of the number of a rank's
layers, so that of ways that take as long the most even one is the best."""


class Machine(NamedTuple):
    """Where a rank runs. None stands for what is not known."""

    bandwidth: float | None = None
    """Of its memory, GB/s (10^9)."""
    memory: float | None = None
    """GB that it has for weights and caches."""

    def ms(self, size: float) -> float:
        """How long it takes to read so many bytes; 0 if its bandwidth is not known."""
        return size / (1e6 * (self.bandwidth or math.inf))

    def holds(self, size: float) -> bool:
        """Whether so many bytes fit into its memory."""
        return size <= 1e9 * (self.memory or math.inf)


class Way(NamedTuple):
    """One way to run a model."""

    machines: tuple[int, ...]
    """By rank, the number of its machine."""
    layers: tuple[int, ...]
    """By rank, how many."""
    memory_bytes: tuple[int, ...]
    """By rank, with the plugin."""
    ms: float
    """Of a token, without links."""
    fits: bool


class Search(NamedTuple):
    """What the best way is looked for by."""

    machines: Sequence[Machine]
    layers: Sequence[Size]
    besides: Sequence[Size]
    """By rank, what it has besides its layers, as the head and the embedding."""
    stages: Sequence[Collection[Stage]]
    """By rank, the layers that it may have."""

    def part(self, rank: int, stage: Stage) -> Size:
        """What a rank has with these layers."""
        return Size(*map(sum, zip(self.besides[rank], *self.layers[slice(*stage)], strict=True)))

    def way(self, machines: Sequence[int], stages: Sequence[Stage]) -> Way:
        """The way with these machines and these layers, by rank."""
        parts = [self.part(rank, stage) for rank, stage in enumerate(stages)]
        on = [(self.machines[number], part) for number, part in zip(machines, parts, strict=True)]
        return Way(
            tuple(machines),
            tuple(end - first for first, end in stages),
            tuple(part.memory for part in parts),
            sum(machine.ms(part.reads) for machine, part in on),
            all(machine.holds(part.memory) for machine, part in on),
        )

    def best(self, order: Sequence[int] = (), unlimited: int | None = None) -> Way | None:
        """The best way that fits; None if none does.

        Args:
            order: by rank the number of its machine; any order if it is empty.
            unlimited: the number of a machine whose memory does not count.
        """
        # By the machines taken, as bits, and how many layers they have: ms, machines and stages.
        found: dict[tuple[int, int], tuple[float, tuple[int, ...], tuple[Stage, ...]]]
        found = {(0, 0): (0.0, (), ())}
        for rank in reversed(range(len(self.machines))):
            parts = defaultdict(list)
            for stage in self.stages[rank]:
                parts[stage[0]].append((stage, self.part(rank, stage)))
            reached, found = found, {}
            for (taken, done), (ms, chosen, stages) in reached.items():
                # Of equal machines the last one, so that they stay in order.
                free = {m: n for n, m in enumerate(self.machines) if not taken >> n & 1}
                for number in order[rank : rank + 1] or list(free.values()):
                    machine = self.machines[number]
                    for stage, part in parts[done]:
                        if number != unlimited and not machine.holds(part.memory):
                            continue
                        total = ms + machine.ms(part.reads) + EVEN * (stage[1] - stage[0]) ** 2
                        key = taken | 1 << number, stage[1]
                        if key not in found or total < found[key][0]:
                            found[key] = total, (number, *chosen), (stage, *stages)
        ended = [way for (_, done), way in found.items() if done == len(self.layers)]
        return self.way(*min(ended)[1:]) if ended else None

    def limits(self, way: Way) -> list[int]:
        """The machines, by number, with more memory for which another split would be faster."""
        freed = ((number, self.best(way.machines, number)) for number in way.machines)
        return sorted(number for number, more in freed if more and more.ms < way.ms - TIE)


def search(planned: Plan, layers: Layers, machines: Sequence[Machine], batch: int) -> Search:
    """The search for the ranks of a plan, whose split does not matter.

    Args:
        planned: the plan.
        layers: of the same model, for the same batches and context.
        machines: as many as ranks, in any order.
        batch: the batch size whose time counts, the first one.
    """
    besides = []
    for rank in planned.ranks:
        own = Size(*map(sum, zip(*layers.sizes[slice(*rank.layers)], strict=True)))
        memory = rank.memory_bytes["plugin"] + rank.cache_bytes
        reads = rank.reads_bytes[batch] + (0 if rank.rank else rank.head_bytes)
        besides.append(Size(memory - own.memory, reads - own.reads))
    stages = [layers.stages or {rank.layers} for rank in planned.ranks]
    return Search(machines, layers.sizes, besides, stages)


def compare(look: Search, given: Sequence[Stage]) -> tuple[list[Way], list[int]]:
    """The ways to run a model, of which the last one is the best, and which memories limit that.

    The first way is the `given` stages on the machines in their order. The others are the best
    split for that order, and for any, where they are better. The best does not fit if none does.
    """
    order = range(len(look.machines))
    ways = [look.way(order, given)]
    for way in (look.best(order), look.best()):
        if way and not (ways[-1].fits and way.ms > ways[-1].ms - TIE):
            ways.append(way)
    return ways, look.limits(ways[-1]) if ways[-1].fits else []
