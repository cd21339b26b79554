"""`speculative_generate_step`: a pipelined model checks what a draft model on every rank proposes.

The ids that the pipelined model samples for the positions of a step are shared all at once. What
the draft model proposes is sampled on every rank, as upstream does; the share compares it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import wrapt

from ..patching import drift
from .loops import Args, Kwargs, Processors, Wrapped, begin, greedy, row, steps
from .sharing import Run, Sampling

DRAFTS_DIFFER = (
    "The ranks differ in what the draft model proposed: a sampler or a logits processor keeps a "
    "state that depends on the values of logits, which workers do not compute with "
    "mlx-lm-skiphead. Call mlx_lm_skiphead.uninstall() on all ranks before this generation. The "
    "ids by rank were {}."
)


def speculative_generate_step(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> Any:
    """The wrapper of `mlx_lm.generate.speculative_generate_step(prompt, model, draft_model, ...)`.

    Yields rank 0's tokens on every rank; the logprobs beside them are NaN on workers.
    """
    given, run = begin(wrapped, args, kwargs)
    if run is None:
        return wrapped(*args, **kwargs)
    checked = _Checked(run, given["sampler"] or greedy)
    changed = {
        "draft_model": _Draft(given["draft_model"], checked),
        "sampler": checked.sample,
        "logits_processors": Processors(run, given["logits_processors"]),
    }
    return steps(run, wrapped, given | changed, (args, kwargs), in_flight=0)


class _Checked:
    """Sampling in `speculative_generate_step`, which samples for both models.

    All positions of a step are shared at once. They come together, or, with logits processors, one
    after another: rank 0 shares with the last one. A worker shares with the first one, so that
    the processors of the next positions see rank 0's ids.
    """

    def __init__(self, run: Run, sampler: Sampling) -> None:
        self._run = run
        self._sampler = run.sampler(sampler)
        self._kept = mx.array([], mx.uint32)
        """On rank 0 the ids of this step that are not shared yet; on a worker those that are shared
        and not given out yet."""
        self._drafts: list[mx.array] = []
        """The ids ``(1,)`` that the draft model has proposed in this step."""

    def drafting(self) -> None:
        """The draft model is called: what is sampled next is its own."""
        self._run.step.hidden.clear()

    def sample(self, logprobs: mx.array) -> mx.array:
        """Ids ``(n,)`` of ``(n, V)``: the draft's, or rank 0's for the pipelined model."""
        sampled = self._sampler(logprobs)
        if self._run.step.hidden or self._kept.size:
            give = self._given if self._run.is_worker else self._collected
            return give(sampled, logprobs.shape[0])
        self._drafts.append(sampled)
        return sampled

    def _collected(self, sampled: mx.array, count: int) -> mx.array:
        """On rank 0: `sampled`, shared with the last position of the step, or where it failed."""
        step = self._run.step
        ids = mx.concatenate([self._kept, sampled])
        is_last = bool(step.errors) or ids.size >= step.hidden[0].shape[1]
        self._kept = ids[:0] if is_last else ids
        if is_last:
            self._share(ids)
            self._agree()
        return sampled

    def _given(self, sampled: mx.array, count: int) -> mx.array:
        """On a worker: the next `count` ids of rank 0."""
        if self._kept.size:
            self._run.compute(sampled)
        else:
            self._kept = self._share(sampled)
        ids, self._kept = self._kept[:count], self._kept[count:]
        if not self._kept.size:
            self._agree()
        return ids

    def _share(self, ids: mx.array) -> mx.array:
        drafts, self._drafts = self._drafts, []
        return self._run.share(ids, self._run.step.hidden[0].shape[1:2], tuple(drafts))

    def _agree(self) -> None:
        """Raise what made rank 0 fail, and an error if drafts differ, on all ranks at once.

        Waits for the share, as upstream does next.
        """
        drafts = self._run.shares[-1].compared()
        self._run.check(in_flight=0)
        if any(draft != drafts[0] for draft in drafts):
            self._run.has_failed = True
            raise RuntimeError(DRAFTS_DIFFER.format(drafts))


class _Draft(wrapt.CallableObjectProxy):  # type: ignore[type-arg]
    """The draft model, where a call says that what is sampled next is its own."""

    def __init__(self, draft_model: Any, checked: _Checked) -> None:
        super().__init__(draft_model)
        self._self_checked = checked

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._self_checked.drafting()
        return self.__wrapped__(*args, **kwargs)


_CALL = drift.signature("model", "draft_model", "sampler", "logits_processors", is_generator=True)
PATCHES = (row("speculative_generate_step", speculative_generate_step, _CALL),)
