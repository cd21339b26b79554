"""Other packages."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask  # noqa: F401 (STAGE uses it)
from mlx_lm.sample_utils import make_sampler

from programs.loading import (
    GROUP,  # noqa: F401 (STAGE uses it)
    RANK,
    direct,
    lazy,
    load,
    tokens,
)


def telemetry():
    """A package that gathers a number from each rank in the model's forward pass."""
    model = load()
    cls = type(model)
    calls, seen = cls.__call__, []

    def gathering(self, *args, **kwargs):
        seen.append(mx.distributed.all_gather(mx.array([RANK + 1])))
        out = calls(self, *args, **kwargs)
        seen.append(mx.distributed.all_gather(mx.array([10 * (RANK + 1)])))
        mx.eval(seen[-2])
        mx.async_eval(out)
        mx.eval(seen[-1])
        return out

    cls.__call__ = gathering
    try:
        told = tokens(model, [5], 4)
    finally:
        cls.__call__ = calls
    return [told, [array.tolist() for array in seen]]


STAGE = """
def call(self, inputs, cache=None, input_embeddings=None):
    h, rank = self.embed_tokens(inputs), self.pipeline_rank
    cache = cache or [None] * len(self.pipeline_layers)
    mask = create_attention_mask(h, cache[0])
    if rank < self.pipeline_size - 1:
        h = mx.distributed.recv_like(h, rank + 1)
    for layer, of_layer in zip(self.pipeline_layers, cache):
        h = layer(h, mask, of_layer)
    if rank:
        h = mx.distributed.send(h, rank - 1)
        if cache[-1] is not None:
            cache[-1].keys = mx.depends(cache[-1].keys, h)
    h = BROADCAST[: h.shape[0]]
    return self.norm(h)
"""

GATHER = "mx.distributed.all_gather"

BROADCASTS = {
    "as usual": f"{GATHER}(h)",
    "a group": f"{GATHER}(h, group=GROUP)",
    "a stream": f"{GATHER}(h, stream=mx.cpu)",
    "twice": f"{GATHER}({GATHER}(h)[: h.shape[0]])",  # which is left to upstream
}


def stages_of_their_own():
    """Pipelined models with a ``__call__`` of their own under the usual `Model`, as GLM-5.2's."""
    told = []
    for broadcast in BROADCASTS.values():
        model, names = lazy(), {**globals()}
        exec(STAGE.replace("BROADCAST", broadcast), names)
        model.model.__class__ = type("Stage", (type(model.model),), {"__call__": names["call"]})
        told += [tokens(model), direct(model), tokens(model, sampler=make_sampler(0.8))]
    return told
