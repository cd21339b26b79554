"""mlx-lm's generation loops, wrapped: where heads are skipped, because tokens are shared.

- `generate_step` serves `generate`, `stream_generate`, `mlx_lm.chat` and `mlx_lm.benchmark`;
- `GenerationBatch` serves `BatchGenerator`, `batch_generate` and `mlx_lm.server`;
- `speculative_generate_step`, where a pipelined model checks what a draft model on every rank
  proposes.

It is upstream's loop that runs, each time, with its steps built inside a `Run`, and with samplers
whose ids are rank 0's. Not touched: a loop that was imported by name before the plugin.

Samplers and logits processors run on every rank, as upstream, so that what they keep, and
`mx.random`, stay in step. What they raise on all ranks, each rank raises as upstream would; what
only rank 0's raise, since they saw the values of logits, all ranks raise one token later, workers
as a `RuntimeError`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import wrapt

from .. import config
from ..families import LOOPS_MODULE
from ..patching import drift, registry
from ..patching.handles import Patch
from ..ranks import watch
from .sharing import Run, Sampling

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def run_of(model: Any, loop: str) -> Run | None:
    """A run of `model`, or None where there is no head to skip: one rank, or not patched."""
    split = registry.split_of(model) if registry.target(loop).state == "patched" else None
    if split is None:
        return None
    return Run(split.owner, split.stage.pipeline_rank, split.stage.pipeline_size)


def generate_step(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.generate_step(prompt, model, ..., sampler=...)`.

    Yields rank 0's tokens on every rank. The logprobs beside them are rank 0's on rank 0, and NaN
    on workers.
    """
    given, run = _begin("generate_step", wrapped, args, kwargs)
    if run is None:
        return wrapped(*args, **kwargs)
    sampler = run.sampler(given["sampler"] or _greedy)
    changed = {
        "sampler": lambda logprobs: run.share(sampler(logprobs)),
        "logits_processors": [run.processor(p) for p in given["logits_processors"] or ()],
        "prompt_progress_callback": run.callback(given["prompt_progress_callback"]),
    }
    return _steps(run, wrapped, given | changed, (args, kwargs), in_flight=1)


