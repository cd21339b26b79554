"""Run by test_share_stream.py as a rank: does a worker's share wait for what it does not need?

Work that is queued on a second CPU stream, on which the worker computes, stands for a GPU. Within
`mx.stream(...)` of such a stream MLX takes it for the CPU's own too, so here `mx.cpu` and what
communicates are tied to the first one. Reports for each loop whether rank 0 had its token before
most of that work was done.
"""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path

import mlx.core as mx
import ranks
import wrapt

COMMUNICATION = mx.default_stream(mx.cpu)


def on_first_stream(wrapped, instance, args, kwargs):
    return wrapped(*args, **{"stream": COMMUNICATION, **kwargs})


for name in ("send", "recv_like", "all_gather", "all_sum"):
    wrapt.wrap_function_wrapper(mx.distributed, name, on_first_stream)
mx.cpu = COMMUNICATION

import tiny_models  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from mlx_lm_skiphead import install, rank_zero_head, share_tokens  # noqa: E402

loops = importlib.import_module("mlx_lm.generate")
RANK = ranks.join().rank()
PROMPT = mx.array(tiny_models.PROMPTS[1])


class Busy:
    """Seconds of work; a file appears when nine tenths of it are done.

    In two operations, since MLX holds a thread up that has more than ten of them under way.
    """

    def __init__(self, name: str) -> None:
        self.file = Path(os.environ["RANK_RESULTS"], name)
        self.noise = [mx.random.normal((size,)) for size in (9 << 20, 1 << 20)]
        mx.eval(self.noise)

    def begin(self, cache) -> None:
        """Once the forward pass is over, since that needs this stream."""
        mx.eval([layer.state for layer in cache])
        most, rest = map(mx.sort, self.noise)
        mx.async_eval(most, rest)
        threading.Thread(target=lambda: (mx.eval(most), self.file.touch())).start()


def in_mlx_lm(model) -> bool:
    cache, busy, calls = make_prompt_cache(model), Busy("generate_step"), []

    def sampler(logprobs):
        if RANK and not calls:
            busy.begin(cache)
        calls.append(1)
        return mx.argmax(logprobs, axis=-1)

    # No token is asked for, so no second step is begun: for that rank 0 would wait.
    list(loops.generate_step(PROMPT, model, max_tokens=0, sampler=sampler, prompt_cache=cache))
    return not busy.file.exists()


def in_own_loop(model) -> bool:
    cache, busy = make_prompt_cache(model), Busy("share_tokens")
    with mx.stream(loops.generation_stream):
        with rank_zero_head():
            logits = model(PROMPT[None], cache=cache)
        if RANK:
            busy.begin(cache)
        share_tokens(mx.argmax(logits[:, -1], axis=-1)).item()
    return not busy.file.exists()


install(strict=True)
model = tiny_models.make("deepseek_v3")
model.model.pipeline(ranks.join())
ranks.report({"generate_step": in_mlx_lm(model), "share_tokens": in_own_loop(model)})
