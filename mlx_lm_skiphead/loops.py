"""mlx-lm's generation loops, wrapped: where heads are skipped, because tokens are shared.

- `generate_step` serves `generate`, `stream_generate`, `mlx_lm.chat` and `mlx_lm.benchmark`;
- `GenerationBatch` serves `BatchGenerator`, `batch_generate` and `mlx_lm.server`;
- `speculative_generate_step`, where a pipelined model checks what a draft model on every rank
  proposes.

It is upstream's loop that runs, each time, with other samplers, and with its steps built inside
a `Run`. Not touched: a loop that was imported by name before the plugin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any

import mlx.core as mx
import wrapt

from . import config, patching
from .sharing import (
    LogitsProcessor,
    Run,
    Sampler,
    finish,
    on_rank_zero_only,
    outside,
    take_over_random_key,
    this_thread,
)

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def run_of(model: Any) -> Run | None:
    """A run of `model`, or None where there is no head to skip: one rank, or not patched."""
    family = patching.family_of(model)
    if family is None:
        return None
    owner = family.owner_of(model)
    stage = family.stage_of(owner)
    return Run(owner, stage.pipeline_rank != 0, stage) if stage.pipeline_size > 1 else None


def generate_step(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.generate_step(prompt, model, ..., sampler=...)`.

    Yields rank 0's tokens on every rank. The logprobs beside them are rank 0's on rank 0, and NaN
    on workers. Samplers and logits processors run on rank 0 only.
    """
    given = {} if config.active == "off" else _arguments(wrapped, args, kwargs)
    run = run_of(given.get("model"))
    if run is None:
        return wrapped(*args, **kwargs)
    sampler = on_rank_zero_only(given["sampler"] or _greedy, "a sampler")
    processors = given["logits_processors"] or []

    def sample(logprobs: mx.array) -> mx.array:
        tokens = None if run.is_worker else run.attempt(sampler, logprobs)
        return run.share(tokens, logprobs.shape[0])

    kwargs = {
        **kwargs,
        "sampler": sample,
        "logits_processors": None if run.is_worker else [_processor(run, p) for p in processors],
        "prompt_progress_callback": outside(given["prompt_progress_callback"]),
    }
    return _steps(run, wrapped(*args, **kwargs), _stream(wrapped, given), in_flight=1)


def _processor(run: Run, processor: LogitsProcessor) -> LogitsProcessor:
    """`processor` as rank 0 runs it."""
    alone = on_rank_zero_only(processor, "a logits processor")

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        processed = run.attempt(alone, tokens, logits)
        return logits if processed is None else processed

    return process


