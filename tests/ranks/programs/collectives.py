"""Collectives of the program's own, and other ways to wait for a rank, while it samples.

Unpatched stands still with a lazy collective in speculation.
"""

from __future__ import annotations

import itertools

import mlx.core as mx
from pieces import exchange

from programs.common import LOOPS, VOCAB, after, greedy, steps
from programs.models import FILES, RANK
from programs.registry import program


def rank_zeros(ids):
    mine = ids.astype(mx.int32)
    return mx.distributed.all_sum(mine if RANK == 0 else mine * 0).astype(mx.uint32)


@program(how=["eager"], loop=LOOPS)
@program(how=["lazy"], loop=["generate", "batch"])
def broadcast(how, loop):
    """A sampler gives rank 0's ids to all ranks itself, and may look at them before."""

    def sampler(logprobs):
        ids = greedy(logprobs)
        if how == "lazy":
            return rank_zeros(ids)
        ids.tolist()
        everyone = rank_zeros(ids)
        mx.eval(everyone)
        return everyone

    return [list(steps(loop, sampler)), after()]


@program(how=["eager", "by tokens"], loop=LOOPS)
@program(how=["lazy"], loop=["generate", "batch"])
def summed_bias(how, loop):
    """A processor adds what all ranks together have against a token."""
    calls = itertools.count()

    def processor(tokens, logits):
        by = tokens[-1:] if how == "by tokens" else next(calls)
        mine = 2.0 * mx.sin(mx.arange(VOCAB) * (RANK + 1.0) + by)
        if how != "lazy":
            mx.eval(logits)
        bias = mx.distributed.all_sum(mine)
        if how != "lazy":
            mx.eval(bias)
        return logits + bias

    return [list(steps(loop, processors=[processor])), after()]


@program()
def summed_bias_not_used():
    """A lazy sum over ranks is in logits from which a grammar's forced ids do not come."""
    forced = itertools.count(5)

    def processor(tokens, logits):
        return logits + mx.distributed.all_sum(mx.ones((1,)))

    sampler = lambda logprobs: mx.array([next(forced)])  # noqa: E731
    return [list(steps("generate", sampler, [processor])), after()]


exchanges = itertools.count()
"""Of this rank, as many as of any other."""


@program(where=["sampler", "processor"], loop=LOOPS)
def waits_for_a_file(where, loop):
    """A sampler looks at logits, then waits until rank 0 has written down what it has chosen."""

    def rank_zeros_choice(ids):
        return exchange(FILES / f"exchange-{next(exchanges)}", ids, RANK)

    def sampler(logprobs):
        logprobs.tolist()
        return rank_zeros_choice(greedy(logprobs))

    def processor(tokens, logits):
        logits[0, 0].item()
        best = rank_zeros_choice(greedy(logits))
        return mx.where(mx.arange(VOCAB) == best[:, None], logits - 1.5, logits)

    options = {"sampler": sampler} if where == "sampler" else {"processors": [processor]}
    return [list(steps(loop, **options)), after()]
