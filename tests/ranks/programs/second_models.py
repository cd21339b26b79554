"""Models within a step."""

from __future__ import annotations

import itertools

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from programs.common import LOOPS, MODEL, SECOND, SHARDED, VOCAB, WHOLE, after, greedy, rest, steps
from programs.registry import kind


def second_model(which):
    """A function that gives logits ``(1, V)`` for a next token ``(1, 1)``."""
    model = {"pipelined": SECOND, "sharded": SHARDED, "whole": WHOLE, "stage": MODEL}[which]
    cache = make_prompt_cache(model)

    def call(token):
        if which == "stage":
            hidden = MODEL.model(token, cache=cache)[:, -1]
            out = hidden.sum(axis=-1, keepdims=True) * mx.sin(mx.arange(VOCAB))
        else:
            out = model(token, cache=cache)[:, -1]
        mx.eval(out)
        return out

    call(mx.array([[7, 8, 9]]))
    mx.eval([c.state for c in cache])
    rest()
    return call


@kind(which=["pipelined", "sharded", "whole", "stage"], where=["processor", "sampler"], loop=LOOPS)
def guidance(which, where, loop):
    """A second model, or the stage alone, is called for each token."""
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
