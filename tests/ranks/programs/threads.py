"""Threads: generations asked for in several, and models loaded, read or changed in another one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from programs.common import (
    LOOPS,
    OTHER,
    PROMPT,
    after,
    bias,
    direct,
    install,
    loops,
    steps,
    tokens,
    uninstall,
)
from programs.models import DRAFT, MODEL, checkpoint, load
from programs.registry import program

# They are kept: MLX may abort where a thread ends in which it has computed.
THREADS = [ThreadPoolExecutor(1) for _ in range(2)]


def in_thread(number, function, *args):
    return THREADS[number].submit(function, *args).result()


def rest_in_threads():
    for number in range(len(THREADS)):
        in_thread(number, mx.synchronize, loops.generation_stream)
        in_thread(number, mx.synchronize)


@program(order=["by turns", "moved", "from the main thread"], loop=LOOPS)
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


@program()
def loaded_in_a_thread():
    """A thread loads a model and calls it: a head on disk must be read in that thread."""
    checkpoint("qwen2-untied")
    return in_thread(0, lambda: direct(load()))


@program()
def quantized_in_a_thread():
    """A model is quantized in a thread: no other can compute it, and `uninstall()` must not try."""
    model = load()

    def quantize():
        nn.quantize(model, group_size=32)
        return tokens(model)

    told = in_thread(0, quantize)
    uninstall()
    install()
    return told
