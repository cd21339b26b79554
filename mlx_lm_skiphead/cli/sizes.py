"""What each rank of a pipeline has of a model, in bytes: from its config and headers alone.

mlx-lm builds the model with lazy weights and splits it, so that sizes are right for whatever mlx-lm
does with a checkpoint on loading. Nothing is computed, of the prompt cache neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from inspect import signature
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..weights.on_disk import size_of, unused
from ..weights.splitting import group_of
from . import downloads
from .models import Split, split
from .ranks import role
from .shared import Unusable

BLOCK = 256
"""Tokens of the prompts from which the size of a cache is known; a multiple of all steps."""


Stage = tuple[int, int]
"""The layers of a rank: the first one, and the one after the last."""


class Rank(NamedTuple):
    """One rank's part of the model. Sizes are in bytes."""

    rank: int
    role: str
    layers: Stage
    memory_bytes: dict[str, int]
    """By way, the weights that are loaded."""
    on_disk: dict[str, int]
    """Those that stay on disk with the plugin, by module."""
    reads_bytes: dict[int, int]
    """By batch size: weights that a step reads, without the head. Of the experts those that get
    tokens, of the embedding nothing."""
    head_bytes: int
    """Weights that the head reads."""
    cache_bytes: int
    """The prompt caches of the largest batch, of as many tokens as was asked for."""
    downloads: downloads.Downloads
    """What it fetches from a hub, if it has nothing yet."""


class Plan(NamedTuple):
    """A model over a number of ranks."""

    family: str
    row: int
    """Bytes of the hidden states of one token."""
    ranks: list[Rank]


def plan(
    folder: Path,
    ranks: int,
    layers: list[int] | None = None,
    batches: Sequence[int] = (1,),
    context: int = 0,
) -> Plan:
    """What each of `ranks` ranks would have of the model in `folder`.

    Args:
        folder: of a checkpoint that mlx-lm loads.
        ranks: how many, 2 or more.
        layers: of each rank, rank 0 first; even if None.
        batches: batch sizes.
        context: the tokens of each sequence in the prompt caches.

    Raises:
        Unusable: see `models.split`.
    """
    planned = []
    for rank in range(ranks):
        part = split(folder, rank, ranks, layers)
        family, owner, stage = part.family, part.owner, part.stage
        # The graph of an embedded token. That is what all families broadcast. From stage to stage
        # deepseek_v41 and kimi_k3 send more, unpatched and with the plugin.
        row = getattr(stage, family.embedding)(mx.zeros((1, 1), mx.int32)).nbytes
        size = size_of(part.model)
        on_disk = {n: size_of(family.parent_of(owner, n)[n]) for n in unused(family, owner, stage)}
        files = downloads.of_rank(folder, part)  # before `_caches` takes the rank for the only one
        planned.append(
            Rank(
                rank,
                role(rank, ranks),
                # Before 0.32 mlx-lm counts layers that do not exist, in an uneven split.
                (stage.start_idx, min(stage.end_idx, len(stage.layers))),
                {"unpatched": size, "plugin": size - sum(on_disk.values())},
                on_disk,
                {batch: _reads(part, part.stage, batch) for batch in sorted({1, *batches})},
                size_of(family.head_of(owner)),
                max(batches) * sum(_caches(part, context)),
                files,
            )
        )
    return Plan(family.name, row, planned)


class Size(NamedTuple):
    """The size of a part of a model, in bytes."""

    memory: int
    """Weights and prompt caches."""
    reads: int
    """Weights that a step reads."""


class Layers(NamedTuple):
    """Each layer of a model, and which of them mlx-lm lets a rank have."""

    sizes: list[Size]
    """Of each layer, with the prompt caches of the largest batch, and a step of the first one."""
    stages: set[Stage]
    """Those that a rank may have. Empty if this mlx-lm splits models of the family evenly only."""


def layers(folder: Path, batches: Sequence[int] = (1,), context: int = 0) -> Layers:
    """What the layers of the model in `folder` take; the arguments are those of `plan`."""
    part = split(folder, 0, 1)
    every, stages = list(part.stage.layers), set()
    places = combinations(range(len(every) + 1), 2)
    for first, end in places if "split" in signature(part.stage.pipeline).parameters else ():
        counts = [count for count in (len(every) - end, end - first, first) if count]
        with suppress(ValueError):  # of layers that cannot be a part
            part.stage.pipeline(group_of(int(end < len(every)), len(counts)), counts)
            stages.add((first, end))
        part.stage.layers = list(every)
    part.stage.pipeline(group_of(0, 1))
    caches = _caches(part, context) or [0] * len(every)
    sizes = [
        Size(size_of(layer) + max(batches) * cache, _reads(part, layer, batches[0]))
        for layer, cache in zip(every, caches, strict=True)
    ]
    return Layers(sizes, stages)


def _reads(part: Split, top: Any, batch: int) -> int:
    """Bytes that a step reads of the modules in `top`."""
    nested = part.config.get("text_config") or part.config.get("language_config") or {}
    config = {**part.config, **nested}
    used = config.get("num_experts_per_tok") or config.get("num_experts_per_token")
    embedding, total = getattr(part.stage, part.family.embedding), 0.0
    for module in top.modules():
        if module is embedding:
            continue  # one row of it, on one rank
        size = sum(a.nbytes for a in module.values() if isinstance(a, mx.array))
        if used and isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            # Of E experts, k for each token, a batch of B reads E (1 - (1 - k / E)^B).
            size *= 1 - max(0.0, 1 - used / module.weight.shape[0]) ** batch
        total += size
    return round(total)


def _caches(part: Split, tokens: int) -> list[int]:
    """Bytes of the prompt cache of each layer of a rank, from those of one block of tokens and of
    two; empty for no tokens.

    A cache grows by the token or by its `step`, or stays as it is, or has the last `max_size`
    tokens only. Not counted: the copies of another rank's groups that deepseek_v41 keeps.
    """
    part.stage.pipeline_rank, part.stage.pipeline_size = 0, 1  # its own layers, nothing sent
    caches: list[Any] = [make_prompt_cache(part.model) for _ in range(2 if tokens else 0)]
    try:
        for blocks, cache in enumerate(caches, start=1):
            part.owner(mx.zeros((1, blocks * BLOCK), mx.int32), cache=cache)  # never computed
    except RuntimeError as error:  # a kernel of the family's that is for another backend
        raise Unusable(f"--context: {part.family.name} does not run here: {error}") from error
    sizes = []
    for layer in zip(*caches, strict=True):
        total = 0.0
        for one, two in zip(*(getattr(cache, "caches", (cache,)) for cache in layer), strict=True):
            window, step = getattr(one, "max_size", None), getattr(one, "step", 1)
            kept = min(tokens, window) if window else math.ceil(tokens / step) * step
            total += one.nbytes + (two.nbytes - one.nbytes) / BLOCK * (kept - BLOCK)
        sizes.append(round(total))
    return sizes
