"""Logits processors: lists of them that change, those that stop a loop, and what reads memory."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_logits_processors

from programs.common import LOOPS, PROMPT, after, bias, greedy, loops, steps
from programs.models import loaded
from programs.registry import program


class Chosen(list):
    """A list that decides anew, each time it is read, which of its members count."""

    enabled = True

    def __iter__(self):
        return iter([p for p in list.__iter__(self) if self.enabled])


@program(change=["clear", "extend", "swap", "filter"], loop=LOOPS)
def live_list(change, loop):
    """The list of processors is another one from the fourth step on, on workers too."""
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


@program(reader=["memoryview", "frombuffer"], where=["processor", "sampler"], loop=LOOPS)
def buffers(reader, where, loop):
    """A loop ends when what reads the memory of logits, NaN or not, was fed often enough."""
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


class Done:
    """A processor that has had enough when it has been called five times."""

    def __init__(self, after=5):
        self.done, self.left = False, after

    def __call__(self, context, logits):
        self.left -= 1
        self.done = self.left <= 0
        return logits


@program()
def done():
    """A loop is left when a processor says so: on workers at another step, if called less often."""
    told, processor = [], Done()
    for token, _ in loops.generate_step(
        mx.array(PROMPT), loaded(), max_tokens=20, logits_processors=[processor]
    ):
        told.append(token)
        if processor.done:
            break
    mx.synchronize(loops.generation_stream)
    return told


@program()
def done_in_a_batch():
    """A request leaves its batch when its processor says so, and the other goes on."""
    batch, told, processor = loops.BatchGenerator(loaded(), max_tokens=12), [], Done()
    uids = batch.insert([PROMPT, [5]], logits_processors=[[processor], []])
    while responses := batch.next_generated():
        told += [[r.uid, r.token] for r in responses]
        if processor.done and uids:
            batch.remove(uids[:1])
            uids = []
    batch.close()
    mx.synchronize(loops.generation_stream)
    return told
