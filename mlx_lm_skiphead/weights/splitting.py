"""Layers are split as ``MLX_LM_SKIPHEAD_SPLIT`` says, and such ranks agree about prompt caches.

mlx-lm gives all ranks as many layers. Since 0.32 a model's ``pipeline(group, split=[...])`` takes
other numbers, but nothing in mlx-lm gives it any. Here the split of the variable is handed on,
unless the program gives one.

Prompt caches: mlx-lm's server and its speculation ask whether a prompt cache can be trimmed, and
each rank looks at its own layers only. In a model with layers of several kinds one rank may have
only layers whose caches can be trimmed, and another rank others: then they would go on from
different tokens of a prompt. So with a split of the variable all layers decide on every rank, as in
one process.
"""

from __future__ import annotations

import inspect
import logging
import math
import weakref
from importlib import metadata
from types import SimpleNamespace
from typing import Any

from .. import config
from ..families import MODELS_PACKAGE, Family
from ..patching import drift
from ..patching.handles import Patch
from ..patching.registry import SkipheadError
from ..ranks import agreement
from . import on_disk
from .fetching import loading

log = logging.getLogger("mlx_lm_skiphead")

_stages: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""By id, the pipelined models that the variable has split; each has its `_trimmable_until`."""
_UNTIL = "_skiphead_trimmable_until"


def on_pipeline(wrapped: Any, stage: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of ``pipeline(group)``: upstream's, with the split of the variable.

    Raises:
        ValueError: upstream's, on all ranks, if a rank of the group cannot have its part.
        SkipheadError: if this ``pipeline`` takes no split.
    """
    parameters = inspect.signature(wrapped)
    given = parameters.bind(*args, **kwargs).arguments
    if config.split is not None and given.get("split") is None:
        try:
            if "split" not in parameters.parameters:
                module = f"{type(stage).__module__} of mlx-lm {metadata.version('mlx-lm')}"
                raise SkipheadError(f"{module} takes no split. Unset it.")
            given["split"] = config.split
            _try_each_rank(wrapped, stage, given)
        except (SkipheadError, ValueError) as error:
            error.args = (f"{config.SPLIT}={','.join(map(str, config.split))}: {error}",)
            log.critical("%s", error)  # a server's thread may be what loads
            raise
        vars(stage)[_UNTIL] = _trimmable_until(on_disk.owner_of(stage))
        _stages[id(stage)] = stage
    result = wrapped(**given)
    loading.is_split = True
    return result


def _try_each_rank(wrapped: Any, stage: Any, given: dict[str, Any]) -> None:
    """Split as every rank does, so that all raise where one does, and none waits for it."""
    layers, size = list(stage.layers), given["group"].size()
    for number in range(size):
        wrapped(**{**given, "group": group_of(number, size)})
        stage.layers = list(layers)


def group_of(rank: int, ranks: int) -> Any:
    """As much of a group as ``pipeline(group)`` needs: which rank of how many this is."""
    return SimpleNamespace(rank=lambda: rank, size=lambda: ranks)


def _trimmable_until(owner: Any) -> float:
    """From how many tokens on the prompt caches of the whole model cannot be trimmed."""
    # Without that method all layers have caches of one kind.
    layers = owner.make_cache() if hasattr(owner, "make_cache") else []
    caches = [cache for layer in layers for cache in getattr(layer, "caches", (layer,))]
    # Windows can be trimmed until they are full.
    limits = (getattr(c, "max_size", math.inf) if c.is_trimmable() else 0 for c in caches)
    return min(limits, default=math.inf)


def on_is_trimmable(wrapped: Any, cache: Any, args: Any, kwargs: Any) -> bool:
    """The wrapper of ``is_trimmable()`` of prompt caches, by all layers of the models in `_stages`.

    A prompt cache does not know its model.
    """
    until = min((vars(stage)[_UNTIL] for stage in list(_stages.values())), default=math.inf)
    return bool(wrapped(*args, **kwargs)) and cache.offset < until


def _tell() -> dict[str, str]:
    return {"is split": "by mlx-lm" if config.split and not loading.is_split else ""}


def _hear(by_rank: list[dict[str, str]]) -> None:
    if any(said["is split"] for said in by_rank):
        raise SkipheadError(
            f"{config.SPLIT} has no effect on this model, which is left to upstream mlx-lm "
            "(mlx-lm-skiphead doctor --model says why). Unset it."
        )


agreement.topics.append((_tell, _hear))

_CACHES = f"{MODELS_PACKAGE}.cache"
_LOST = "ranks may differ in what they reuse of a prompt, where layers are of several kinds"
PATCHES = tuple(
    Patch("prompt caches", _CACHES, f"{name}.is_trimmable", on_is_trimmable, drift.anything, _LOST)
    for name in ("KVCache", "QuantizedKVCache", "RotatingKVCache")
)


def patches(family: Family) -> tuple[Patch, ...]:
    """What hands the split to models of `family`."""
    if family.base:  # which has it
        return ()
    path, lost = f"{family.stage_class}.pipeline", f"{config.SPLIT} has no effect"
    return (Patch(family.name, family.module, path, on_pipeline, drift.anything, lost),)
