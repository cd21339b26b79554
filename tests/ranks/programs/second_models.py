"""A second model within a step.

Each pass has ended before the next is built: unpatched has no order either where two lazy ones are
in one graph.
"""

from __future__ import annotations

import itertools

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from programs import models
from programs.common import LOOPS, VOCAB, after, greedy, rest, steps
from programs.registry import program


def second_model(which):
    """A function that gives logits ``(1, V)`` for a next token ``(1, 1)``."""
    model = {
        "pipelined": models.second,
        "sharded": models.sharded,
        "whole": models.whole,
        "stage": lambda: models.MODEL,
    }[which]()
    cache = make_prompt_cache(model)

    def call(token):
        if which == "stage":
            hidden = models.MODEL.model(token, cache=cache)[:, -1]
            out = hidden.sum(axis=-1, keepdims=True) * mx.sin(mx.arange(VOCAB))
        else:
            out = model(token, cache=cache)[:, -1]
        mx.eval(out)
        return out

    call(mx.array([[7, 8, 9]]))
    mx.eval([c.state for c in cache])
    rest()
    return call


@program(
    which=["pipelined", "sharded", "whole", "stage"], where=["processor", "sampler"], loop=LOOPS
)
def guidance(which, where, loop):
    """Guidance: a second model, or the stage alone, is called for each token."""
    second = second_model(which)
    calls = itertools.count()

    def processor(tokens, logits):
        mx.eval(logits)
        return logits - 0.5 * second(tokens[-1:][None])

    def sampler(logprobs):
        mx.eval(logprobs)
        return greedy(logprobs - 0.5 * second(mx.array([[next(calls) % 50]])))

    options = {"sampler": sampler} if where == "sampler" else {"processors": [processor]}
    return [list(steps(loop, n=6, rows="one", **options)), after()]
