"""What is wrapped in a family: its forward pass, with two arrays replaced.

Upstream's own code runs, unchanged and to its end. In a run the hidden broadcast is replaced by
what it was given, on all ranks; and on a worker the logits by NaN of the same shape and type. So
nobody asks for a worker's head, and MLX never computes it.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from . import config, drift
from .families import LOOPS_MODULE, Family
from .handles import Patch, Wrapper, layers
from .registry import broadcast_code
from .sharing import Run, this_thread


class Forward:
    """A call of `Model.__call__`, or of the pipelined model alone, while it lasts."""

    def __init__(self, stage: Any, run: Run | None, code: CodeType | None, skips_head: bool):
        self.stage = stage
        self.run = run
        self.code = code
        """That of `stage` which has the hidden broadcast."""
        self.skips_head = skips_head
        """Whether its logits are not used, so that the head's weights need not be read."""
        self.has_broadcast = False
        self.hidden: Any = None
        """The final hidden states ``(B, L, H)``."""
        self._before: Forward | None = None

    def __enter__(self) -> None:
        self._before, this_thread.forward = this_thread.forward, self

    def __exit__(self, *_: Any) -> None:
        this_thread.forward, self._before = self._before, None


def model_call(family: Family) -> Wrapper:
    """The wrapper of `Model.__call__` of `family`, or of the class inside it that has the head.

    One rank, or outside a run: upstream's call, unless the mode is "hidden": then a worker gives
    the final hidden states ``(B, L, hidden)`` in place of logits, except to a loop of mlx-lm's that
    is not wrapped and would sample from them. In a run: upstream's call without the hidden
    broadcast, and on a worker NaN in place of all arrays that it returns, logits ``(B, L, V)``
    first.
    """

    def call(wrapped: Any, owner: Any, args: Any, kwargs: Any) -> Any:
        stage = family.stage_of(owner)
        if stage.pipeline_size == 1:
            return wrapped(*args, **kwargs)
        run, code = this_thread.run, broadcast_code(stage)
        if run is not None and (code is None or (run.owner is not None and run.owner is not owner)):
            run = None  # of another model
        is_worker = stage.pipeline_rank != 0
        gives_hidden = (
            run is None and config.active == "hidden" and is_worker and not _in_loop_of_mlx_lm()
        )
        forward = Forward(stage, run, code, is_worker and (run is not None or gives_hidden))
        if run is not None:
            run.begin_forward()
        with forward:
            out = wrapped(*args, **kwargs)
        if gives_hidden and forward.hidden is not None:
            return forward.hidden
        if run is None:
            return out
        flat: Any = tree_flatten([out])
        arrays = [value for _, value in flat if value is not None]
        if not forward.has_broadcast or not all(isinstance(a, mx.array) for a in arrays):
            what = "returned something that is no array" if forward.has_broadcast else "ran without"
            raise RuntimeError(
                f"mlx_lm.models.{family.name} {what}"
                f"{'' if forward.has_broadcast else ' a hidden broadcast'}, so mlx-lm-skiphead "
                "cannot skip its head. Unset MLX_LM_SKIPHEAD on all ranks to use it."
            )
        run.vocabulary = arrays[0].shape[-1]
        run.inputs = args[0] if args else None
        if not is_worker:
            return out
        # Somebody may look at the logits of an extra call, and must not hang the others then.
        return tree_map(lambda a: not_computed(a, run.sent if run.is_extra else None), out)

    return call


def stage_call(wrapped: Any, stage: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of the pipelined model's ``__call__``, whose hidden states mode "hidden" gives.

    Of its own accord it changes nothing.
    """
    forward = this_thread.forward
    if forward is not None and forward.stage is stage:
        forward.hidden = wrapped(*args, **kwargs)
        return forward.hidden
    if getattr(stage, "pipeline_size", 1) == 1:
        return wrapped(*args, **kwargs)
    with Forward(stage, None, None, False):  # a user's own call of it
        return wrapped(*args, **kwargs)


def all_gather(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.distributed.all_gather`: the identity for the hidden broadcast of a run.

    Keeping the broadcast beside the token share would cost a collective more than upstream. The
    caller takes its first B rows, so the identity is what rank 0 would get. All other calls are
    upstream's, other packages' within a forward pass too.
    """
    forward = this_thread.forward
    if forward is None or forward.run is None or not _is_called_by(forward.code):
        return wrapped(*args, **kwargs)
    forward.has_broadcast = True
    forward.run.sent.append(args[0])
    forward.run.broadcast = args[1:], kwargs
    return args[0]


def patches(family: Family) -> tuple[Patch, ...]:
    """What ends the hidden broadcast and the head of `family`."""
    head_lost = "every rank runs the head"
    return (
        Patch(
            family.name,
            "mlx.core",
            "distributed.all_gather",
            all_gather,
            drift.anything,
            head_lost,
        ),
        Patch(
            family.name,
            family.module,
            f"{family.stage_class}.__call__",
            stage_call,
            drift.broadcasts,
            head_lost,
        ),
        Patch(
            family.name,
            family.module,
            f"{family.head_class}.__call__",
            model_call(family),
            drift.runs_head,
            head_lost,
        ),
    )


def not_computed(array: mx.array, after: list[mx.array] | None = None) -> mx.array:
    """In the place of `array`, without its memory: NaN, or zeros where its type has no NaN.

    NaN since a number that was never computed must not look like one; in full shape since MLX
    checks no bounds and every rank indexes its logprobs by token.
    """
    is_float = mx.issubdtype(array.dtype, mx.inexact)
    one = mx.array(float("nan") if is_float else 0, array.dtype)
    return mx.broadcast_to(mx.depends(one, after) if after else one, array.shape)


def _is_called_by(code: CodeType | None) -> bool:
    """Whether the wrapper above this is called by `code`, through patches of others at most."""
    frame: FrameType | None = sys._getframe(2)
    if frame is not None and frame.f_code is code:
        return True
    above = {getattr(layer, "__code__", None) for layer in layers(mx.distributed.all_gather)}
    while frame is not None and (
        frame.f_code in above or frame.f_globals.get("__name__", "").startswith("wrapt.")
    ):
        frame = frame.f_back
    return frame is not None and frame.f_code is code


def _in_loop_of_mlx_lm() -> bool:
    """Whether one of mlx-lm's own generation loops is what calls the model."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # By its spec: a module that is run has another name.
        if getattr(frame.f_globals.get("__spec__"), "name", "") == LOOPS_MODULE:
            return True
        frame = frame.f_back
    return False
