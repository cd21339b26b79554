"""`speculative_generate_step`: a pipelined model checks what a draft model on every rank proposes.

The ids that the pipelined model samples for the positions of a step are shared all at once. What
the draft model proposes is sampled on every rank, as upstream does; the share compares it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import wrapt

from ..patching import drift
from ..ranks import watch
from .loops import Args, Kwargs, Wrapped, begin, greedy, row, steps
from .programs import Processors, Sampling, sampler
from .sharing import Run, Share

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
    return steps(run, wrapped, given | changed, in_flight=0)


class _Checked:
    """Sampling in `speculative_generate_step`, which samples for both models.

    The positions of a step come together, or, with logits processors, one after another. Functions
    of the program's may look at the ids of the position before, and wait for other ranks: then each
    position is shared by itself. Otherwise all of a step are shared at once, by rank 0 with the
    last one, by a worker with the first one, since it gives rank 0's ids out.
    """

    def __init__(self, run: Run, sample: Sampling) -> None:
        self._run = run
        self._sample = sampler(run, sample)
        self._left = 0
        """How many positions of this step have yet to be sampled, once one has been."""
        self._kept = mx.array([], mx.uint32)
        """The ids of this step: on rank 0 those to be shared, on a worker those to be given out."""
        self._drafts: list[mx.array] = []
        """The ids ``(1,)`` that the draft model has proposed in this step."""
        self._first: Share | None = None
        """The first share of this step, which compares them."""

    def drafting(self) -> None:
        """The draft model is called: what is sampled next is its own."""
        self._run.step.hidden.clear()
        self._left = 0

    def sample(self, logprobs: mx.array) -> mx.array:
        """Ids ``(n,)`` of ``(n, V)``: the draft's, or rank 0's for the pipelined model."""
        run, count, sampled = self._run, logprobs.shape[0], self._sample(logprobs)
        step = run.step
        if not step.hidden and not self._left:
            self._drafts.append(sampled)
            return sampled
        positions = self._left or step.hidden[0].shape[1]
        self._left = positions - count
        if step.is_programs:
            ids = self._share(sampled, count)
            if self._left:
                run.goes_on(step)
        elif run.is_worker:
            kept = self._kept if self._kept.size else self._share(sampled, positions)
            ids, self._kept = kept[:count], kept[count:]
        else:
            ids, self._kept = sampled, mx.concatenate([self._kept, sampled])
            if step.errors or not self._left:
                self._share(self._kept, self._kept.size + self._left)
                self._kept, self._left = self._kept[:0], 0
        if not self._left:
            self._agree()
        return ids

    def _share(self, ids: mx.array, count: int) -> mx.array:
        drafts, self._drafts = self._drafts, []
        shared = self._run.share(ids, (count,), drafts)
        self._first = self._first or self._run.shares[-1]
        return shared

    def _agree(self) -> None:
        """Raise what made rank 0 fail, and an error if drafts differ, on all ranks at once.

        Waits for the shares of the step, as upstream does next.
        """
        assert self._first is not None
        drafts, self._first = [note.drafts for note in self._first.notes()], None
        self._run.check(in_flight=0)
        if any(ids != drafts[0] for ids in drafts):
            self._run.has_failed = True
            raise RuntimeError(DRAFTS_DIFFER.format(drafts))


class _Draft(wrapt.CallableObjectProxy):  # type: ignore[type-arg]
    """The draft model, where a call says that what is sampled next is its own."""

    def __init__(self, draft_model: Any, checked: _Checked) -> None:
        super().__init__(draft_model)
        self._self_checked = checked

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch.goes_on()
        self._self_checked.drafting()
        return self.__wrapped__(*args, **kwargs)


_CALL = drift.signature("model", "draft_model", "sampler", "logits_processors", is_generator=True)
PATCHES = (row("speculative_generate_step", speculative_generate_step, _CALL),)
