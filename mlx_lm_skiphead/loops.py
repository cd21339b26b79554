"""mlx-lm's generation loops, wrapped: where heads are skipped, because tokens are shared.

- `generate_step` serves `generate`, `stream_generate`, `mlx_lm.chat` and `mlx_lm.benchmark`;
- `GenerationBatch` serves `BatchGenerator`, `batch_generate` and `mlx_lm.server`;
- `speculative_generate_step`, where a pipelined model checks what a draft model on every rank
  proposes.

It is upstream's loop that runs, each time, with its steps built inside a `Run`, and with samplers
whose ids are rank 0's. Not touched: a loop that was imported by name before the plugin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any

import mlx.core as mx
import wrapt

from . import config, drift, registry
from .families import LOOPS_MODULE
from .handles import Patch
from .sharing import Run, Sampler, outside, this_thread

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def run_of(model: Any) -> Run | None:
    """A run of `model`, or None where there is no head to skip: one rank, or not patched."""
    split = registry.split_of(model)
    return Run(split.owner, split.stage.pipeline_rank != 0) if split else None


def generate_step(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.generate_step(prompt, model, ..., sampler=...)`.

    Yields rank 0's tokens on every rank. The logprobs beside them are rank 0's on rank 0, and NaN
    on workers.
    """
    given = _arguments(wrapped, args, kwargs)
    run = run_of(given.get("model"))
    if run is None:
        return wrapped(*args, **kwargs)
    changed = {
        **kwargs,
        "sampler": run.sampling(given["sampler"] or _greedy),
        "logits_processors": [run.processing(p) for p in given["logits_processors"] or []],
        "prompt_progress_callback": outside(given["prompt_progress_callback"]),
    }
    loop = wrapped(*args, **changed), wrapped(*args, **kwargs)
    return _steps(run, given["model"], loop, _stream(wrapped, given), in_flight=1)


