"""Loops of the program's own, by `rank_zero_head` and `share_tokens`."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_lm_skiphead import rank_zero_head, share_tokens
from programs.common import PROMPT
from programs.models import loaded
from programs.registry import program


@program("mlx-lm #46", how=["one block", "two blocks", "a share each"])
def two_calls_a_token(how):
    """Guidance: two calls of the model for each token, of which one may be shared and not used."""
    model = loaded()
    caches = [make_prompt_cache(model), make_prompt_cache(model)]
    inputs = [mx.array([PROMPT]), mx.array([[3, 4]])]
    told = []
    for _ in range(8):
        if how == "one block":
            with rank_zero_head():
                first, second = (
                    model(i, cache=c)[:, -1] for i, c in zip(inputs, caches, strict=True)
                )
        else:
            with rank_zero_head():
                first = model(inputs[0], cache=caches[0])[:, -1]
            if how == "a share each":
                share_tokens(mx.argmax(first, axis=-1))
            with rank_zero_head():
                second = model(inputs[1], cache=caches[1])[:, -1]
        token = share_tokens(mx.argmax(second + 1.5 * (first - second), axis=-1))
        told.append(token.item())
        inputs = [token[:, None]] * 2
    mx.synchronize()
    return told


@program()
def pair():
    """A model gives its logits and something else, and its loop takes the logits."""
    model = loaded()
    cls, calls = type(model), type(model).__call__

    def both(self, *args, **kwargs):
        out = calls(self, *args, **kwargs)
        return out, out * 2

    cls.__call__ = both
    told, cache, inputs = [], make_prompt_cache(model), mx.array([PROMPT])
    try:
        for _ in range(5):
            with rank_zero_head():
                logits, _ = model(inputs, cache=cache)
            token = share_tokens(mx.argmax(logits[:, -1], axis=-1))
            told.append(token.item())
            inputs = token[:, None]
    finally:
        cls.__call__ = calls
    mx.synchronize()
    return told
