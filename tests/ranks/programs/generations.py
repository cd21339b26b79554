"""Usual generations, one after another, and what is drawn or pickled beside them."""

from __future__ import annotations

import pickle

import mlx.core as mx
import tiny_models
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from programs.common import LOOPS, OTHER, PROMPT, after, bias, loops, rest, steps
from programs.models import MODEL, loaded
from programs.registry import program


@program(loop=LOOPS)
def usual(loop):
    """Generations of all kinds, one after another, and into each other's caches."""
    told = [list(steps(loop)), list(steps(loop, make_sampler(0.8), [bias(1)]))]
    for prompt in tiny_models.PROMPTS:
        told.append(list(steps(loop, prompt=prompt, n=3)))
    if loop == "generate":
        cache = make_prompt_cache(MODEL)
        for prompt in (PROMPT, OTHER, [9]):
            told.append(list(steps(loop, prompt=prompt, n=3, prompt_cache=cache)))
            rest()
    return [told, after()]


@program("mlx-lm #1439")
def drawn_between():
    """Numbers are drawn between the steps, and after a generator that was left and is kept."""
    model, told, kept = loaded(), [], []
    mx.random.seed(7)
    for _ in range(2):
        running = loops.generate_step(mx.array(PROMPT), model, sampler=make_sampler(0.8))
        kept.append(running)
        for number, (token, _) in enumerate(running):
            told += [token, mx.random.uniform().item()]
            if number == 4:
                break
        told.append(mx.random.uniform().item())
    mx.synchronize(loops.generation_stream)
    kept.clear()
    return told


@program()
def pickled_loop():
    """The loop is pickled, as for another process, and is the same function after that."""
    return [pickle.loads(pickle.dumps(loops.generate_step)) is loops.generate_step]
