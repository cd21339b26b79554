"""All ranks have the plugin on, and alike, or it is an error before the first token.

A rank with the plugin beside one without would wait in other collectives, for ever. mlx-lm's
`sharded_load` ends in a sum of ones over all ranks, patched or not: here a rank with the plugin
adds more than one to it, and sees from the sum who did not. A collective of the plugin's own would
wait for ever for a rank without it. Only where all have the plugin do they tell each other more in
another collective. A rank whose load fails takes part too: then it fails on all ranks, and none
waits for that one.

Not looked at: a model that a program splits by its own ``model.model.pipeline(group)``. There
``mlx-lm-skiphead doctor`` under ``mlx.launch`` compares the ranks.
"""

from __future__ import annotations

import json
import logging
import traceback
import zlib
from collections.abc import Callable
from contextlib import suppress
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

PROTOCOL = 7
"""The version of what ranks send each other. Being part of `MARK`, it tells two versions apart
before they exchange anything that only one of them understands."""
MARK = 4096 + PROTOCOL
"""The number that a rank with the plugin adds to the sum, besides its one. Its sums are exact in
float32 for up to 4,000 ranks. The marks of two protocols never add up to a multiple of either."""
BLOCK, MOST_BLOCKS = 4096, 4096
"""What a rank tells the others fills blocks of so many bytes, since a broken MLX may change rows of
odd lengths (mlx #4443). More blocks are garbage."""
FOR_ALL = (
    f"All ranks must have the same {config.VARIABLE}: set it for all, as in mlx.launch --env "
    f"{config.VARIABLE}=1 ..., and have every rank import mlx_lm_skiphead. And install the same "
    "versions of mlx-lm and mlx-lm-skiphead for all."
)


topics: list[tuple[Callable[[], dict[str, str]], Callable[[list[dict[str, str]]], None]]] = []
"""Other modules' topics of the exchange where a model loads, in pairs of functions: one gives this
rank's facts by name, the other is given the facts of all ranks. An error of the second one is
raised on all ranks alike."""


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
    given = loader.f_locals if loader else {}
    group = given.get("pipeline_group")
    if group is None or group.size() == 1:
        return wrapped(*args, **kwargs)
    mine, *others = args
    total = wrapped(mine * (1.0 + MARK), *others, **kwargs)
    _compare(total, str(given["repo"]))
    return mx.array(float(mx.distributed.init().size()))


def take_part(error: Exception, repo: str, group: Any) -> None:
    """Where `sharded_load` fails on this rank, tell the others, which would wait for it for ever.

    Args:
        error: what it has raised.
        repo, group: its arguments.
    """
    if any(f.f_code is on_all_sum.__code__ for f, _ in traceback.walk_tb(error.__traceback__)):
        # It has taken part. What is kept of the failure is not to keep the model.
        traceback.clear_frames(error.__traceback__)
    elif group is not None and group.size() > 1 and registry.target(AGREEMENT).state == "patched":
        log.error("rank %d cannot load %s: %r", mx.distributed.init().rank(), repo, error)
        with suppress(RuntimeError):
            total = mx.distributed.all_sum(mx.array(1.0 + MARK), stream=mx.cpu)
            _compare(total, repo, repr(error)[:300])


def _compare(total: mx.array, repo: str, failure: str = "") -> None:
    """Compare the ranks, of which `total` is the sum. This one has loaded `repo`, or has failed to.

    Raises:
        SkipheadError: if they differ, or if one of them has failed to.
    """
    rank, ranks = mx.distributed.init().rank(), mx.distributed.init().size()
    here = f"rank {rank} of {ranks}, loading {repo}"
    try:
        with watch.watched(lambda seconds: f"{here}: {seconds:.0f} s for all ranks to have loaded"):
            _check_sum(total.item(), here, ranks)
            settings = _settings()
            # Of a model that is there in part nothing can be told.
            more = {k: v for tell, _ in topics for k, v in tell().items()} if not failure else {}
            by_rank = exchanged(settings | more | {"failure": failure})
            _check_settings([{name: said[name] for name in settings} for said in by_rank])
            for _, hear in topics if not any(said["failure"] for said in by_rank) else ():
                hear(by_rank)
    except SkipheadError as error:
        log.critical("%s", error)
        raise
    failed = [f"rank {r} ({said['failure']})" for r, said in enumerate(by_rank) if said["failure"]]
    if failed:
        # Not critical: a server goes on, with another model.
        text = f"{repo} cannot be loaded by {' and '.join(failed)}, so no rank has loaded it"
        if not failure:
            log.error("%s", text)
        raise SkipheadError(text)


def _check_sum(total: Any, here: str, ranks: int) -> None:
    active, loading = divmod(total, MARK)
    if active <= loading < ranks:
        raise SkipheadError(
            f"This is {here}, and {ranks - loading:.0f} of the other ranks are not: they may have "
            "failed to load it, or lack it. Look at their logs."
        )
    if loading != ranks or active > ranks:
        raise SkipheadError(
            f"The {ranks} ranks have versions of mlx-lm-skiphead that do not work together. This "
            f"is {here}, with {_settings()['mlx-lm-skiphead']}. {FOR_ALL}"
        )
    if active != ranks:
        rank = mx.distributed.init().rank()
        raise SkipheadError(
            f"mlx-lm-skiphead is on in {active:.0f} of {ranks} ranks, rank {rank} among them, and "
            f"off in {ranks - active:.0f}. {FOR_ALL}"
        )


def _settings() -> dict[str, str]:
    """The settings in which ranks must agree, by name."""
    from .. import __version__

    states = {name: registry.target(name).state for name in registry.outcomes}
    left = sorted(name for name, state in states.items() if state in ("refused", "replaced"))
    return {
        config.VARIABLE: config.active,
        config.SPLIT: ",".join(map(str, config.split or [])) or "not set",
        "mlx-lm-skiphead": __version__,
        "mlx-lm": metadata.version("mlx-lm"),
        "families known": f"{zlib.crc32(repr(FAMILIES).encode()):08x}",
        "left to upstream": ", ".join(left) or "nothing",
    }


def exchanged(told: Any) -> list[Any]:
    """What each rank tells, by rank: anything that JSON can say. All must call this.

    Raises:
        SkipheadError: if what arrives is not what a rank sends.
    """

    def gather(numbers: list[int], kind: mx.Dtype) -> Any:
        return mx.distributed.all_gather(mx.array([numbers], kind), stream=mx.cpu).tolist()

    text = json.dumps(told).encode()
    try:
        (blocks,) = max(gather([1 + len(text) // BLOCK], mx.uint32))
        if blocks > MOST_BLOCKS:
            raise ValueError(f"{blocks} blocks")
        return [json.loads(bytes(row)) for row in gather([*text.ljust(blocks * BLOCK)], mx.uint8)]
    except ValueError as error:
        raise SkipheadError(
            "What the ranks tell each other arrived as garbage: their links or their MLX are "
            f"broken ({error}). mlx-lm-skiphead doctor --links looks at both."
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
