"""What is wrapped around a family: a forward pass that ends before its head.

Upstream's own code runs, unchanged, up to the point where the head would follow. Only then, and
only on a worker, its frames are left by an exception that `model_call` catches again. So there
is no copy of upstream's forward pass here, and no family has code of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import mlx.core as mx

from . import config
from .dead_weights import forward_pass
from .families import Family
from .patching import LOOPS_MODULE
from .sharing import Run, this_thread

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


class _Forward:
    """A call of `Model.__call__` that is to be cut short, while it lasts."""

    def __init__(self, stage: Any, *, run: Run | None, skip_head: bool) -> None:
        self.stage = stage
        self.run = run
        self.skip_head = skip_head
        self.sent: mx.array | None = None
        """What the hidden broadcast was given, in a run: ``(B, L, H)``, on a worker its send."""


class _BeforeHead(BaseException):
    """Leaves upstream's frames with the final hidden states, just before the head."""

    def __init__(self, forward: _Forward, hidden: mx.array) -> None:
        self.forward = forward
        self.hidden = hidden


def model_call(family: Family) -> Wrapper:
    """The wrapper of `Model.__call__` of `family`, or of the class inside it that has the head.

    One rank, or rank 0 outside a run: upstream's call. Otherwise, by ``pipeline_rank``:

    - a step of a run: upstream's call without the hidden broadcast; on a worker without the
      head too, giving ``(B, L, V)`` of NaN that takes no memory.
    - any other call: upstream's, on every rank, unless the mode is "hidden": then a worker
      gives the final hidden states ``(B, L, hidden)`` in place of logits, except to a loop of
      mlx-lm's that is not wrapped and would sample from them.
    """

    def call(wrapped: Callable[..., Any], owner: Any, args: Any, kwargs: Any) -> Any:
        run = this_thread.run
        if run is not None and run.owner is not None and run.owner is not owner:
            run = None  # of another model
        stage = family.stage_of(owner) if run is None or run.stage is None else run.stage
        if stage.pipeline_size == 1:
            return wrapped(*args, **kwargs)
        if this_thread.alone:
            raise RuntimeError(
                f"{this_thread.alone} called a pipelined model. With mlx-lm-skiphead, samplers "
                "and logits processors run on rank 0 alone, so the other ranks would wait for "
                "ever. Call mlx_lm_skiphead.uninstall() on all ranks before this generation."
            )
        is_worker = stage.pipeline_rank != 0
        if run is not None:
            forward = _Forward(stage, run=run, skip_head=is_worker)
        elif config.active == "hidden" and is_worker and not _in_loop_of_mlx_lm():
            forward = _Forward(stage, run=None, skip_head=True)
        else:
            return forward_pass(wrapped, args, kwargs)

        before, this_thread.forward = this_thread.forward, forward
        try:
            logits = forward_pass(wrapped, args, kwargs)
        except _BeforeHead as reached:
            if reached.forward is not forward:
                raise
            hidden = reached.hidden
            if run is None:
                return hidden
            made = run.placeholder
            if made is None or made.shape[:2] != hidden.shape[:2] or made.dtype != hidden.dtype:
                made = _placeholder(hidden, vocabulary=family.head_of(owner).weight.shape[0])
                if run.owner is owner:
                    run.placeholder, run.logsumexp = made, None
            logits = made
            if run.owner is None and forward.sent is not None:
                # A loop of the user's may look at the logits, and must not hang the others then.
                logits = mx.depends(logits, forward.sent)
        finally:
            this_thread.forward = before
        if run is not None:
            if forward.sent is None:
                raise RuntimeError(
                    f"mlx_lm.models.{family.name} ran without a hidden broadcast, so "
                    "mlx-lm-skiphead cannot skip its head. Unset MLX_LM_SKIPHEAD on all ranks "
                    "to use this mlx-lm."
                )
            run.sent = forward.sent
            run.vocabulary = logits.shape[-1]
            if not is_worker:
                this_thread.alone = run.then_alone
        return logits

    return call


def stage_call(
    wrapped: Callable[..., Any], stage: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The wrapper of the pipelined model's ``__call__``, behind which the head would follow."""
    hidden = forward_pass(wrapped, args, kwargs)
    forward = this_thread.forward
    if forward is not None and forward.stage is stage and forward.skip_head:
        raise _BeforeHead(forward, hidden)
    return hidden


def all_gather(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The wrapper of `mx.distributed.all_gather`: the identity for the hidden broadcast of a run.

    Keeping the broadcast beside the token share would cost a collective more than upstream. The
    caller takes its first B rows, so the identity is what rank 0 would get. All other calls (with
    a group, outside a forward pass, in another thread) are upstream's.
    """
    forward = this_thread.forward
    if forward is None or forward.run is None or kwargs or len(args) != 1:
        return wrapped(*args, **kwargs)
    forward.sent = args[0]
    return args[0]


def logsumexp(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The wrapper of `mx.logsumexp`, by which mlx-lm's loops make logprobs ``(..., V)``.

    Of a worker's placeholder it is NaN, ``(..., 1)``, without a pass over the vocabulary. The
    difference of the two then is one number in memory too. All other calls are upstream's.
    """
    run = this_thread.run
    if (
        run is None
        or not run.is_worker
        or run.sent is None  # shared already, or what comes is a draft model's
        or run.owner is None  # a loop of the user's
        or len(args) != 1
        or not kwargs.get("keepdims")
        or args[0].shape[-1] != run.vocabulary
    ):
        return wrapped(*args, **kwargs)
    known = run.logsumexp
    if known is None or known.shape[:-1] != args[0].shape[:-1]:
        known = run.logsumexp = args[0][..., :1]
    return known


def _in_loop_of_mlx_lm() -> bool:
    """Whether one of mlx-lm's own generation loops is what calls the model."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # By its spec: a module that is run has another name.
        if getattr(frame.f_globals.get("__spec__"), "name", "") == LOOPS_MODULE:
            return True
        frame = frame.f_back
    return False


def _placeholder(hidden: mx.array, vocabulary: int) -> mx.array:
    """Stands in for the logits of ``hidden (B, L, H)``: NaN, ``(B, L, V)``, one number in memory.

    NaN since a number that was never computed must not look like one; V wide since MLX checks no
    bounds and every rank indexes its logprobs by token.
    """
    return mx.broadcast_to(mx.array(float("nan"), hidden.dtype), (*hidden.shape[:2], vocabulary))
