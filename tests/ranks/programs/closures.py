"""Functions that another package has wrapped, as plain closures, on some ranks."""

from __future__ import annotations

import contextlib
import itertools

import mlx.core as mx

import mlx_lm_skiphead
from programs.common import MODE, MODEL, RANK, SIZE, after, loops, rest, steps
from programs.registry import kind

PLACES = {
    "eval": (mx, "eval"),
    "async_eval": (mx, "async_eval"),
    "all_gather": (mx.distributed, "all_gather"),
    "all_sum": (mx.distributed, "all_sum"),
    "generate_step": (loops, "generate_step"),
    "model": (type(MODEL), "__call__"),
    "stage": (type(MODEL.model), "__call__"),
    "batch": (loops.GenerationBatch, "_step"),
}

RANKS = {"rank 0": [0], "rank 1": [1], "all ranks": range(SIZE)}


@contextlib.contextmanager
def closure(owner, attribute, counted):
    real = getattr(owner, attribute)

    def counting(*args, **kwargs):
        counted.append(attribute)
        return real(*args, **kwargs)

    setattr(owner, attribute, counting)
    try:
        yield
    finally:
        setattr(owner, attribute, real)


def two_loops():
    told = [list(steps("generate", n=3)), list(steps("batch", n=3))]
    rest()
    return told


@kind(place=PLACES, who=RANKS)
def closures(place, who):
    """Put there between two generations, and taken out again: how often, is nobody's concern."""
    told, counted = [two_loops()], []
    with closure(*PLACES[place], counted) if RANK in RANKS[who] else contextlib.nullcontext():
        told += [two_loops(), list(steps("speculation", n=3))]
        rest()
    return [told, bool(counted), two_loops()]


# The others are refused where they are not mlx-lm's own: on all ranks, or the ranks do not agree.
@kind(place=["eval", "async_eval", "all_gather", "all_sum"], who=RANKS)
@kind(place=["generate_step", "model", "stage", "batch"], who=["all ranks"])
def closures_first(place, who):
    """Put there before the plugin is installed."""
    if MODE != "off":
        mlx_lm_skiphead.uninstall()
    counted = []
    with closure(*PLACES[place], counted) if RANK in RANKS[who] else contextlib.nullcontext():
        if MODE != "off":
            mlx_lm_skiphead.install(MODE)
        told = [two_loops(), list(steps("speculation", n=3)), bool(counted)]
        rest()
        if MODE != "off":
            mlx_lm_skiphead.uninstall()
    if MODE != "off":
        mlx_lm_skiphead.install(MODE)
    return [told, after()]


@kind(who=RANKS)
def nested_closures(who):
    """Two packages have wrapped the same function, and one leaves before the other."""
    counted, other = [], []
    here = RANK in RANKS[who]
    with closure(*PLACES["all_gather"], counted) if here else contextlib.nullcontext():
        with closure(*PLACES["all_gather"], other) if here else contextlib.nullcontext():
            told = [two_loops()]
        told += [two_loops(), list(steps("speculation", n=3))]
        rest()
    return [told, bool(counted), bool(other), two_loops()]


@kind(place=PLACES, who=RANKS)
def closures_midway(place, who):
    """Put there, and taken out, while a generation runs."""
    told, running = [], steps("generate", n=6)
    told += itertools.islice(running, 2)
    with closure(*PLACES[place], []) if RANK in RANKS[who] else contextlib.nullcontext():
        told += itertools.islice(running, 2)
    return [told, list(running), after()]
