"""What other packages put into a model: taps, counters, and calls of their own."""

from __future__ import annotations

import itertools

import mlx.core as mx
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.qwen2 import Qwen2Model
from mlx_lm.sample_utils import make_sampler

from programs.common import LOOPS, after, direct, raising, rest, seen, steps, tokens
from programs.models import GROUP, MODEL, RANK, SIZE, checkpoint, loaded, own_pipeline
from programs.registry import NOTES, program


@program(how=["eager", "lazy"], loop=LOOPS)
def tap(how, loop):
    """A package looks at the hidden states which the final norm gets: NaN on workers."""
    cls, norm, taken = type(MODEL.model.norm), MODEL.model.norm, []
    calls = cls.__call__

    def tapped(self, x):
        if self is norm and x.shape[1] <= 3:  # not a prefill, which never ends in a norm
            taken.append(mx.isnan(x).any())
            if how == "eager":
                mx.eval(taken[-1])
        return calls(self, x)

    cls.__call__ = tapped
    try:
        told = list(steps(loop))
        rest()
    finally:
        cls.__call__ = calls
    NOTES["norm saw NaN"] = sorted({flag.item() for flag in taken})
    return [told, len(taken) > 4, after()]


@program(who=["all", "nobody"], loop=LOOPS)
def replaced_call(who, loop):
    """Another package has replaced the model's call by its own, and a sampler raises."""
    cls, called = type(MODEL), itertools.count()
    calls = cls.__call__

    def own(self, inputs, cache=None, input_embeddings=None):
        next(called)
        return self.lm_head(self.model(inputs, cache, input_embeddings))

    cls.__call__ = own
    try:
        sampler = raising(ValueError, range(SIZE) if who == "all" else ())
        told = seen(steps(loop, sampler), ValueError)
        # In speculation a draft that fails is told with the step's ids, some calls later.
        count = loop != "speculation" and next(called)
        rest()
        told.append(after())
    finally:
        cls.__call__ = calls
    return [told, count, after()]


@program("exo #2269")
def telemetry():
    """A package gathers a number of each rank in the model's call, before and behind it."""
    model = loaded()
    cls = type(model)
    calls, gathered = cls.__call__, []

    def gathering(self, *args, **kwargs):
        gathered.append(mx.distributed.all_gather(mx.array([RANK + 1])))
        out = calls(self, *args, **kwargs)
        gathered.append(mx.distributed.all_gather(mx.array([10 * (RANK + 1)])))
        mx.eval(gathered[-2])
        mx.async_eval(out)
        mx.eval(gathered[-1])
        return out

    cls.__call__ = gathering
    try:
        told = tokens(model, [5], 4)
    finally:
        cls.__call__ = calls
    return [told, [array.tolist() for array in gathered]]


class Stage(Qwen2Model):
    """A pipelined model with a ``__call__`` of its own under the usual `Model`, as GLM-5.2's."""

    def layers_here(self, inputs, cache):
        """The hidden states behind this rank's layers, received from the next rank and sent on."""
        h, rank = self.embed_tokens(inputs), self.pipeline_rank
        cache = cache or [None] * len(self.pipeline_layers)
        mask = create_attention_mask(h, cache[0])
        if rank < self.pipeline_size - 1:
            h = mx.distributed.recv_like(h, rank + 1)
        for layer, of_layer in zip(self.pipeline_layers, cache, strict=False):
            h = layer(h, mask, of_layer)
        if rank:
            h = mx.distributed.send(h, rank - 1)
            if cache[-1] is not None:
                cache[-1].keys = mx.depends(cache[-1].keys, h)
        return h


class AsUsual(Stage):
    def __call__(self, inputs, cache=None, input_embeddings=None):
        h = self.layers_here(inputs, cache)
        return self.norm(mx.distributed.all_gather(h)[: h.shape[0]])


class WithGroup(Stage):
    def __call__(self, inputs, cache=None, input_embeddings=None):
        h = self.layers_here(inputs, cache)
        return self.norm(mx.distributed.all_gather(h, group=GROUP)[: h.shape[0]])


class OnStream(Stage):
    def __call__(self, inputs, cache=None, input_embeddings=None):
        h = self.layers_here(inputs, cache)
        return self.norm(mx.distributed.all_gather(h, stream=mx.cpu)[: h.shape[0]])


class Twice(Stage):  # which is left to upstream
    def __call__(self, inputs, cache=None, input_embeddings=None):
        h = self.layers_here(inputs, cache)
        h = mx.distributed.all_gather(h)[: h.shape[0]]
        return self.norm(mx.distributed.all_gather(h)[: h.shape[0]])


@program(stage=[AsUsual, WithGroup, OnStream, Twice])
def call_of_its_own(stage):
    """A pipelined model's class has a call of its own, with its own hidden broadcast."""
    model = own_pipeline(checkpoint("qwen2-untied"))
    model.model.__class__ = stage
    return [tokens(model), direct(model), tokens(model, sampler=make_sampler(0.8))]
