"""What samplers give."""

from __future__ import annotations

import itertools

import mlx.core as mx

from programs.common import LOOPS, after, greedy, seen, steps
from programs.registry import kind


@kind(count=["0", "3"], loop=LOOPS)
def shape_by_value(count, loop):
    """A sampler that has another number of ids for logits that are no numbers."""

    def sampler(logprobs):
        if mx.isnan(logprobs).any().item():
            return mx.zeros((int(count),), mx.uint32)
        return greedy(logprobs)

    return [list(steps(loop, sampler)), after()]


# In speculation upstream takes as many ids as it needs, without a word.
@kind(value=["of all", "of rank 0"], loop=["generate", "batch"])
def wrong_number(value, loop):
    """A sampler that once gives an id too many: an error, upstream's here and there."""
    calls = itertools.count()

    def sampler(logprobs):
        ids = greedy(logprobs)
        too_many = next(calls) == 3
        if value == "of rank 0":
            too_many = too_many and not mx.isnan(logprobs).any().item()
        return mx.concatenate([ids, ids[:1]]) if too_many else ids

    *told, error = seen(steps(loop, sampler), Exception)
    return [told, isinstance(error, str), after()]