def speculative_generate_step(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.speculative_generate_step(prompt, model, draft_model, ...)`.

    The tokens that the pipelined `model` accepts are shared, all of a step at once. What the draft
    model proposes is sampled on every rank, as upstream does, from the same random numbers: so
    samplers and logits processors run on workers too, but only for the draft.
    """
    given = {} if config.active == "off" else _arguments(wrapped, args, kwargs)
    run = run_of(given.get("model"))
    if run is None:
        return wrapped(*args, **kwargs)
    sampler = given["sampler"] or _greedy
    steered = _Speculation(run, sampler)
    processors = given["logits_processors"]
    # The draft goes by keyword from here on, or upstream would be given it twice.
    args, kwargs = args[:2], {**_positional(wrapped, args[2:], skip=2), **kwargs}
    kwargs = {
        **kwargs,
        "draft_model": _Draft(given["draft_model"], run),
        "sampler": steered.sample,
        "logits_processors": [steered.processor(p) for p in processors] if processors else None,
    }
    return _steps(run, wrapped(*args, **kwargs), _stream(wrapped, given), in_flight=0)


class _Speculation:
    """Sampling in `speculative_generate_step`, which samples for both models.

    The step's positions come all at once, or, with logits processors, one after another: rank 0
    collects what it samples and shares with the last one. A worker shares with the first.
    """

    def __init__(self, run: Run, sampler: Sampler) -> None:
        self._run = run
        self._sampler = sampler
        self._sampled: list[mx.array] = []
        self._shared: mx.array | None = None

    def sample(self, logprobs: mx.array) -> mx.array:
        """Tokens ``(n,)`` of ``(n, V)``: the draft's, or rank 0's for the pipelined model."""
        run, rows = self._run, logprobs.shape[0]
        if not self._checking():
            take_over_random_key()
            return self._sampler(logprobs)
        if run.is_worker:
            if self._shared is None:
                self._shared = run.share(None, self._positions())
            tokens, self._shared = self._shared[:rows], self._shared[rows:]
            if not self._shared.size:
                self._shared = None
            return tokens
        attempted = run.attempt(on_rank_zero_only(self._sampler, "a sampler"), logprobs)
        tokens = mx.zeros((rows,), mx.uint32) if attempted is None else attempted
        self._sampled.append(tokens)
        positions = self._positions()
        if sum(t.shape[0] for t in self._sampled) < positions:
            return tokens
        everything, self._sampled = mx.concatenate(self._sampled), []
        return run.share(everything, positions)[positions - rows :]

    def processor(self, processor: LogitsProcessor) -> LogitsProcessor:
        """`processor`, left out where a worker would give it the pipelined model's logits."""
        alone = _processor(self._run, processor)

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            if not self._checking():
                return processor(tokens, logits)
            return logits if self._run.is_worker else alone(tokens, logits)

        return process

    def _positions(self) -> int:
        """How many the forward pass had that is being checked."""
        return 0 if self._run.sent is None else self._run.sent.shape[1]

    def _checking(self) -> bool:
        """Whether what comes now is of the pipelined model, not of the draft."""
        return self._run.sent is not None or self._shared is not None


class _Draft(wrapt.CallableObjectProxy):  # type: ignore[type-arg]
    """The draft model, where a call says that what is sampled next is its own."""

    def __init__(self, draft_model: Any, run: Run) -> None:
        super().__init__(draft_model)
        self._self_run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._self_run.sent = None
        return self.__wrapped__(*args, **kwargs)


def batch_step(wrapped: Wrapped, batch: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.GenerationBatch._step`: one share for the whole batch.

    On rank 0 upstream samples each request as it would; on workers there are no samplers and no
    logits processors. A batch that has begun so goes on so after `uninstall`, and takes in new
    requests so, until it is empty.
    """
    if config.active == "off" and not patching.holds():
        return wrapped(*args, **kwargs)
    run = _batch_run(batch.model)
    if run is None:
        return wrapped(*args, **kwargs)
    own = batch.samplers, batch.fallback_sampler, batch.logits_processors
    cls = type(batch)
    patching.hold(batch)
    # A batch may be merged into another one: its shares are this thread's. Not after an error.
    this_thread.batch_run = None
    try:
        with run:
            try:
                if run.is_worker:
                    batch.samplers, batch.logits_processors = [], []
                    batch.fallback_sampler = _none
                else:
                    _guard(batch, run)
                batch.__class__ = _sharing_classes.get(cls) or _sharing(cls)
                result = wrapped(*args, **kwargs)
            finally:
                this_thread.alone = ""
                batch.__class__ = cls
                batch.samplers, batch.fallback_sampler, batch.logits_processors = own
        run.check(in_flight=1)
    except Exception:
        patching.release(batch)
        raise
    this_thread.batch_run = run
    return result


def _batch_run(model: Any) -> Run | None:
    """As `run_of`; the run of the batch's last step, where it can go on."""
    before = this_thread.batch_run
    if before is not None and before.model is model:
        return before if patching.family_of(model) is not None else None
    run = run_of(model)
    if run is not None:
        run.model = model
        run.then_alone = "a sampler or a logits processor"
        if before is not None:
            run.shares, run.failure = before.shares, before.failure
    return run


def _none(logprobs: mx.array) -> None:
    """A worker's sampler."""


def _guard(batch: Any, run: Run) -> None:
    """For this step: what the samplers and processors of `batch` raise, all ranks are to raise."""
    # By id: upstream asks whether all are the same one.
    samplers = {id(s): s for s in (*(batch.samplers or ()), batch.fallback_sampler)}
    guards = {id(s): None if s is None else _guarded(run, s) for s in samplers.values()}
    if batch.samplers:
        batch.samplers = [guards[id(s)] for s in batch.samplers]
    batch.fallback_sampler = guards[id(batch.fallback_sampler)]
    if any(batch.logits_processors):
        batch.logits_processors = [
            [_processor(run, p) for p in processors] if processors else processors
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
            this_thread.alone = ""
            tokens = this_thread.run.share(tokens, len(self.uids))
        vars(self)["_next_tokens"] = tokens

    sharing = type(cls.__name__, (cls,), {"_next_tokens": property(next_tokens, share)})
    return _sharing_classes.setdefault(cls, sharing)


def batch_prompt(wrapped: Wrapped, batch: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.PromptProcessingBatch.prompt`, which fills the caches.

    Nothing is sampled and so nothing shared. Upstream builds a head for each chunk and never
    evaluates it; here workers do not build it, or it would be read from disk.
    """
    if not batch.uids or (config.active == "off" and not patching.holds()):
        return wrapped(*args, **kwargs)  # between prompts upstream calls it for each step
    run = run_of(batch.model)
    if run is None:
        return wrapped(*args, **kwargs)
    with patching.running(), run:
        return wrapped(*args, **kwargs)


def batch_filter(wrapped: Wrapped, batch: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `GenerationBatch.filter`: a worker whose batch is empty catches up.

    Rank 0 does not wait, so that the last answer leaves at once.
    """
    wrapped(*args, **kwargs)
    if not batch.uids:
        patching.release(batch)
        take_over_random_key()
        if not patching.holds():
            this_thread.batch_run = None  # what is in flight is not needed


def batch_close(wrapped: Wrapped, generator: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `BatchGenerator.close`: the last step is finished."""
    wrapped(*args, **kwargs)
    finish(generator._stream)


WRAPPERS = {
    "generate_step": generate_step,
    "speculative_generate_step": speculative_generate_step,
    "GenerationBatch._step": batch_step,
    "PromptProcessingBatch.prompt": batch_prompt,
    "GenerationBatch.filter": batch_filter,
    "BatchGenerator.close": batch_close,
}
"""By what they wrap in `mlx_lm.generate`."""


def _steps(
    run: Run, loop: Generator[Any, None, None], stream: Any, in_flight: int
) -> Generator[Any, None, None]:
    """`loop`, each step of it built inside `run`, and the last one finished before it ends.

    `in_flight` is how many shares upstream has begun and not waited for when it yields.
    """
    with patching.running():
        try:
            while True:
                with run:
                    step = next(loop, None)
                if step is None:
                    break
                run.check(in_flight)
                yield step
        except BaseException as error:
            # The caller stops here (a stop token, max_tokens), and so do the other ranks; or rank 0
            # has failed, and they know.
            loop.close()
            if isinstance(error, GeneratorExit) or run.failed:
                finish(stream)
            raise
        finish(stream)


def _arguments(loop: Wrapped, args: Args, kwargs: Kwargs) -> dict[str, Any]:
    """What `loop` was given or takes by default, by name; nothing if it will refuse the call."""
    try:
        bound = inspect.signature(loop).bind(*args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


def _positional(loop: Wrapped, args: Args, skip: int) -> dict[str, Any]:
    """Positional arguments of `loop`, from the one after `skip` on, by name."""
    return dict(zip(list(inspect.signature(loop).parameters)[skip:], args, strict=False))


def _stream(loop: Wrapped, given: dict[str, Any]) -> Any:
    # mlx-lm 0.31 has the one stream of the module in place of the parameter.
    return given.get("stream") or inspect.unwrap(loop).__globals__["generation_stream"]


def _greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)
