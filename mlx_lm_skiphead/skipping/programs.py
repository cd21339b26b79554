"""Functions of the program's that a loop calls: samplers, logits processors and callbacks.

They run on every rank, as upstream, so that their state, and that of `mx.random`, stays the same on
all ranks. A model that they call runs as upstream, with its head: such a call is no step of the
loop. Where one of them raises, the step goes on, so that the other ranks do not wait for a share
that never comes. The share then shows whether all ranks have failed (`Run.share`, `Run.check`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..patching.handles import written_in
from ..patching.registry import during
from .sharing import Run, random_key

Sampling = Callable[..., mx.array]
"""A sampler, which gives ids ``(B,)`` of logprobs ``(B, V)``, or a logits processor, which gives
logits ``(1, V)`` of the ids so far and logits."""

NOT_PROGRAMS = ("mlx_lm.", "mlx_lm_skiphead.")
"""The packages whose functions wait for no other rank, and keep no state but `mx.random`'s."""


class Processors:
    """The program's logits processors, guarded. As upstream, they may change between two steps."""

    def __init__(self, run: Run, processors: Any) -> None:
        self._run = run
        self._processors = () if processors is None else processors

    def __len__(self) -> int:
        return len(self._processors)

    def __iter__(self) -> Iterator[Sampling]:
        return (processor(self._run, function) for function in self._processors)


def sampler(run: Run, function: Sampling) -> Sampling:
    """The sampler `function`, whose failure waits for the share."""
    return _guarded(run, function, lambda logprobs: mx.zeros(logprobs.shape[:1], mx.uint32))


def processor(run: Run, function: Sampling) -> Sampling:
    """The logits processor `function`, whose failure waits for the share."""
    guarded = _guarded(run, function, lambda tokens, logits: logits)

    def call(*args: mx.array) -> mx.array:
        logits = guarded(*args)
        if run.step.is_programs and isinstance(logits, mx.array):
            run.step.logits.append(logits)
        return logits

    return call


def callback(run: Run, function: Callable[..., None] | None) -> Callable[..., None] | None:
    """The callback `function`; None if there is none."""

    def call(*args: Any) -> None:
        with _calling(run, "a callback"):
            function and function(*args)

    return function and call


def _guarded(run: Run, function: Sampling, otherwise: Sampling) -> Sampling:
    """`function`; where it raises, the step goes on with the result of `otherwise`.

    Only Ctrl-C at this rank ends it at once.
    """
    is_programs = not written_in(function).startswith(NOT_PROGRAMS)

    def call(*args: mx.array) -> mx.array:
        # Rank 0 calls nothing after a failure, as upstream. A worker does: its failure may be its
        # own (it looked at NaN), and a function that counts its calls must count them.
        if not run.is_worker and run.has_errors():
            return otherwise(*args)
        if is_programs:
            run.begin()
        run.step.calls += 1
        run.step.is_programs |= is_programs
        try:
            what = "a sampler or a logits processor"
            with _calling(run, what) if is_programs else during(run=None):
                return function(*args)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or not run.skips:
                raise  # without a share in the way, as upstream
            if not run.step.errors:
                run.step.key = random_key()
            run.step.errors[run.step.calls] = error
            return otherwise(*args)

    return call


@contextmanager
def _calling(run: Run, what: str) -> Iterator[None]:
    with run.watched(f"{what} of the program"), during(run=None):
        yield