def speculative_generate_step(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.speculative_generate_step(prompt, model, draft_model, ...)`.

    The tokens that the pipelined `model` accepts are shared, all of a step at once. What the draft
    model proposes is sampled on every rank, as upstream does; the share compares it.
    """
    given = _arguments(wrapped, args, kwargs)
    run = run_of(given.get("model"))
    if run is None:
        return wrapped(*args, **kwargs)
    steered = _Speculation(run, given["sampler"] or _greedy)
    processors = given["logits_processors"]
    # The draft goes by keyword from here on, or upstream would be given it twice.
    names = list(inspect.signature(wrapped).parameters)
    changed = {
        **dict(zip(names[2:], args[2:], strict=False)),
        **kwargs,
        "draft_model": _Draft(given["draft_model"], run),
        "sampler": steered.sample,
        "logits_processors": [run.processing(p) for p in processors] if processors else None,
    }
    loop = wrapped(*args[:2], **changed), wrapped(*args, **kwargs)
    return _steps(run, given["model"], loop, _stream(wrapped, given), in_flight=0)


class _Speculation:
    """Sampling in `speculative_generate_step`, which samples for both models.

    The step's positions come all at once, or, with logits processors, one after another: rank 0
    collects what it samples and shares with the last one. A worker shares with the first, and so
    has what the processors of the next positions may look at.
    """

    def __init__(self, run: Run, sampler: Sampler) -> None:
        self._run = run
        self._sampler = sampler
        self._sampled: list[mx.array] = []
        self._shared: mx.array | None = None

    def sample(self, logprobs: mx.array) -> mx.array:
        """Tokens ``(n,)`` of ``(n, V)``: the draft's, or rank 0's for the pipelined model."""
        run, rows = self._run, logprobs.shape[0]
        sampled = run.attempt(self._sampler, logprobs)
        if not run.sent and self._shared is None:  # the draft model's
            return mx.zeros((rows,), mx.uint32) if sampled is None else sampled
        if run.is_worker:
            if self._shared is None:
                positions = run.sent[0].shape[1]
                # What has been sampled so far counts for nothing but its shape and type.
                own = mx.zeros((positions,), mx.uint32) if sampled is None else sampled
                own = own if rows == positions else mx.broadcast_to(own[:1], (positions,))
                self._shared = self._share(own, positions)
            tokens, self._shared = self._shared[:rows], self._shared[rows:]
            if not self._shared.size:
                self._shared = None
                self._agree()
            return tokens
        self._sampled.append(mx.zeros((rows,), mx.uint32) if sampled is None else sampled)
        positions = run.sent[0].shape[1]
        if sum(t.shape[0] for t in self._sampled) < positions and run.failure is None:
            return self._sampled[-1]
        everything, self._sampled = mx.concatenate(self._sampled), []
        tokens = self._share(everything if run.failure is None else None, positions)
        self._agree()
        return tokens[positions - rows :]

    def _share(self, tokens: mx.array | None, positions: int) -> mx.array:
        run = self._run
        assert run.inputs is not None
        return run.share(tokens, positions, compare=run.inputs.flatten())

    def _agree(self) -> None:
        """What rank 0 raised, all raise; and drafts that differ are an error on all ranks at once.

        Waits for the share, as upstream does next.
        """
        run = self._run
        difference = run.differing()
        run.check(in_flight=0)
        if difference:
            run.has_failed = True
            raise RuntimeError(
                "The ranks differ in what the draft model proposed: a sampler or a logits "
                "processor keeps a state that depends on the values of logits, which workers do "
                "not compute with mlx-lm-skiphead. Call mlx_lm_skiphead.uninstall() on all ranks "
                f"before this generation. The ids were {difference}."
            )


class _Draft(wrapt.CallableObjectProxy):  # type: ignore[type-arg]
    """The draft model, where a call says that what is sampled next is its own."""

    def __init__(self, draft_model: Any, run: Run) -> None:
        super().__init__(draft_model)
        self._self_run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._self_run.sent.clear()
        return self.__wrapped__(*args, **kwargs)


def batch_step(wrapped: Wrapped, batch: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.GenerationBatch._step`: one share for the whole batch."""
    run = _run_of_batch(batch)
    if run is None:
        return wrapped(*args, **kwargs)
    own = batch.samplers, batch.fallback_sampler, batch.logits_processors
    cls = type(batch)
    with run:
        try:
            _guard(batch, run)
            batch.__class__ = _sharing_classes.get(cls) or _sharing(cls)
            result = wrapped(*args, **kwargs)
        finally:
            batch.__class__ = cls
            batch.samplers, batch.fallback_sampler, batch.logits_processors = own
    run.check(in_flight=1)
    return result


def _run_of_batch(batch: Any) -> Run | None:
    if config.active == "off":
        return None
    run: Run | None = vars(batch).get("_skiphead_run")
    if run is None:
        run = run_of(batch.model)
        if run is not None:
            vars(batch)["_skiphead_run"] = run
            registry.running.add(batch)
    return run


def _guard(batch: Any, run: Run) -> None:
    """For this step: what the samplers and processors of `batch` raise, all ranks are to raise."""
    # By id: upstream asks whether all are the same one.
    samplers = {id(s): s for s in (*(batch.samplers or ()), batch.fallback_sampler)}
    guards = {i: None if s is None else _guarded(run, s) for i, s in samplers.items()}
    if batch.samplers:
        batch.samplers = [guards[id(s)] for s in batch.samplers]
    batch.fallback_sampler = guards[id(batch.fallback_sampler)]
    if any(batch.logits_processors):
        batch.logits_processors = [
            [run.processing(p) for p in processors] if processors else processors
            for processors in batch.logits_processors
        ]


def _guarded(run: Run, sampler: Sampler) -> Sampler:
    def sample(logprobs: mx.array) -> mx.array:
        tokens = run.attempt(sampler, logprobs)
        return mx.zeros((logprobs.shape[0],), mx.uint32) if tokens is None else tokens

    return sample


_sharing_classes: dict[type, type] = {}


def _sharing(cls: type) -> type:
    """`cls`, a `GenerationBatch`, in which assigning the sampled tokens shares them.

    The assignment is where upstream has sampled, in whichever way, and has not yet begun to
    compute the step: sharing after that would lose the overlap of building and computing.
    """

    def next_tokens(self: Any) -> Any:
        return vars(self)["_next_tokens"]

    def share(self: Any, tokens: Any) -> None:
        if this_thread.run is not None:
            tokens = this_thread.run.share(tokens, len(self.uids))
        vars(self)["_next_tokens"] = tokens

    sharing = type(cls.__name__, (cls,), {"_next_tokens": property(next_tokens, share)})
    return _sharing_classes.setdefault(cls, sharing)


def batch_extend(wrapped: Wrapped, batch: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `GenerationBatch.extend`: takes over what is in flight."""
    other: Run | None = vars(args[0] if args else kwargs["batch"]).get("_skiphead_run")
    wrapped(*args, **kwargs)
    mine: Run | None = vars(batch).get("_skiphead_run")
    if other is not None and mine is None:
        vars(batch)["_skiphead_run"] = other
        registry.running.add(batch)
    elif other is not None and mine is not None:
        mine.shares.extend(other.shares)
        mine.last = mine.last if other.last is None else other.last
        mine.failure = mine.failure or other.failure


def batch_prompt(wrapped: Wrapped, batch: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.PromptProcessingBatch.prompt`, which fills the caches.

    Nothing is sampled and so nothing shared. Upstream builds a head for each chunk and never
    evaluates it; here its weights are not even read.
    """
    run = run_of(batch.model) if batch.uids else None  # between prompts it is called for each step
    if run is None:
        return wrapped(*args, **kwargs)
    with run:
        return wrapped(*args, **kwargs)


def batch_close(wrapped: Wrapped, generator: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `BatchGenerator.close`: the last step is finished."""
    wrapped(*args, **kwargs)
    batch = vars(generator).get("_generation_batch")
    run: Run | None = None if batch is None else vars(batch).get("_skiphead_run")
    if run is not None:
        registry.running.discard(batch)
        run.finish(generator._stream)


def _row(group: str, path: str, wrapper: Any, needs: drift.Needs) -> Patch:
    return Patch(group, LOOPS_MODULE, path, wrapper, needs, "every rank runs the head in it")


PATCHES = (
    _row(
        "generate_step",
        "generate_step",
        generate_step,
        drift.signature(
            "model",
            "sampler",
            "logits_processors",
            "prompt_progress_callback",
            is_generator=True,
        ),
    ),
    _row(
        "speculative_generate_step",
        "speculative_generate_step",
        speculative_generate_step,
        drift.signature("model", "draft_model", "sampler", "logits_processors", is_generator=True),
    ),
    _row(
        "GenerationBatch",
        "GenerationBatch._step",
        batch_step,
        drift.uses(
            "model",
            "uids",
            "samplers",
            "fallback_sampler",
            "logits_processors",
            assigns="_next_tokens",
        ),
    ),
    _row("GenerationBatch", "GenerationBatch.extend", batch_extend, drift.signature("batch")),
    _row(
        "GenerationBatch",
        "PromptProcessingBatch.prompt",
        batch_prompt,
        drift.uses("model"),
    ),
    _row("GenerationBatch", "BatchGenerator.close", batch_close, drift.uses("_stream")),
)


def _steps(
    run: Run,
    model: Any,
    loops: tuple[Generator[Any, None, None], Generator[Any, None, None]],
    stream: Any,
    in_flight: int,
) -> Generator[Any, None, None]:
    """The first of `loops`, each step of it built inside `run`; the last one is finished.

    The second is upstream's, for a generation that begins when the plugin has been uninstalled.
    `in_flight` is how many shares upstream has begun and not waited for when it yields.
    """
    loop, upstream = loops
    if registry.family_of(model) is None:
        yield from upstream
        return
    registry.running.add(run)
    try:
        while True:
            with run:
                step = next(loop, None)
            if step is None:
                break
            run.check(in_flight)
            yield step
        run.finish(stream)
    except BaseException as error:
        # The caller stops here (a stop token, max_tokens), and so do the other ranks; or rank 0
        # has failed, and they know.
        loop.close()
        if isinstance(error, GeneratorExit) or run.has_failed:
            run.finish(stream)
        raise
    finally:
        registry.running.discard(run)


def _arguments(loop: Wrapped, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """What `loop` was given or takes by default, by name; nothing if it will refuse the call."""
    if config.active == "off":
        return {}
    try:
        bound = inspect.signature(loop).bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


def _stream(loop: Wrapped, given: dict[str, Any]) -> Any:
    # mlx-lm 0.31 has the one stream of the module in place of the parameter.
    return given.get("stream") or inspect.unwrap(loop).__globals__["generation_stream"]


def _greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)
