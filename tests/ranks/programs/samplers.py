"""Samplers whose ids are not those that a sampler usually gives."""

from __future__ import annotations

import itertools

import mlx.core as mx

from programs.common import LOOPS, after, greedy, seen, steps, tokens
from programs.models import loaded
from programs.registry import program


@program(count=[0, 3], loop=LOOPS)
def shape_by_value(count, loop):
    """A sampler has another number of ids for logits that are no numbers."""

    def sampler(logprobs):
        if mx.isnan(logprobs).any().item():
            return mx.zeros((count,), mx.uint32)
        return greedy(logprobs)

    return [list(steps(loop, sampler)), after()]


# In speculation upstream takes as many ids as it needs, without a word.
@program(whose=["of all", "of rank 0"], loop=["generate", "batch"])
def wrong_number(whose, loop):
    """A sampler once gives an id too many: an error, upstream's here and there."""
    calls = itertools.count()

    def sampler(logprobs):
        ids = greedy(logprobs)
        too_many = next(calls) == 3
        if whose == "of rank 0":
            too_many = too_many and not mx.isnan(logprobs).any().item()
        return mx.concatenate([ids, ids[:1]]) if too_many else ids

    *told, error = seen(steps(loop, sampler), Exception)
    return [told, isinstance(error, str), after()]


@program()
def forced():
    """A sampler's ids do not come from logits, as where a grammar allows one token only."""
    model, calls = loaded(), itertools.count(5)
    return [tokens(model, sampler=lambda logprobs: mx.array([next(calls)])), tokens(model)]
