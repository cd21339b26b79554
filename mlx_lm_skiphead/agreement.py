"""All ranks have the plugin on, and alike, or it is an error before the first token.

A rank with the plugin beside one without would wait in other collectives, for ever. mlx-lm's
`sharded_load` ends in a sum of ones over all ranks, patched or not: here a rank with the plugin
adds more than one to it, and sees from the sum who did not. Only where all have the plugin do they
exchange what they have in another collective.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable
from importlib import metadata
from types import FrameType
from typing import Any

import mlx.core as mx

from . import config, drift, registry
from .families import FAMILIES, LOADING_MODULE
from .handles import Patch
from .registry import SkipheadError

log = logging.getLogger("mlx_lm_skiphead")

PROTOCOL = 1
"""Of `_exchanged`: plugins of another one must not get as far as that."""

EXACT_BITS = 24
"""Whole numbers of so many bits are exact in float32, the type of the sum."""

SETTINGS_BYTES = 2048


def all_sum(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.distributed.all_sum`: looks whether all ranks agree, where a model loads.

    Raises:
        SkipheadError: if they do not; the message says in what and what to do. In a thread that
            is not the main one it is logged, and SIGTERM ends the process.
    """
    # The sum at the end of loading is of scalars; those of tensor parallelism are in each layer,
    # and are not to pay for a look at the stack.
    if config.active == "off" or not args or getattr(args[0], "ndim", 0) > 0:
        return wrapped(*args, **kwargs)
    group = _pipeline_group(sys._getframe(1))
    if group is None or group.size() == 1:
        return wrapped(*args, **kwargs)
    ranks = mx.distributed.init().size()
    mine, *others = args
    total = wrapped(mine * _contribution(ranks), *others, **kwargs)
    try:
        _check_sum(int(total.item()), ranks)
        _check_settings(_exchanged())
    except SkipheadError as error:
        if threading.current_thread() is not threading.main_thread():
            # As in mlx_lm.server, where this thread would end, and the ranks wait for ever.
            log.critical("%s This process ends.", error)
            os.kill(os.getpid(), signal.SIGTERM)
        raise
    return mx.array(float(ranks))


def _pipeline_group(frame: FrameType | None) -> Any:
    """The group that `sharded_load` splits a model over, if it is what calls.

    By frame, and not by wrapping it: it may have been imported by name before the plugin.
    """
    while frame is not None:
        if (
            frame.f_code.co_name == "sharded_load"
            and frame.f_globals.get("__name__") == LOADING_MODULE
        ):
            return frame.f_locals.get("pipeline_group")
        frame = frame.f_back
    return None


def _bits(ranks: int) -> int:
    """How many a count of ranks takes."""
    return ranks.bit_length()


def _contribution(ranks: int) -> float:
    """What a rank with the plugin adds, where one without adds 1.

    From the lowest bits on: 1, so that the sum counts all ranks; 1 for the plugin; 1 for the mode
    "hidden"; and a hash of what decides how the settings are exchanged.
    """
    bits = _bits(ranks)
    fields = [1, 1, int(config.active == "hidden"), _protocol_hash(EXACT_BITS - 4 * bits)]
    return float(sum(field << (place * bits) for place, field in enumerate(fields)))


def _protocol_hash(bits: int) -> int:
    return zlib.crc32(f"mlx-lm-skiphead {PROTOCOL}".encode()) % (1 << max(0, bits))


def _check_sum(total: int, ranks: int) -> None:
    bits = _bits(ranks)
    mask = (1 << bits) - 1
    everyone, active, hidden = (total >> (place * bits) & mask for place in range(3))
    hashes = total >> (3 * bits)
    here = f"rank {mx.distributed.init().rank()}"
    if everyone == ranks and active != ranks:
        raise SkipheadError(
            f"mlx-lm-skiphead is on in {active} of {ranks} ranks, {here} among them, and off in "
            f"{ranks - active}: {_for_all()}"
        )
    if everyone == ranks and hidden not in (0, ranks):
        raise SkipheadError(
            f"{config.VARIABLE} is hidden in {hidden} of {ranks} ranks, and on in "
            f"{ranks - hidden}: {_for_all()}"
        )
    if everyone != ranks or hashes != ranks * _protocol_hash(EXACT_BITS - 4 * bits):
        raise SkipheadError(
            f"The {ranks} ranks have versions of mlx-lm-skiphead that do not work together; {here} "
            f"has {_settings()['mlx-lm-skiphead']}. Install the same one for all of them."
        )


def _for_all() -> str:
    return (
        f"all of them must have the same {config.VARIABLE}. Set it for all, as in "
        f"mlx.launch --env {config.VARIABLE}=1 ..., and have every rank import mlx_lm_skiphead."
    )


def _settings() -> dict[str, str]:
    """In what ranks must agree besides, as names and values."""
    from . import __version__

    left = sorted(name for name, t in registry.outcomes.items() if t.state == "refused")
    return {
        "mlx-lm-skiphead": __version__,
        "mlx-lm": metadata.version("mlx-lm"),
        "families known": f"{zlib.crc32(repr(FAMILIES).encode()):08x}",
        "left to upstream": ", ".join(left)[:1000] or "nothing",
    }


def _exchanged() -> list[dict[str, str]]:
    """The settings of all ranks, by rank.

    Raises:
        SkipheadError: if what arrives is not what a rank sends.
    """
    data = json.dumps(_settings()).encode().ljust(SETTINGS_BYTES)
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
            raise SkipheadError(
                f"The ranks differ in {name}: {said}. mlx-lm-skiphead needs the same of "
                "mlx-lm and of itself on all ranks: install the same versions for all of them."
            )


PATCHES = (
    Patch(
        "sharded_load",
        "mlx.core",
        "distributed.all_sum",
        all_sum,
        drift.anything,
        "ranks that differ are not told apart where a model loads",
    ),
)
