"""Lists of processors that change, and what reads numbers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_logits_processors

from programs.common import LOOPS, MODEL, after, bias, greedy, rest, steps
from programs.registry import kind


class Chosen(list):
    """A list that decides anew, each time it is read, which of its members count."""

    enabled = True

    def __iter__(self):
        return iter([p for p in list.__iter__(self) if self.enabled])


@kind(change=["clear", "extend", "swap", "filter"], loop=LOOPS)
def live_list(change, loop):
    """The list of processors is another one from the fourth step on."""
    processors = Chosen([bias(1)]) if change == "filter" else [bias(1)]
    told = []
    for step in steps(loop, processors=processors, n=9):
        told.append(step)
        if len(told) == 3:
            if change == "clear":
                processors.clear()
            elif change == "extend":
                processors.extend([bias(2), *make_logits_processors({9: 3.0})])
            elif change == "swap":
                processors[0] = bias(2)
            else:
                processors.enabled = False
    return [told, after()]


NORM_SAW_NAN = {}


@kind(how=["eager", "lazy"], loop=LOOPS)
def tap(how, loop):
    """A package that looks at the hidden states which the final norm gets."""
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
    NORM_SAW_NAN[f"{how}, {loop}"] = sorted({flag.item() for flag in taken})
    return [told, len(taken) > 4, after()]


@kind(reader=["memoryview", "frombuffer"], where=["processor", "sampler"], loop=LOOPS)
def buffers(reader, where, loop):
    """A loop that ends when what reads the memory of logits has been fed often enough."""
    fed = []

    def read(logits):
        if reader == "memoryview":
            fed.append(len(memoryview(logits).cast("B")))
        else:
            fed.append(np.frombuffer(logits, np.float32).size)

    def processor(tokens, logits):
        read(logits)
        return logits

    def sampler(logprobs):
        read(logprobs)
        return greedy(logprobs)

    told = []
    options = {"sampler": sampler} if where == "sampler" else {"processors": [processor]}
    for step in steps(loop, n=50, **options):
        told.append(step)
        if len(fed) >= 6:
            break
    return [told, fed, after()]
