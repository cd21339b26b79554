"""All ranks have the plugin on, and alike, or it is an error before the first token.

A rank with the plugin beside one without would wait in other collectives, for ever. mlx-lm's
`sharded_load` ends in a sum of ones over all ranks, patched or not: here a rank with the plugin
adds more than one to it, and sees from the sum who did not. A collective of the plugin's own would
wait for ever for a rank without it. Only where all have the plugin do they tell each other more in
another collective.

Not looked at: a model that a program splits by its own ``model.model.pipeline(group)``. There
``mlx-lm-skiphead doctor`` under ``mlx.launch`` compares the ranks.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import mlx.core as mx

from .. import config
from ..families import FAMILIES, LOADING_MODULE
from ..patching import drift, registry
from ..patching.frames import caller
from ..patching.handles import Patch
from ..patching.registry import SkipheadError
from . import watch

log = logging.getLogger("mlx_lm_skiphead")

PROTOCOL = 6
"""Of `exchanged`: plugins of another one must not get as far as that."""
MARK = 4096 + PROTOCOL
"""What a rank with the plugin adds to the sum besides its one. Sums of it are exact in float32, for
up to 4,000 ranks; and of two protocols no mixture is a multiple of either."""
SETTINGS_BYTES = 4096
FOR_ALL = (
    f"All ranks must have the same {config.VARIABLE}: set it for all, as in mlx.launch --env "
    f"{config.VARIABLE}=1 ..., and have every rank import mlx_lm_skiphead. And install the same "
    "versions of mlx-lm and mlx-lm-skiphead for all."
)


told: list[tuple[Callable[[], dict[str, str]], Callable[[list[dict[str, str]]], None]]] = []
"""What else the ranks tell each other where a model loads, in pairs: a function that gives what
this rank says, by name, and one that is given what all have said, by rank. What the second one
raises it raises on all ranks alike."""


def on_all_sum(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.distributed.all_sum`: looks whether all ranks agree, where a model loads.

    Raises:
        SkipheadError: if they do not; the message says in what and what to do. It is logged too,
            since a server's thread may be what loads.
    """
    # The sum at the end of loading is of scalars; those of tensor parallelism are in each layer,
    # and are not to pay for a look at the stack.
    if not args or getattr(args[0], "ndim", 0) > 0:
        return wrapped(*args, **kwargs)
    # By frame: sharded_load may have been imported by name before the plugin.
    loader = caller(LOADING_MODULE, "sharded_load")
    group = loader and loader.f_locals.get("pipeline_group")
    if group is None or group.size() == 1:
        return wrapped(*args, **kwargs)
    ranks = mx.distributed.init().size()
    mine, *others = args
    total = wrapped(mine * (1.0 + MARK), *others, **kwargs)
    here = f"rank {mx.distributed.init().rank()} of {ranks}, loading"
    try:
        with watch.watched(lambda seconds: f"{here}: {seconds:.0f} s for all ranks to have loaded"):
            _check_sum(int(total.item()) - ranks, ranks)
            settings = _settings()
            by_rank = exchanged(settings | {k: v for tell, _ in told for k, v in tell().items()})
            _check_settings([{name: said[name] for name in settings} for said in by_rank])
            for _, hear in told:
                hear(by_rank)
    except SkipheadError as error:
        log.critical("%s", error)
        raise
    watch.agreed = True
    return mx.array(float(ranks))


def _check_sum(marks: int, ranks: int) -> None:
    active, rest = divmod(marks, MARK)
    here = f"rank {mx.distributed.init().rank()}"
    if rest or active > ranks:
        raise SkipheadError(
            f"The {ranks} ranks have versions of mlx-lm-skiphead that do not work together; {here} "
            f"has {_settings()['mlx-lm-skiphead']}. {FOR_ALL}"
        )
    if active != ranks:
        raise SkipheadError(
            f"mlx-lm-skiphead is on in {active} of {ranks} ranks, {here} among them, and off in "
            f"{ranks - active}. {FOR_ALL}"
        )


def _settings() -> dict[str, str]:
    """In what ranks must agree besides, as names and values."""
    from .. import __version__

    states = {name: registry.target(name).state for name in registry.outcomes}
    left = sorted(name for name, state in states.items() if state in ("refused", "replaced"))
    return {
        config.VARIABLE: config.active,
        config.SPLIT: ",".join(map(str, config.split or [])) or "not set",
        "mlx-lm-skiphead": __version__,
        "mlx-lm": metadata.version("mlx-lm"),
        "families known": f"{zlib.crc32(repr(FAMILIES).encode()):08x}",
        "left to upstream": ", ".join(left)[:1000] or "nothing",
    }


def exchanged(settings: dict[str, str]) -> list[dict[str, str]]:
    """The settings of all ranks, by rank.

    Raises:
        SkipheadError: if what arrives is not what a rank sends.
    """
    data = json.dumps(settings).encode().ljust(SETTINGS_BYTES)
    everything = mx.distributed.all_gather(mx.array(list(data), mx.uint8), stream=mx.cpu)
    gathered = bytes(everything.tolist())  # type: ignore[arg-type]
    places = range(0, len(gathered), SETTINGS_BYTES)
    try:
        return [json.loads(gathered[place : place + SETTINGS_BYTES]) for place in places]
    except ValueError as error:
        raise SkipheadError(
            "The versions that the ranks tell each other arrived as garbage: their links or their "
            f"MLX are broken ({error}). mlx-lm-skiphead doctor --links looks at both."
        ) from error


def _check_settings(by_rank: list[dict[str, str]]) -> None:
    for name in by_rank[0]:
        values = [settings[name] for settings in by_rank]
        if len(set(values)) > 1:
            said = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise SkipheadError(f"The ranks differ in {name}: {said}. {FOR_ALL}")


_LOST = "ranks that differ are not told apart where a model loads"
AGREEMENT = "comparison of ranks"
PATCHES = (Patch(AGREEMENT, "mlx.core", "distributed.all_sum", on_all_sum, drift.anything, _LOST),)
