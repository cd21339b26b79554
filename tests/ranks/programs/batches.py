"""Batches whose requests come and go, and two batches by turns."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from programs.common import PROMPT, Raising, after, loops
from programs.models import MODEL, load, loaded
from programs.registry import program


@program()
def joins():
    """Requests come and go while a batch runs: its size changes from step to step."""
    batch = loops.BatchGenerator(MODEL, max_tokens=9)
    uids = batch.insert([PROMPT])
    told = []
    for number in range(14):
        told.append([[r.uid, r.token] for r in batch.next_generated()])
        if number in (1, 4, 9):
            uids += batch.insert([[number, 8], [40 + number] * 5][: 1 + number % 2])
        if number == 5:
            batch.remove(uids[1:2])
    batch.close()
    return [told, after()]


@program("smg #1099", models=["one model", "two models"])
def two_batches(models):
    """Two batches by turns; a processor of the first raises, and the first goes on after that."""
    model = loaded()
    other = load() if models == "two models" else model
    mx.random.seed(7)
    failing = loops.BatchGenerator(model, max_tokens=12, sampler=make_sampler(0.7))
    going = loops.BatchGenerator(other, max_tokens=12, sampler=make_sampler(0.7))
    failing.insert([PROMPT, [5]], logits_processors=[[Raising(ValueError, at=4)], []])
    going.insert([[9, 8, 7]])
    told = []
    for _ in range(10):
        for name, batch in (("failing", failing), ("going", going)):
            try:
                told.append([name, [[r.uid, r.token] for r in batch.next_generated()]])
            except ValueError as error:
                told.append([name, str(error)])
    failing.close()
    going.close()
    mx.synchronize(loops.generation_stream)
    return [told, mx.random.uniform().item()]
