"""What each rank of a pipeline has of a model, in bytes: from its config and headers alone.

mlx-lm builds the model with lazy weights and splits it, so that sizes are right for whatever mlx-lm
does with a checkpoint on loading. Nothing is computed, of the prompt cache neither.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..weights.on_disk import size_of, unused
from . import downloads
from .models import Split, split
from .ranks import role
from .shared import Unusable

BLOCK = 256
"""Tokens of the prompts from which the size of a cache is known; a multiple of all steps."""


class Rank(NamedTuple):
    """One rank's part of the model. Sizes are in bytes."""

    rank: int
    role: str
    layers: tuple[int, int]
    """The first one, and the one after the last."""
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
        embedding = getattr(stage, family.embedding)
        # The graph of an embedded token. That is what all families broadcast. From stage to stage
        # deepseek_v41 and kimi_k3 send more, unpatched and with the plugin.
        row = embedding(mx.zeros((1, 1), mx.int32)).nbytes
        size = size_of(part.model)
        unread = unused(family, owner, stage)
        on_disk = {n: size_of(family.parent_of(owner, n)[n]) for n in unread}
        files = downloads.of_rank(folder, part)  # before `_cache` takes the rank for the only one
        planned.append(
            Rank(
                rank,
                role(rank, ranks),
                # Before 0.32 mlx-lm counts layers that do not exist, in an uneven split.
                (stage.start_idx, min(stage.end_idx, len(stage.layers))),
                {"unpatched": size, "plugin": size - sum(on_disk.values())},
                on_disk,
                {batch: _reads(part, embedding, batch) for batch in sorted({1, *batches})},
                size_of(family.head_of(owner)),
                max(batches) * _cache(part, context) if context else 0,
                files,
            )
        )
    return Plan(family.name, row, planned)


def _reads(part: Split, embedding: Any, batch: int) -> int:
    """Bytes that a step reads of the layers of a rank."""
    config, total = part.config, 0.0
    places = config, config.get("text_config", {}), config.get("language_config", {})
    keys = "num_experts_per_tok", "num_experts_per_token"
    used = next((place[key] for place in places for key in keys if place.get(key)), None)
    for module in part.stage.modules():
        if module is embedding:
            continue  # one row of it, on one rank
        size = sum(a.nbytes for a in module.values() if isinstance(a, mx.array))
        if used and isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            # Of E experts, k for each token, a batch of B reads E (1 - (1 - k / E)^B).
            size *= 1 - max(0.0, 1 - used / module.weight.shape[0]) ** batch
        total += size
    return round(total)


def _cache(part: Split, tokens: int) -> int:
    """Bytes of the prompt cache of a rank, from those of one block of tokens and of two.

    A cache grows by the token or by its `step`, or stays as it is, or has the last `max_size`
    tokens only. Not counted: the copies of another rank's groups that deepseek_v41 keeps.
    """
    part.stage.pipeline_rank, part.stage.pipeline_size = 0, 1  # its own layers, nothing sent
    total = 0.0
    for one, two in zip(_caches(part, BLOCK), _caches(part, 2 * BLOCK), strict=True):
        growth = (two.nbytes - one.nbytes) / BLOCK
        if window := getattr(one, "max_size", None):
            total += growth * min(tokens, window)
        else:
            step = getattr(one, "step", 1)
            total += one.nbytes + growth * (math.ceil(tokens / step) * step - BLOCK)
    return round(total)


def _caches(part: Split, tokens: int) -> list[Any]:
    """All caches of a prompt, which is never computed."""
    cache: Any = make_prompt_cache(part.model)
    try:
        part.owner(mx.zeros((1, tokens), mx.int32), cache=cache)
    except RuntimeError as error:  # a kernel of the family's that is for another backend
        raise Unusable(f"--context: {part.family.name} does not run here: {error}") from error
    return [one for layer in cache for one in getattr(layer, "caches", (layer,))]
