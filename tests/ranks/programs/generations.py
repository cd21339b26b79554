"""Usual generations."""

from __future__ import annotations

import mlx.core as mx
import tiny_models
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from programs.common import LOOPS, MODEL, OTHER, PROMPT, after, bias, loops, rest, steps
from programs.registry import kind


@kind(loop=LOOPS)
def usual(loop):
    """Generations of all kinds, one after another, and into each other's caches."""
    told = [list(steps(loop)), list(steps(loop, make_sampler(0.8), [bias(1)]))]
    for prompt in tiny_models.PROMPTS:
        told.append(list(steps(loop, prompt=prompt, n=3)))
    if loop == "generate":
        cache = make_prompt_cache(MODEL)
        for prompt in (PROMPT, OTHER, [9]):
            told.append(
                [
                    token
                    for token, _ in loops.generate_step(
                        mx.array(prompt), MODEL, max_tokens=3, prompt_cache=cache
                    )
                ]
            )
            rest()
    return [told, after()]


@kind()
def joins():
    """Requests that come and go while a batch runs."""
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
