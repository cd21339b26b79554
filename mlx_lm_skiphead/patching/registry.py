"""What is patched in this process, and which generations are running.

`installing` fills it in; loops and heads ask it. It patches nothing itself.
"""

from __future__ import annotations

import gc
import inspect
import logging
import sys
import threading
import weakref
from contextlib import suppress
from types import CodeType
from typing import Any, NamedTuple

from ..families import BY_NAME, FAMILIES, Family
from . import drift
from .handles import Handle

log = logging.getLogger("mlx_lm_skiphead")
lock = threading.RLock()

MLX = "mlx.core"
"""The group of patches of mlx itself, without which no other works."""


class SkipheadError(RuntimeError):
    """Something that was asked for cannot be done; the message says what, why and what to do."""


class Target(NamedTuple):
    """What became of one thing to patch.

    `state` is ``"patched"``, ``"not imported yet"``, ``"refused"``, ``"replaced"`` (it was patched,
    and then another package or a reload has put something else in its place), ``"not pipelined"``
    (by the installed mlx-lm, so nothing is to be done) or ``"off"`` (the plugin is not installed).
    Where it is refused or replaced, mlx-lm works as upstream, and `reason` says why.
    """

    state: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state


class ModelStatus(NamedTuple):
    """A model that was split into a pipeline while the plugin was on, on this rank."""

    family: str
    rank: int
    ranks: int
    on_disk: dict[str, int]
    """Bytes of weights that have not been read, by name of the module that they belong to."""
    not_here: tuple[str, ...] = ()
    """Files with such weights that have not been fetched, or are not in the model's folder."""

    def __str__(self) -> str:
        parts = [f"{name} {size / 1e6:.1f} MB" for name, size in self.on_disk.items()]
        left = " and ".join(parts) or "nothing"
        absent = f"; without {' and '.join(self.not_here)}" if self.not_here else ""
        return f"{self.family}, rank {self.rank} of {self.ranks}: {left} left on disk{absent}"


class Outcome(NamedTuple):
    """What became of a group of patches, when they were put in place."""

    target: Target
    handles: tuple[Handle, ...] = ()
    model: type | None = None
    """Of a family: its class `Model`."""


class Split(NamedTuple):
    """A model that is split into a pipeline, as the loops see it."""

    family: Family
    owner: Any
    """The head owner within the model (`Family.owner_of`)."""
    stage: Any
    """The pipelined model within the owner."""


outcomes: dict[str, Outcome] = {}
"""By group of patches."""
running: weakref.WeakSet[Any] = weakref.WeakSet()
"""Generations that have begun and not ended: runs, and batches, which have ended when empty."""


def target(group: str) -> Target:
    """What is so now of a group of patches, and of what it builds on."""
    base = BY_NAME[group].base if group in BY_NAME else ""
    for name in filter(None, (group, base, MLX)):
        outcome = outcomes.get(name, Outcome(Target("off")))
        if outcome.target.state != "patched":
            return outcome.target
        for handle in outcome.handles:
            if reason := handle.displaced_by():
                return Target("replaced", f"{reason}; install() patches that")
    return Target("patched")


def family_of(model: Any) -> Family | None:
    """The patched family that `model`, as mlx-lm loads it, belongs to; None if there is none.

    None also where another package has since put something in place of what was patched, and for
    a subclass with a ``__call__`` of its own.
    """
    names = {outcome.model: name for name, outcome in outcomes.items() if outcome.model}
    for cls in type(model).__mro__:
        if cls in names:
            return BY_NAME[names[cls]] if target(names[cls]).state == "patched" else None
        if "__call__" in vars(cls):
            return None
    return None


def split_of(model: Any) -> Split | None:
    """How `model` is split; None where there is no head to skip: one rank, or not patched."""
    family = family_of(model)
    if family is None:
        return None
    owner = family.owner_of(model)
    stage = family.stage_of(owner)
    if stage.pipeline_size == 1 or broadcast_code(stage) is None:
        return None
    return Split(family, owner, stage)


def owner_of(stage: Any) -> Split | None:
    """The head owner that a pipelined model is a part of, if its family is patched.

    A pipelined model does not know what it is a part of: this looks for what refers to it, which
    takes some 20 ms. Not among all objects: to hold a tuple that another thread is making breaks
    it there.
    """
    with lock:
        names = [name for name, outcome in outcomes.items() if outcome.model]
        families = [BY_NAME[name] for name in names if target(name).state == "patched"]
    found = [stage]
    for _ in range(max(family.stage.count(".") for family in FAMILIES) + 1):
        # By type(): asking some objects for their __class__ runs code of theirs.
        found = [a for a in gc.get_referrers(*found) if issubclass(type(a), dict)]
        for family in families:
            head_class = getattr(sys.modules[family.module], family.head_class)
            for thing in found:
                with suppress(AttributeError):  # it is being built
                    if issubclass(type(thing), head_class) and family.stage_of(thing) is stage:
                        return Split(family, thing, stage)
    return None


_broadcast_codes: dict[Any, CodeType | None] = {}


def broadcast_code(stage: Any) -> CodeType | None:
    """The code that has the hidden broadcast; None, said once, if it is not as expected.

    By the class of `stage`: it may be a subclass of the one in the table, with a ``__call__`` of
    its own.
    """
    call = inspect.getattr_static(type(stage), "__call__")
    if call not in _broadcast_codes:
        reason = drift.broadcasts(call)
        if reason:
            log.warning("%s is left to upstream mlx-lm: %s", type(stage).__name__, reason)
        _broadcast_codes[call] = None if reason else drift.code_of(call)
    return _broadcast_codes[call]


def generations() -> int:
    """How many generations are running."""
    return sum(bool(generation) for generation in list(running))
