"""Functions that another package has wrapped, as plain closures, on some ranks or on all."""

from __future__ import annotations

import contextlib
import itertools

import mlx.core as mx

from programs.common import RANKS, after, install, loops, rest, steps, uninstall
from programs.models import MODEL, RANK
from programs.registry import program

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


@program(place=PLACES, who=RANKS)
def closures(place, who):
    """A counter is put around a function between two generations, and taken out again."""
    told, counted = [two_loops()], []
    with closure(*PLACES[place], counted) if RANK in RANKS[who] else contextlib.nullcontext():
        told += [two_loops(), list(steps("speculation", n=3))]
        rest()
    return [told, bool(counted), two_loops()]


# The others are refused where they are not mlx-lm's own: on all ranks, or the ranks do not agree.
@program(place=["eval", "async_eval", "all_gather", "all_sum"], who=RANKS)
@program(place=["generate_step", "model", "stage", "batch"], who=["all ranks"])
def closures_first(place, who):
    """A counter is put around a function before the plugin is installed."""
    uninstall()
    counted = []
    with closure(*PLACES[place], counted) if RANK in RANKS[who] else contextlib.nullcontext():
        install()
        told = [two_loops(), list(steps("speculation", n=3)), bool(counted)]
        rest()
        uninstall()
    install()
    return [told, after()]


@program(who=RANKS)
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


@program(place=PLACES, who=RANKS)
def closures_midway(place, who):
    """A counter is put around a function, and taken out, while a generation runs."""
    told, running = [], steps("generate", n=6)
    told += itertools.islice(running, 2)
    with closure(*PLACES[place], []) if RANK in RANKS[who] else contextlib.nullcontext():
        told += itertools.islice(running, 2)
    return [told, list(running), after()]
