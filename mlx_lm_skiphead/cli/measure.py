"""What a rank measures of a model: tokens, their times, and how often the head was evaluated."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import wrapt

from .core import is_pending
from .models import family_of

__all__ = ["around_head", "count_heads", "decode", "family_of"]


def decode(
    model: Any, prompts: list[list[int]], tokens: int
) -> tuple[list[tuple[int, int, int]], list[float]]:
    """Generate `tokens` for each of a batch of prompts, greedily, whatever the stop tokens are.

    Through `generate_step` for one prompt, else through `BatchGenerator`.

    Returns:
        ``(step, prompt, id)`` of each token; and when each step ended, in seconds from the start.
    """
    loops: Any = importlib.import_module("mlx_lm.generate")
    steps = (_one if len(prompts) == 1 else _batch)(loops, model, prompts, tokens)
    generated, seconds = [], []
    start = time.perf_counter()
    for number, ids in enumerate(steps):
        seconds.append(time.perf_counter() - start)
        generated += [(number, prompt, token) for prompt, token in sorted(ids.items())]
    # Unpatched mlx-lm leaves a step in flight, which must not reach into what comes next.
    mx.synchronize(loops.generation_stream)
    return generated, seconds


def _one(loops: Any, model: Any, prompts: list[list[int]], tokens: int) -> Iterator[dict[int, int]]:
    for token, _ in loops.generate_step(mx.array(prompts[0]), model, max_tokens=tokens):
        yield {0: token}


def _batch(
    loops: Any, model: Any, prompts: list[list[int]], tokens: int
) -> Iterator[dict[int, int]]:
    size = len(prompts)
    generator = loops.BatchGenerator(
        model, completion_batch_size=size, prefill_batch_size=size, stop_tokens=[]
    )
    uids = generator.insert(prompts, max_tokens=[tokens] * size)
    while responses := generator.next_generated():
        yield {uids.index(response.uid): response.token for response in responses}
    generator.close()


class HeadCount(list[mx.array]):
    """The logits of all calls of a head on this rank."""

    def evaluated(self) -> int:
        """Heads whose matrix product was computed.

        MLX is lazy: logits that a call of the head returned may never be computed, as in prefill.
        Those that were have no operation behind them any more.
        """
        return sum(not is_pending(logits) for logits in self)


@contextmanager
def count_heads(model: Any) -> Iterator[HeadCount]:
    """Count the heads of `model` that this rank evaluates inside the ``with`` block."""
    count = HeadCount()

    def counted(run_head: Callable[[], mx.array]) -> mx.array:
        count.append(run_head())
        return count[-1]

    with around_head(model, counted):
        yield count


@contextmanager
def around_head(model: Any, around: Callable[[Callable[[], mx.array]], mx.array]) -> Iterator[None]:
    """Inside the ``with`` block call `around` where the head of `model` is to run.

    Its argument is a function that runs the head and returns the logits. It returns the logits.
    """
    family = family_of(model)
    head = family.head_of(family.owner_of(model))
    # An embedding that serves as the head does so through another method.
    method = "as_linear" if hasattr(head, "as_linear") else "__call__"

    def called(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if instance is not head:
            return wrapped(*args, **kwargs)
        return around(lambda: wrapped(*args, **kwargs))

    handle = wrapt.wrap_function_wrapper(type(head), method, called)
    try:
        yield
    finally:
        wrapt.unwrap_object(type(head), method, handle)
