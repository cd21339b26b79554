"""What is patched in this process, what it generates, and what each of its threads is building.

`installing` and the wrappers fill it in. It patches nothing itself, and knows nothing of models.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from .handles import Handle

lock = threading.RLock()


class SkipheadError(RuntimeError):
    """The user has asked for something that cannot be done. The message says why and what to do."""


class Target(NamedTuple):
    """What became of one thing to patch.

    `state` is ``"patched"``, ``"not imported yet"``, ``"refused"``, ``"replaced"`` (it was patched,
    and then another package or a reload has put something else in its place), ``"not pipelined"``
    (by the installed mlx-lm, so nothing is to be done) or ``"off"`` (the plugin is not installed).
    Where it is refused, mlx-lm works as upstream, and `reason` says why. Where it is replaced, it
    works as upstream too, unless what replaces it calls what was there.
    """

    state: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state


class Outcome(NamedTuple):
    """The result of putting a group of patches in place."""

    target: Target
    handles: tuple[Handle, ...] = ()
    bases: tuple[str, ...] = ()
    """The groups without which this one is of no use."""


outcomes: dict[str, Outcome] = {}
"""By group of patches; changed under `lock`."""


def target(group: str) -> Target:
    """The present state of a group of patches, and of the groups that it builds on."""
    with lock:
        own = outcomes.get(group, Outcome(Target("off")))
        for outcome in (own, *(outcomes.get(b, Outcome(Target("off"))) for b in own.bases)):
            if outcome.target.state != "patched":
                return outcome.target
            for handle in outcome.handles:
                if reason := handle.displaced_by():
                    return Target("replaced", f"{reason}; install() patches that")
        return Target("patched")


_running: weakref.WeakSet[Any] = weakref.WeakSet()


def has_begun(generation: Any) -> None:
    """Note a generation; a batch of requests is one while it is not empty."""
    with lock:
        _running.add(generation)


def has_ended(generation: Any) -> None:
    """Forget a generation."""
    with lock:
        _running.discard(generation)


def generations() -> int:
    """The number of generations that are running."""
    with lock:
        return sum(bool(generation) for generation in list(_running))


class _PerThread(threading.local):
    run: Any = None
    """The `Run` whose step this thread is building (sharing.py)."""
    forward: Any = None
    """The call of `Model.__call__` that this thread is in (head.py)."""


this_thread = _PerThread()


@contextmanager
def during(**values: Any) -> Iterator[None]:
    """Inside the ``with`` block `this_thread` has these attributes."""
    before = {name: getattr(this_thread, name) for name in values}
    vars(this_thread).update(values)
    try:
        yield
    finally:
        vars(this_thread).update(before)
