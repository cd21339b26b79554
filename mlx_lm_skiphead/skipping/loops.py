"""mlx-lm's generation loops, wrapped: where heads are skipped, because tokens are shared.

- `generate_step` serves `generate`, `stream_generate`, `mlx_lm.chat` and `mlx_lm.benchmark`;
- `GenerationBatch` serves `BatchGenerator`, `batch_generate` and `mlx_lm.server`;
- `speculative_generate_step` is wrapped in speculation.py.

It is upstream's loop that runs, each time, with its steps built inside a `Run`, and with samplers
whose ids are rank 0's. Not touched: a loop that was imported by name before the plugin.
"""

from __future__ import annotations

import inspect
import zlib
from array import array
from collections.abc import Callable, Generator, Iterable
from typing import Any

import mlx.core as mx

from ..families import LOOPS_MODULE, stage_in
from ..patching import drift
from ..patching.frames import caller
from ..patching.handles import Patch
from ..patching.registry import has_begun, has_ended, this_thread
from . import programs
from .head import BROADCAST
from .sharing import Run

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
LOST = "every rank runs the head in it"


def run_of(model: Any, prompt: Iterable[int], chunks: int = 0) -> Run | None:
    """A run of `model`, or None where there is no head to skip.

    Args:
        model: as mlx-lm loads it.
        prompt: the ids that all ranks should have been given.
        chunks: how many forward passes compute what comes before the prompt's last token.
    """
    stage = stage_in(model)
    if stage is None:
        return None
    return Run(stage, stage.pipeline_rank, zlib.crc32(array("q", prompt).tobytes()), chunks)


