"""Threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from programs.common import DRAFT, LOOPS, MODEL, OTHER, PROMPT, after, bias, loops, steps
from programs.registry import kind

THREADS = [ThreadPoolExecutor(1) for _ in range(2)]


def in_thread(number, function, *args):
    return THREADS[number].submit(function, *args).result()


def rest_in_threads():
    for number in range(len(THREADS)):
        in_thread(number, mx.synchronize, loops.generation_stream)
        in_thread(number, mx.synchronize)


@kind(order=["by turns", "moved", "from the main thread"], loop=LOOPS)
def threads(order, loop):
    """The steps of one generation are asked for in several threads, one after another.

    Each thread evaluates the caches: unpatched leaves a lazy array in them on workers, which no
    other thread can compute. The generation ends where it has begun: MLX refuses to leave a stream
    in another thread.
    """
    main = None
    order = {
        "by turns": [0, 1] * 4,
        "moved": [0, 0, 0, 1, 1, 1, 1, 1],
        "from the main thread": [main, 0, 0, 0, main, 1, 1, 1],
    }[order]
    if loop == "batch":
        batch = loops.BatchGenerator(MODEL, max_tokens=8)
        batch.insert([PROMPT, OTHER], logits_processors=[[bias(1)], []])

        def ask():
            told.append([[r.uid, r.token] for r in batch.next_generated()])
            mx.eval([c.state for c in batch._generation_batch.prompt_cache])
    else:
        cache = make_prompt_cache(MODEL)
        cache += make_prompt_cache(DRAFT) if loop == "speculation" else []
        running = steps(loop, make_sampler(0.0), [bias(1)], prompt_cache=cache)

        def ask():
            told.append(next(running, None))
            mx.eval([c.state for c in cache])

    told = []
    for thread in [*order, order[0]]:
        if thread is main:
            ask()
        else:
            in_thread(thread, ask)
    if loop == "batch":
        batch.close()
    rest_in_threads()
    return [told, after()]
