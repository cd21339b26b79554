"""mlx-lm's generation loops, wrapped: where heads are skipped, because tokens are shared.

`generate_step` serves `generate`, `stream_generate`, `mlx_lm.chat` and `mlx_lm.benchmark`. It is
upstream's loop that runs, with another sampler, and with its steps built inside a `Run`.
Not touched, so without a skipped head: `speculative_generate_step` and `GenerationBatch`
(`batch_generate`, `mlx_lm.server`), and a `generate_step` imported by name before the plugin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any

import mlx.core as mx

from . import config, patching
from .sharing import Run


def run_of(model: Any, stream: Any) -> Run | None:
    """A run of `model` on `stream`, or None where no head is to skip: one rank, or not patched."""
    family = patching.family_of(model)
    if family is None:
        return None
    owner = family.owner_of(model)
    stage = family.stage_of(owner)
    return Run(owner, stage.pipeline_rank, stream) if stage.pipeline_size > 1 else None


def generate_step(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The wrapper of `mlx_lm.generate.generate_step(prompt, model, ..., sampler=...)`.

    Yields rank 0's tokens on every rank. The logprobs beside them are rank 0's on rank 0, and NaN
    on workers. Samplers and logits processors run on rank 0 only.
    """
    if config.active == "off":
        return wrapped(*args, **kwargs)
    given = _arguments(wrapped, args, kwargs)
    run = run_of(given["model"], given["stream"]) if given else None
    if run is None:
        return wrapped(*args, **kwargs)
    kwargs = {
        **kwargs,
        "sampler": run.sampler(kwargs.get("sampler") or _greedy),
        "logits_processors": run.processors(kwargs.get("logits_processors")),
        "prompt_progress_callback": run.callback(kwargs.get("prompt_progress_callback")),
    }
    return _steps(run, wrapped(*args, **kwargs))


def _arguments(
    loop: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What `loop` was given or takes by default, by name; nothing if it will refuse the call."""
    try:
        bound = inspect.signature(loop).bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


def _greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)


def _steps(
    run: Run, loop: Generator[tuple[int, mx.array], None, None]
) -> Generator[tuple[int, mx.array], None, None]:
    """`loop`, each step of it built inside `run`, and the last one finished before it ends."""
    with patching.running():
        try:
            while True:
                with run.building():
                    try:
                        step = next(loop)
                    except StopIteration:
                        break
                yield step
        except GeneratorExit:
            # The caller stops here (a stop token, max_tokens), and so do the other ranks.
            loop.close()
            run.finish()
            raise
        run.finish()
