"""Batches, errors."""

from __future__ import annotations

import itertools
import pickle

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from programs.loading import PROMPT, load, loops, tokens


class Stop(BaseException):
    pass


def stopping_at(at, error):
    calls = itertools.count()

    def processor(context, logits):
        if next(calls) == at:
            raise error(f"call {at}")
        return logits

    return processor


def two_batches(second):
    """Two batches by turns; a processor of the first raises, and the first goes on after that."""
    model = load()
    other = load() if second else model
    mx.random.seed(7)
    failing = loops.BatchGenerator(model, max_tokens=12, sampler=make_sampler(0.7))
    going = loops.BatchGenerator(other, max_tokens=12, sampler=make_sampler(0.7))
    failing.insert([PROMPT, [5]], logits_processors=[[stopping_at(4, ValueError)], []])
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


def looks(context, logits):
    """A processor that cannot do with NaN."""
    int(logits[0, 0].item())
    return logits


def errors():
    """What all ranks raise in one call; beside what only workers raise, before that and after."""
    model, told = load(), []
    for error in (SystemExit, Stop, ValueError):
        for before, after, options in (
            ([], [], {}),
            ([], [], {"sampler": make_sampler(0.8)}),
            ([looks], [], {}),
            ([], [looks], {"sampler": make_sampler(0.8)}),
            # Behind the call that fails, in the same step: keys are too short to be quantized.
            ([], [], {"kv_bits": 8, "kv_group_size": 64, "quantized_kv_start": len(PROMPT) + 3}),
        ):
            seen = []
            try:
                for token, _ in loops.generate_step(
                    mx.array(PROMPT),
                    model,
                    logits_processors=[*before, stopping_at(3, error), *after],
                    **options,
                ):
                    seen.append(token)
            except error as raised:
                seen.append(f"{type(raised).__name__} {raised}")
            mx.synchronize(loops.generation_stream)
            told.append(
                [seen, mx.random.uniform().item(), tokens(model, sampler=make_sampler(0.5))]
            )
    return told


class Done:
    """A processor that has had enough when it has seen five tokens of the answer."""

    def __init__(self, after=5):
        self.done, self.left = False, after

    def __call__(self, context, logits):
        self.left -= 1
        self.done = self.left <= 0
        return logits


def done():
    model = load()
    told, processor = [], Done()
    for token, _ in loops.generate_step(
        mx.array(PROMPT), model, max_tokens=20, logits_processors=[processor]
    ):
        told.append(token)
        if processor.done:
            break
    mx.synchronize(loops.generation_stream)
    batch = loops.BatchGenerator(model, max_tokens=12)
    processor = Done()
    uids = batch.insert([PROMPT, [5]], logits_processors=[[processor], []])
    while responses := batch.next_generated():
        told += [[r.uid, r.token] for r in responses]
        if processor.done and uids:
            batch.remove(uids[:1])
            uids = []
    batch.close()
    mx.synchronize(loops.generation_stream)
    return told


def random():
    """Numbers drawn between the steps, and after a generator that was left and is still there."""
    model, told = load(), []
    mx.random.seed(7)
    kept = []
    for _ in range(2):
        steps = loops.generate_step(mx.array(PROMPT), model, sampler=make_sampler(0.8))
        kept.append(steps)
        for number, (token, _) in enumerate(steps):
            told += [token, mx.random.uniform().item()]
            if number == 4:
                break
        told.append(mx.random.uniform().item())
    mx.synchronize(loops.generation_stream)
    kept.clear()
    return told


def forced():
    """A sampler whose ids do not come from logits, as where a grammar allows one token only."""
    model, calls = load(), itertools.count(5)
    return [tokens(model, sampler=lambda logprobs: mx.array([next(calls)])), tokens(model)]


def small():
    step = pickle.loads(pickle.dumps(loops.generate_step))
    return [step is loops.generate_step]
