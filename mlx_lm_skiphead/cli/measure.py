"""What one rank measures: how long a model loads, its tokens, when they came, heads evaluated."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx_lm.utils
import wrapt
from mlx_lm.sample_utils import make_sampler

from .. import status
from ..dead_weights import is_pending
from ..families import BY_NAME, Family


class Generated(NamedTuple):
    """One generation on this rank."""

    tokens: list[int]
    text: str
    seconds: list[float]
    """When each token came, from the start of the generation."""


def load(model: str, group: mx.distributed.Group) -> tuple[Any, Any, float]:
    """Load a model that is split over `group`: the model, its tokenizer and how long that took.

    In seconds, without the wait for other ranks that `sharded_load` ends with.
    """
    gc.collect()
    waits: list[float] = []

    def begin_to_wait(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        waits.append(time.perf_counter())
        return wrapped(*args, **kwargs)

    handle = wrapt.wrap_function_wrapper(mx.distributed, "all_sum", begin_to_wait)
    try:
        start = time.perf_counter()
        loaded, tokenizer = mlx_lm.utils.sharded_load(model, pipeline_group=group)
    finally:
        wrapt.unwrap_object(mx.distributed, "all_sum", handle)
    gc.collect()
    return loaded, tokenizer, waits[0] - start


def generate(
    model: Any, tokenizer: Any, prompt: list[int], max_tokens: int, temperature: float = 0.0
) -> Generated:
    """Generate through `stream_generate`, from the same random state each time."""
    mx.random.seed(0)
    tokens, text, seconds = [], "", []
    start = time.perf_counter()
    for step in mlx_lm.stream_generate(
        model, tokenizer, prompt, max_tokens, sampler=make_sampler(temperature)
    ):
        seconds.append(time.perf_counter() - start)
        tokens.append(step.token)
        text += step.text
    return Generated(tokens, text, seconds)


def family_of(model: Any) -> Family:
    """The family of a loaded model, from where its class was defined.

    Raises:
        ValueError: if mlx-lm-skiphead does not support it.
    """
    for cls in type(model).__mro__:
        family = BY_NAME.get(cls.__module__.rpartition(".")[2])
        if family is not None and not family.is_alias:
            return family
    raise ValueError(f"mlx-lm-skiphead does not support {type(model).__module__}")


def refused(family: str) -> str:
    """Why nothing is skipped although the plugin is on, or ""."""
    now = status()
    targets = now.families | now.loops
    said = {name: str(targets[name]) for name in (family, "generate_step")}
    return "; ".join(f"{name} is {s}" for name, s in said.items() if s != "patched")


class HeadCount:
    """How often a head was evaluated on this rank."""

    def __init__(self) -> None:
        self._logits: list[mx.array] = []

    def evaluated(self) -> int:
        """Heads whose matrix product was computed.

        MLX is lazy: logits that a call of the head returned need not be computed ever, as in
        prefill. Those that were have no operation behind them any more.
        """
        return sum(not is_pending(logits) for logits in self._logits)


@contextmanager
def count_heads(model: Any) -> Iterator[HeadCount]:
    """Count the heads of `model` that this rank evaluates inside the ``with`` block."""
    count = HeadCount()

    def counted(run_head: Callable[[], mx.array]) -> mx.array:
        logits = run_head()
        count._logits.append(logits)
        return logits

    with around_head(model, counted):
        yield count


@contextmanager
def around_head(model: Any, around: Callable[[Callable[[], mx.array]], mx.array]) -> Iterator[None]:
    """Inside the ``with`` block `around` is called where the head of `model` is to run.

    It is given a function that runs it, and gives the logits.
    """
    family = family_of(model)
    head = family.head_of(family.owner_of(model))
    # An embedding that serves as the head does so through another method.
    method = "as_linear" if hasattr(head, "as_linear") else "__call__"
    cls = type(head)

    def called(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if instance is not head:
            return wrapped(*args, **kwargs)
        return around(lambda: wrapped(*args, **kwargs))

    handle = wrapt.wrap_function_wrapper(cls, method, called)
    try:
        yield
    finally:
        wrapt.unwrap_object(cls, method, handle)