def speculative_generate_step(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.speculative_generate_step(prompt, model, draft_model, ...)`.

    The tokens that the pipelined `model` accepts are shared, all of a step at once. What the draft
    model proposes is sampled on every rank, as upstream does; the share compares it.
    """
    given, run = _begin("speculative_generate_step", wrapped, args, kwargs)
    if run is None:
        return wrapped(*args, **kwargs)
    changed = {
        "draft_model": _Draft(given["draft_model"], run),
        "sampler": _Speculation(run, given["sampler"] or _greedy).sample,
        "logits_processors": [run.processor(p) for p in given["logits_processors"] or ()],
    }
    return _steps(run, wrapped, given | changed, (args, kwargs), in_flight=0)


class _Speculation:
    """Sampling in `speculative_generate_step`, which samples for both models.

    The step's positions come all at once, or, with logits processors, one after another: rank 0
    collects what it samples and shares with the last one. A worker shares with the first, and so
    has what the processors of the next positions may look at.
    """

    def __init__(self, run: Run, sampler: Sampling) -> None:
        self._run = run
        run.fails_at_once = False  # some ranks have shared then, and in drafting none can
        self._sampler = run.sampler(sampler)
        self._tokens = mx.array([], mx.uint32)
        """Of this step: on rank 0 what it has sampled, on a worker what it has yet to give out."""

    def sample(self, logprobs: mx.array) -> mx.array:
        """Tokens ``(n,)`` of ``(n, V)``: the draft's, or rank 0's for the pipelined model."""
        run, rows = self._run, logprobs.shape[0]
        sampled = self._sampler(logprobs)
        if not run.sent and not self._tokens.size:
            return sampled  # the draft's
        if not (run.is_worker and self._tokens.size):
            positions = run.sent[0].shape[1]
            mine = mx.concatenate([self._tokens, sampled])
            if run.is_worker:  # whose ids count for nothing
                mine = mx.broadcast_to(sampled[:1], (positions,))
            elif run.failures:
                mine = mx.zeros((positions,), mx.uint32)
            elif mine.size < positions:
                self._tokens = mine
                return sampled
            assert run.inputs is not None
            shared = run.share(mine, compare=run.inputs.flatten())
            self._tokens = shared if run.is_worker else shared[positions - rows :]
        tokens, self._tokens = self._tokens[:rows], self._tokens[rows:]
        if not self._tokens.size:
            self._agree()
        return tokens

    def _agree(self) -> None:
        """What rank 0 raised, all raise; and drafts that differ are an error on all ranks at once.

        Waits for the share, as upstream does next.
        """
        share = self._run.shares[-1]
        if self._run.failures:  # a worker's, after it had shared
            self._run.shares[-1] = share._replace(key=self._run.key)
        drafts = [row[share.size + 1 :] for row in share.rows()]
        self._run.check(in_flight=0)
        if any(draft != drafts[0] for draft in drafts):
            self._run.has_failed = True
            raise RuntimeError(
                "The ranks differ in what the draft model proposed: a sampler or a logits "
                "processor keeps a state that depends on the values of logits, which workers do "
                "not compute with mlx-lm-skiphead. Call mlx_lm_skiphead.uninstall() on all ranks "
                f"before this generation. The ids by rank were {drafts}."
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
    if "_skiphead_run" not in vars(batch):
        _set_run(batch, run_of(batch.model, "GenerationBatch"))
    run = _get_run(batch)
    if run is None:
        return wrapped(*args, **kwargs)
    cls, guards = type(batch), _guards(batch, run)
    own = {name: vars(batch)[name] for name in guards}
    with run.step():
        try:
            vars(batch).update(guards)
            batch.__class__ = _sharing(cls)  # type: ignore[arg-type]
            result = wrapped(*args, **kwargs)
        finally:
            batch.__class__ = cls
            vars(batch).update(own)
        run.check(in_flight=1)
    return result


def _get_run(batch: Any) -> Any:
    return vars(batch).get("_skiphead_run")


def _set_run(batch: Any, run: Run | None) -> None:
    vars(batch)["_skiphead_run"] = run
    if run is not None:
        registry.running.add(batch)


def _guards(batch: Any, run: Run) -> dict[str, Any]:
    """For a step: attributes of `batch` in which samplers and processors fail on all ranks."""
    own = [*(batch.samplers or ()), batch.fallback_sampler]
    # By id: upstream asks whether all are the same one.
    samplers = {id(sampler): sampler and run.sampler(sampler) for sampler in own}
    return {
        "samplers": [samplers[id(sampler)] for sampler in batch.samplers or ()],
        "fallback_sampler": samplers[id(batch.fallback_sampler)],
        "logits_processors": [
            [run.processor(p) for p in processors or ()] for processors in batch.logits_processors
        ],
    }


@functools.cache
def _sharing(cls: type) -> type:
    """`cls`, a `GenerationBatch`, in which assigning the sampled tokens shares them.

    The assignment is where upstream has sampled, in whichever way, and has not yet begun to
    compute the step: sharing after that would lose the overlap of building and computing.
    """

    def next_tokens(self: Any) -> Any:
        return vars(self)["_next_tokens"]

    def share(self: Any, tokens: Any) -> None:
        vars(self)["_next_tokens"] = _get_run(self).share(tokens)

    return type(cls.__name__, (cls,), {"_next_tokens": property(next_tokens, share)})


def batch_extend(wrapped: Wrapped, batch: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `GenerationBatch.extend`: takes over what is in flight."""
    wrapped(*args, **kwargs)
    mine, theirs = _get_run(batch), _get_run(args[0] if args else kwargs["batch"])
    if mine is None:
        _set_run(batch, theirs)
    elif theirs is not None:
        mine.shares.extend(theirs.shares)
        mine.last = mine.last if theirs.last is None else theirs.last
        mine.failures.update(theirs.failures)


def batch_prompt(wrapped: Wrapped, batch: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.PromptProcessingBatch.prompt`, which fills the caches.

    Nothing is sampled and so nothing shared. Upstream builds a head for each chunk and never
    evaluates it; here its weights are not even read.
    """
    # Between prompts it is called for each step, and has nothing to do.
    run = run_of(batch.model, "GenerationBatch") if batch.uids else None
    with run.step() if run else nullcontext():
        return wrapped(*args, **kwargs)


def batch_close(wrapped: Wrapped, generator: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `BatchGenerator.close`: the last step is finished."""
    wrapped(*args, **kwargs)
    batch = vars(generator).get("_generation_batch")
    run = None if batch is None else _get_run(batch)
    if run is not None:
        registry.running.discard(batch)
        run.finish(generator._stream)


def _row(path: str, wrapper: Any, needs: drift.Needs) -> Patch:
    group = path if "." not in path else "GenerationBatch"
    return Patch(group, LOOPS_MODULE, path, wrapper, needs, "every rank runs the head in it")


_SAMPLING = ("samplers", "fallback_sampler", "logits_processors")
_CALL = drift.signature(
    "model", "sampler", "logits_processors", "prompt_progress_callback", is_generator=True
)
_DRAFTED = drift.signature(
    "model", "draft_model", "sampler", "logits_processors", is_generator=True
)
_STEP = drift.uses("model", "uids", *_SAMPLING, assigns="_next_tokens")
PATCHES = (
    _row("generate_step", generate_step, _CALL),
    _row("speculative_generate_step", speculative_generate_step, _DRAFTED),
    _row("GenerationBatch._step", batch_step, _STEP),
    _row("GenerationBatch.extend", batch_extend, drift.signature("batch")),
    _row("PromptProcessingBatch.prompt", batch_prompt, drift.uses("model")),
    _row("BatchGenerator.close", batch_close, drift.uses("_stream")),
)


def _begin(loop: str, wrapped: Wrapped, args: Args, kwargs: Kwargs) -> tuple[Kwargs, Run | None]:
    """What `wrapped` was given or takes by default, by name; and a run if its model is split."""
    try:
        bound = inspect.signature(wrapped).bind(*args, **kwargs)
    except TypeError:  # which it will raise itself
        return {}, None
    bound.apply_defaults()
    return bound.arguments, run_of(bound.arguments["model"], loop)


def _steps(
    run: Run, wrapped: Wrapped, changed: Kwargs, upstream: tuple[Args, Kwargs], in_flight: int
) -> Generator[Any, None, None]:
    """The loop with `changed` arguments, each step of it built inside `run`; the last is finished.

    `upstream` are the arguments of the call, for a generation that begins when the plugin has been
    uninstalled. `in_flight` is how many shares the loop has begun and not waited for when it
    yields.
    """
    if config.active == "off":
        yield from wrapped(*upstream[0], **upstream[1])
        return
    loop = wrapped(**changed)
    # mlx-lm 0.31 has the one stream of the module in place of the parameter.
    stream = changed.get("stream") or inspect.unwrap(wrapped).__globals__["generation_stream"]
    registry.running.add(run)
    try:
        while True:
            with run.step():
                step = next(loop, None)
                if step is not None:
                    run.check(in_flight)
            if step is None:
                break
            watch.agreed = True
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


def _greedy(logprobs: mx.array) -> mx.array:
    return mx.argmax(logprobs, axis=-1)
