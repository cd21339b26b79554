"""Errors in samplers and processors: of all ranks, of rank 0, of a worker."""

from __future__ import annotations

import itertools

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from programs.common import (
    LOOPS,
    PROMPT,
    RANKS,
    Raising,
    after,
    greedy,
    loops,
    raising,
    rest,
    seen,
    steps,
    tokens,
)
from programs.models import RANK, SIZE, loaded
from programs.registry import alone_with_the_plugin, program


@program(error=[KeyboardInterrupt, ValueError, SystemExit], loop=LOOPS)
def all_raise(error, loop):
    """A sampler raises at one call on all ranks; with Ctrl-C it leaves at once."""
    told = seen(steps(loop, raising(error, range(SIZE))), error)
    rest()
    return [told, after()]


@program(loop=["generate", "batch"])
def looks_and_raises(loop):
    """Ctrl-C reaches all ranks while their samplers look at ids."""
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
    """A sampler raises on rank 0 only: all ranks leave. Unpatched the others stand still."""
    told = seen(steps(loop, raising(ValueError, [0], at=2)), Exception)
    told[-1] = told[-1] if RANK == 0 else told[-1].split(":")[0]
    # In speculation call 2 is the first of the pipelined model, and in the others the third.
    right = [] if loop == "speculation" else list(steps(loop))[:2]
    error = "ValueError: call 2 on rank 0" if RANK == 0 else "RuntimeError"
    return [[told, after()], [[*right, error], after()]]


@alone_with_the_plugin(loop=LOOPS, who=["rank 1", "last rank"])
def worker_raises(loop, who):
    """A sampler raises on a worker only: it goes on. Unpatched the others stand still."""
    sampler = raising(ValueError, [1 if who == "rank 1" else SIZE - 1], at=2)
    return [[list(steps(loop, sampler)), after()], [list(steps(loop)), after()]]


@alone_with_the_plugin(who=["rank 0", "rank 1"])
def one_rank_raises_in_a_draft(who):
    """A sampler raises in one rank's draft, without which nobody can go on: all ranks leave."""
    sampler = raising(ValueError, RANKS[who], at=3)
    *told, error = seen(steps("speculation", sampler), Exception)
    right = list(steps("speculation"))[: len(told)]
    return [[told, isinstance(error, str), after()], [right, True, after()]]


@alone_with_the_plugin(loop=LOOPS)
def worker_raises_each_time(loop):
    """A processor raises on logits that are no numbers: workers go on with rank 0's tokens."""

    def processor(tokens, logits):
        if mx.isnan(logits).any().item():
            raise ValueError("no numbers")
        return logits

    told = list(steps(loop, processors=[processor]))
    return [[told, after()], [list(steps(loop)), after()]]


class Stop(BaseException):
    pass


def looks(context, logits):
    """A processor that cannot do with NaN."""
    int(logits[0, 0].item())
    return logits


@program(
    "unsloth-zoo #927",
    error=[SystemExit, Stop, ValueError],
    beside=["nothing", "a temperature", "an error before", "an error after", "an error behind"],
)
def all_raise_beside(error, beside):
    """A processor raises on all ranks, beside what only workers raise, or what fails after it."""
    model, fails = loaded(), Raising(error, at=3)
    processors, options = {
        "nothing": ([fails], {}),
        "a temperature": ([fails], {"sampler": make_sampler(0.8)}),
        "an error before": ([looks, fails], {}),
        "an error after": ([fails, looks], {"sampler": make_sampler(0.8)}),
        # Behind the call that fails, in the same step: keys are too short to be quantized.
        "an error behind": (
            [fails],
            {"kv_bits": 8, "kv_group_size": 64, "quantized_kv_start": len(PROMPT) + 3},
        ),
    }[beside]
    mx.random.seed(7)
    running = loops.generate_step(mx.array(PROMPT), model, logits_processors=processors, **options)
    told = seen((token for token, _ in running), error)
    mx.synchronize(loops.generation_stream)
    return [told, mx.random.uniform().item(), tokens(model, sampler=make_sampler(0.5))]
