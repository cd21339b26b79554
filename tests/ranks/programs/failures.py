"""Errors."""

from __future__ import annotations

import itertools

import mlx.core as mx

from programs.closures import RANKS
from programs.common import LOOPS, MODEL, RANK, SIZE, after, greedy, raising, rest, seen, steps
from programs.registry import alone_with_the_plugin, kind


@kind(error=["KeyboardInterrupt", "ValueError", "SystemExit"], loop=LOOPS)
def all_raise(error, loop):
    """A sampler that raises at one call on all ranks; with Ctrl-C it leaves at once."""
    error = {"KeyboardInterrupt": KeyboardInterrupt, "ValueError": ValueError}.get(
        error, SystemExit
    )
    told = seen(steps(loop, raising(error, range(SIZE))), error)
    rest()
    return [told, after()]


@kind(loop=["generate", "batch"])
def looks_and_raises(loop):
    """Ctrl-C reaches all ranks while they look at logits."""
    calls = itertools.count()

    def sampler(logprobs):
        ids = greedy(logprobs)
        ids.tolist()
        if next(calls) == 3:
            raise KeyboardInterrupt
        return ids

    return [seen(steps(loop, sampler), KeyboardInterrupt), after()]


@alone_with_the_plugin(loop=LOOPS)
def rank_zero_raises(loop):
    """A sampler that raises on rank 0 only: all ranks leave. Unpatched the others stand still."""
    told = seen(steps(loop, raising(ValueError, [0], at=2)), Exception)
    told[-1] = told[-1] if RANK == 0 else told[-1].split(":")[0]
    # In speculation call 2 is the first of the pipelined model, and in the others the third.
    right = [] if loop == "speculation" else list(steps(loop))[:2]
    error = "ValueError: call 2 on rank 0" if RANK == 0 else "RuntimeError"
    return [[told, after()], [[*right, error], after()]]


@alone_with_the_plugin(loop=LOOPS, who=["rank 1", "last rank"])
def worker_raises(loop, who):
    """A sampler that raises on a worker only: it goes on. Unpatched the others stand still."""
    sampler = raising(ValueError, [1 if who == "rank 1" else SIZE - 1], at=2)
    return [[list(steps(loop, sampler)), after()], [list(steps(loop)), after()]]


@alone_with_the_plugin(who=["rank 0", "rank 1"])
def one_rank_raises_in_a_draft(who):
    """Nobody can go on without one rank's draft: an error on all ranks."""
    sampler = raising(ValueError, RANKS[who], at=3)
    *told, error = seen(steps("speculation", sampler), Exception)
    right = list(steps("speculation"))[: len(told)]
    return [[told, isinstance(error, str), after()], [right, True, after()]]


@alone_with_the_plugin(loop=LOOPS)
def worker_raises_each_time(loop):
    """A processor that cannot do with logits that are no numbers."""

    def processor(tokens, logits):
        if mx.isnan(logits).any().item():
            raise ValueError("no numbers")
        return logits

    told = list(steps(loop, processors=[processor]))
    return [[told, after()], [list(steps(loop)), after()]]


@kind(loop=LOOPS, what=["all", "nobody"])
def replaced_call(loop, what):
    """Another package has replaced the model's call by its own, and a sampler raises."""
    cls, called = type(MODEL), itertools.count()
    calls = cls.__call__

    def own(self, inputs, cache=None, input_embeddings=None):
        next(called)
        return self.lm_head(self.model(inputs, cache, input_embeddings))

    cls.__call__ = own
    try:
        sampler = raising(ValueError, range(SIZE) if what == "all" else ())
        told = seen(steps(loop, sampler), ValueError)
        # In speculation a draft that fails is told with the step's ids, some calls later.
        count = loop != "speculation" and next(called)
        rest()
        told.append(after())
    finally:
        cls.__call__ = calls
    return [told, count, after()]
