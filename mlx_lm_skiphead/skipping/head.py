"""What is wrapped in a family: its forward pass, with two arrays replaced.

Upstream's own code runs, unchanged and to its end. In a run the hidden broadcast is replaced by
what it was given, on all ranks; and on a worker the logits by NaN of the same shape and type. So
nobody asks for a worker's head, and MLX never computes it: it is lazy. NaN takes no memory, and a
number that was never computed does not look like one.

Outside a run a call of the model is upstream's, with a head on every rank.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from .. import config
from ..families import LOOPS_MODULE, Family
from ..patching import drift
from ..patching.handles import Patch, Wrapper, layers
from ..patching.registry import MLX, broadcast_code
from ..weights import on_disk
from .sharing import Run, during, not_computed, this_thread


class Forward:
    """A call of `Model.__call__`, or of the pipelined model alone: ``this_thread.forward``."""

    def __init__(self, stage: Any, run: Run | None = None) -> None:
        self.stage = stage
        self.run = run
        self.hidden: Any = None
        """The final hidden states ``(B, L, H)``."""


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
        run, is_worker = this_thread.run, stage.pipeline_rank != 0
        if broadcast_code(stage) is None or (run and run.owner and run.owner is not owner):
            run = None  # of another model
        if run is None:
            gives_hidden = config.active == "hidden" and is_worker and not _in_loop_of_mlx_lm()
            needed = on_disk.needed(family, owner, logits=not gives_hidden)
            on_disk.bring(family, owner, *needed)
            forward = Forward(stage)
            with during(forward=forward):
                out = wrapped(*args, **kwargs)
            return forward.hidden if gives_hidden and forward.hidden is not None else out
        run.begin_forward()
        sent = len(run.sent)
        with during(forward=Forward(stage, run)):
            out = wrapped(*args, **kwargs)
        flat: Any = tree_flatten([out])
        arrays = [value for _, value in flat if value is not None]
        if len(run.sent) == sent or not all(isinstance(a, mx.array) for a in arrays):
            raise RuntimeError(
                f"mlx_lm.models.{family.name} ran without a hidden broadcast, or has returned what "
                "is no array, so mlx-lm-skiphead cannot skip its head. Unset MLX_LM_SKIPHEAD on "
                "all ranks to use it."
            )
        run.vocabulary = arrays[0].shape[-1]
        run.inputs = args[0] if args else None
        if not is_worker:
            return out
        # Somebody may look at the logits of an extra call, and must not hang the others then.
        return tree_map(lambda a: not_computed(a, run.sent if run.is_extra else None), out)

    return call


def stage_call(wrapped: Any, stage: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of the pipelined model's ``__call__``, which keeps what mode "hidden" gives."""
    is_inner = this_thread.forward is not None and this_thread.forward.stage is stage
    if not is_inner:
        on_disk.complete(stage)  # also where `Model.__call__` is another package's by now
    out = wrapped(*args, **kwargs)
    if is_inner:
        this_thread.forward.hidden = out
    return out


def all_gather(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.distributed.all_gather`: the identity for the hidden broadcast of a run.

    Keeping the broadcast beside the token share would cost a collective more than upstream. The
    caller takes its first B rows, so the identity is what rank 0 would get. All other calls are
    upstream's, other packages' within a forward pass too.
    """
    forward = this_thread.forward
    if forward is None or forward.run is None or not _is_called_by(broadcast_code(forward.stage)):
        return wrapped(*args, **kwargs)
    forward.run.sent.append(args[0])
    forward.run.broadcast = args[1:], kwargs
    return args[0]


_LOST = "every rank runs the head"
PATCHES = (Patch(MLX, MLX, "distributed.all_gather", all_gather, drift.anything, _LOST),)


def patches(family: Family) -> tuple[Patch, ...]:
    """What ends the head of `family`, and looks at its hidden states."""
    row = (family.name, family.module)
    path = f"{family.head_class}.__call__"
    head = Patch(*row, path, model_call(family), drift.runs_head, _LOST)
    if family.base:  # which has the other
        return (head,)
    path = f"{family.stage_class}.__call__"
    return (Patch(*row, path, stage_call, drift.broadcasts, _LOST), head)


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