def generate_step(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.generate_step(prompt, model, ..., sampler=...)`.

    Yields rank 0's tokens on every rank. The logprobs beside them are rank 0's on rank 0, and NaN
    on workers.
    """
    given, run = begin(wrapped, args, kwargs)
    if run is None:
        return wrapped(*args, **kwargs)
    sample = programs.sampler(run, given["sampler"]) if given["sampler"] else greedy
    changed = {
        "sampler": lambda logprobs: run.share(sample(logprobs)),
        "logits_processors": programs.Processors(run, given["logits_processors"]),
        "prompt_progress_callback": programs.callback(run, given["prompt_progress_callback"]),
    }
    return steps(run, wrapped, given | changed, in_flight=1)


def batch_step(wrapped: Wrapped, batch: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.GenerationBatch._step`: one share for the whole batch."""
    if "_skiphead_run" not in vars(batch):
        last = batch._next_tokens.tolist()
        ids = [t for ids, end in zip(batch.tokens, last, strict=False) for t in (*ids, end)]
        _set_run(batch, run_of(batch.model, ids))
    run = _get_run(batch)
    if run is None:
        return wrapped(*args, **kwargs)
    guards = _guards(batch, run)
    own = {name: vars(batch)[name] for name in guards}
    with run.building():
        try:
            vars(batch).update(guards)
            result = wrapped(*args, **kwargs)
        finally:
            vars(batch).update(own)
        run.check(in_flight=1)
    return result


def _get_run(batch: Any) -> Any:
    return vars(batch).get("_skiphead_run")


def _set_run(batch: Any, run: Run | None) -> None:
    vars(batch)["_skiphead_run"] = run
    if run is not None:
        has_begun(batch)


def _guards(batch: Any, run: Run) -> dict[str, Any]:
    """For a step: attributes of `batch` in which samplers and processors fail on all ranks."""
    own = [*(batch.samplers or ()), batch.fallback_sampler]
    # By id: upstream asks whether all are the same one.
    samplers = {id(sample): sample and programs.sampler(run, sample) for sample in own}
    return {
        "samplers": [samplers[id(sample)] for sample in batch.samplers or ()],
        "fallback_sampler": samplers[id(batch.fallback_sampler)],
        "logits_processors": [
            list(programs.Processors(run, processors)) for processors in batch.logits_processors
        ],
    }


class NextTokens:
    """A data descriptor for `GenerationBatch._next_tokens`: a step that assigns it shares it.

    The assignment is where upstream has sampled, in whichever way, and has not yet begun to
    compute the step: sharing after that would lose the overlap of building and computing.
    """

    def __get__(self, batch: Any, cls: type | None = None) -> Any:
        if batch is None:
            return self
        try:
            return vars(batch)["_next_tokens"]
        except KeyError:
            raise AttributeError("_next_tokens") from None

    def __set__(self, batch: Any, tokens: Any) -> None:
        run = _get_run(batch)
        is_step = run is not None and this_thread.run is run
        vars(batch)["_next_tokens"] = run.share(tokens) if is_step else tokens


def batch_extend(wrapped: Wrapped, batch: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `GenerationBatch.extend`: takes over what is in flight."""
    wrapped(*args, **kwargs)
    mine, theirs = _get_run(batch), _get_run(args[0] if args else kwargs["batch"])
    if mine is None:
        _set_run(batch, theirs)
    elif theirs is not None:
        mine.shares.extend(theirs.shares)
        mine.last = mine.last if theirs.last is None else theirs.last


def batch_prompt(wrapped: Wrapped, batch: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.PromptProcessingBatch.prompt`, which fills the caches.

    Nothing is sampled and so nothing shared. Upstream builds a head for each chunk and never
    evaluates it; here its weights are not even read.
    """
    # Between prompts it is called for each step, and has nothing to do.
    run = run_of(batch.model, ()) if batch.uids else None
    last = vars(batch).get("_skiphead_prompt")
    vars(batch)["_skiphead_prompt"] = run
    if run is None:
        return wrapped(*args, **kwargs)
    # A `BatchGenerator` gives a chunk of each prompt, and keeps the rest in segments. A segment
    # begins with a new chunk; the last one, a token, is no chunk.
    frame, size = caller(LOOPS_MODULE, "_next"), batch.prefill_step_size
    given = [([ids],) for ids in (args[0] if args else kwargs["tokens"])]
    prompts = getattr(frame and frame.f_locals["self"], "_currently_processing", given)
    chunks = (sum(-(-len(ids) // size) for ids in segments) for segments, *_ in prompts)
    run.chunk = last.chunk if last else 0
    run.chunks = run.chunk + max(chunks, default=0)
    with run.building():
        return wrapped(*args, **kwargs)


def batch_close(wrapped: Wrapped, generator: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `BatchGenerator.close`: the last step is finished."""
    wrapped(*args, **kwargs)
    batch = vars(generator).get("_generation_batch")
    run = None if batch is None else _get_run(batch)
    # Without: Python is exiting, where names of modules are gone before what is closed then.
    if run is not None and has_ended is not None:
        has_ended(batch)
        run.finish(generator._stream)


def row(path: str, wrapper: Any, needs: drift.Needs) -> Patch:
    """The row of a loop in the table of patches."""
    group = path if "." not in path else "GenerationBatch"
    return Patch(group, LOOPS_MODULE, path, wrapper, needs, LOST, base=BROADCAST)


_SAMPLING = ("samplers", "fallback_sampler", "logits_processors")
_CALL = drift.signature(
    "model", "sampler", "logits_processors", "prompt_progress_callback", is_generator=True
)
_STEP = drift.uses("model", "uids", "tokens", *_SAMPLING, assigns="_next_tokens")
PATCHES = (
    row("generate_step", generate_step, _CALL),
    row("GenerationBatch._step", batch_step, _STEP),
    row("GenerationBatch._next_tokens", NextTokens(), drift.nothing),
    row("GenerationBatch.extend", batch_extend, drift.signature("batch")),
    row("PromptProcessingBatch.prompt", batch_prompt, drift.uses("model", "prefill_step_size")),
    row("BatchGenerator.close", batch_close, drift.uses("_stream")),
)


def begin(wrapped: Wrapped, args: Args, kwargs: Kwargs) -> tuple[Kwargs, Run | None]:
    """The arguments of `wrapped`, given or by default, by name; and a run if its model is split."""
    try:
        bound = inspect.signature(wrapped).bind(*args, **kwargs)
    except TypeError:  # which it will raise itself
        return {}, None
    bound.apply_defaults()
    given = bound.arguments
    prompt = getattr(given["prompt"], "tolist", lambda: ())()
    prompt = prompt if isinstance(prompt, list) else ()
    chunks = -((1 - len(prompt)) // (given.get("prefill_step_size") or 1))
    return given, run_of(given["model"], prompt, chunks)


def steps(
    run: Run, wrapped: Wrapped, changed: Kwargs, in_flight: int
) -> Generator[Any, None, None]:
    """The loop with `changed` arguments, each step of it built inside `run`; the last is finished.

    Args:
        run: the generation.
        wrapped: upstream's loop.
        changed: its arguments.
        in_flight: how many shares the loop has begun and not waited for when it yields.
    """
    loop = wrapped(**changed)
    # mlx-lm 0.31 has the one stream of the module in place of the parameter.
    stream = changed.get("stream") or inspect.unwrap(wrapped).__globals__["generation_stream"]
    has_begun(run)
    try:
        while True:
            with run.building():
                step = next(loop, None)
                if step is not None:
                    run.check(in_flight)
            if step is None:
                break
            yield step
        run.finish(stream)
    except BaseException as error:
        # The caller stops here (a stop token, max_tokens), and so do the other ranks; or rank 0
        # has failed, and they know.
        loop.close()
        if isinstance(error, GeneratorExit) or run.has_failed:
            run.finish(stream)
        elif run.step.errors and isinstance(error, Exception):
            # Upstream would not have come as far as this error. Ctrl-C counts at once.
            raise next(iter(run.step.errors.values())) from None
        raise
    finally:
        has_ended(run)


def greedy(logprobs: mx.array) -> mx.array:
    """The default sampler: the most likely ids ``(B,)`` of logprobs ``(B, V)``."""
    return mx.argmax(logprobs, axis=-1)
