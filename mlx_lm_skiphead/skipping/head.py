"""The forward pass of a family, with two arrays replaced.

Upstream's own code runs, unchanged and to its end. In a run the hidden broadcast is left out: on
rank 0 the hidden states are its own in any case, and a worker goes on with NaN. A worker's logits
are replaced by NaN of the same shape and type. So nobody asks for a worker's head, and MLX, which
is lazy, never computes it. NaN takes no memory, and a number that was never computed does not look
like one.

Outside a run, and in a function of the program's that a loop calls, a call of the model is
upstream's, with a head on every rank.
"""

from __future__ import annotations

import functools
import sys
from types import CodeType, FrameType
from typing import Any

import mlx.core as mx
import wrapt
from mlx.utils import tree_flatten, tree_map

from .. import config
from ..families import LOOPS_MODULE, Family
from ..patching import drift
from ..patching.frames import caller, is_called_by
from ..patching.handles import Patch, Wrapper
from ..patching.registry import during, this_thread
from ..weights import on_disk
from .sharing import Run, not_computed, waits_by_spinning

BROADCAST = "hidden broadcast"
"""The group of the one patch that all others need."""


class Forward:
    """A call of `Model.__call__`: ``this_thread.forward`` while it lasts."""

    def __init__(self, stage: Any) -> None:
        self.stage = stage
        self.gives_hidden = (
            config.active == "hidden"
            and stage.pipeline_rank != 0
            and not _is_of_run(stage)
            and caller(LOOPS_MODULE) is None
        )
        """Whether the call gives the final hidden states in place of logits."""
        self.hidden: Any = None
        """The final hidden states ``(B, L, H)`` that the pipelined model has given."""
        self.is_left_out = False
        """Whether the hidden broadcast was left out."""


def model_call(family: Family) -> Wrapper:
    """The wrapper of `Model.__call__` of `family`, or of the class inside it that has the head.

    One rank: upstream's call. In a run: on a worker NaN in place of the arrays that it returns,
    logits ``(B, L, V)`` first. Outside a run: upstream's call; but with the mode "hidden" a worker
    gives the final hidden states ``(B, L, hidden)`` in place of logits, except to a loop of
    mlx-lm's that is not wrapped and would sample from them.
    """

    def call(wrapped: Any, owner: Any, args: Any, kwargs: Any) -> Any:
        stage = family.stage_of(owner)
        if stage.pipeline_size == 1:
            return wrapped(*args, **kwargs)
        forward = Forward(stage)
        with during(forward=forward):
            out = wrapped(*args, **kwargs)
        if forward.gives_hidden and forward.hidden is not None:
            return forward.hidden
        run = this_thread.run
        if run is None or not forward.is_left_out:
            return out
        # A loop of the user's own has begun it already (`Run.leave_out`).
        if run.stage is not None and not is_called_by(
            LOOPS_MODULE, "mlx_lm.", "wrapt.", __package__
        ):
            run.begin()  # other packages have wrapped the model
        if run.stage is not None:  # a loop of one's own may share other numbers than ids
            flat: Any = tree_flatten([out])
            run.step.vocabulary = next(a.shape[-1] for _, a in flat if isinstance(a, mx.array))
        if not run.is_worker:
            return out
        return tree_map(lambda a: not_computed(a) if isinstance(a, mx.array) else a, out)

    return call


def stage_call(wrapped: Any, stage: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of the pipelined model's ``__call__``: keeps the final hidden states.

    Outside a run, weights that were left on disk are read: upstream's forward pass follows.
    """
    forward: Forward | None = this_thread.forward
    is_whole = forward is not None and forward.stage is stage
    if stage.pipeline_size > 1 and not _is_of_run(stage):
        on_disk.read(stage, with_head=is_whole and not (forward and forward.gives_hidden))
    hidden = wrapped(*args, **kwargs)
    if forward is not None and is_whole:
        forward.hidden = hidden
    return hidden


def _is_of_run(stage: Any) -> bool:
    run = this_thread.run
    return run is not None and (run.stage is None or run.stage is stage)


def on_all_gather(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.distributed.all_gather`: the hidden broadcast of a run is left out.

    Keeping the broadcast beside the token share would cost a collective more than upstream. Its
    caller takes the first B rows: on rank 0 these are its own. All other calls are upstream's,
    other packages' within a forward pass too.
    """
    run: Run | None = this_thread.run
    if run is None or not _is_hidden_broadcast(run.stage) or not run.leave_out(*args, **kwargs):
        return wrapped(*args, **kwargs)
    if this_thread.forward is not None:
        this_thread.forward.is_left_out = True
    return not_computed(args[0]) if run.is_worker else args[0]


def _can_be_left_out(all_gather: Any) -> str:
    """A check as those of `drift`: of ``all_gather``, and of the GPUs of this process.

    Where two ranks ran on the first of two GPUs that both saw, 3 of 11 starts ended in the first
    token share, with an error of CUDA's; none did where each rank saw one GPU.
    """
    gpus = mx.device_count(mx.gpu)
    if waits_by_spinning() and gpus > 1:
        return (
            f"expected one GPU, found {gpus}, with which CUDA may end a rank (cudaMemcpy: invalid "
            "argument). Let each rank see one: mlx.launch ... --env CUDA_VISIBLE_DEVICES=0, or, "
            "for ranks on one machine, -- sh -c 'CUDA_VISIBLE_DEVICES=$MLX_RANK python ...'"
        )
    return drift.anything(all_gather)


_LOST = "every rank runs the head"
PATCHES = (
    Patch(BROADCAST, "mlx.core", "distributed.all_gather", on_all_gather, _can_be_left_out, _LOST),
)


def patches(family: Family) -> tuple[Patch, ...]:
    """The patches of `family`: of its head, and of its pipelined model, which feeds the head."""
    row = (family.name, family.module)
    path = f"{family.head_class}.__call__"
    head = Patch(*row, path, model_call(family), drift.runs_head, _LOST, family.base or BROADCAST)
    if family.base:  # the patch of the pipelined model is the base family's
        return (head,)
    path = f"{family.stage_class}.__call__"
    return (Patch(*row, path, stage_call, drift.broadcasts, _LOST, BROADCAST), head)


def _is_hidden_broadcast(stage: Any) -> bool:
    """Whether a method of `stage` calls ``all_gather``; of any stage, if `stage` is None.

    Frames of the stack tell. An attribute would not: other packages may have wrapped
    ``all_gather``, on one rank only, and each of their functions is in between.
    """
    frame: FrameType | None = sys._getframe(2)
    called: CodeType | None = None
    while frame is not None:
        code = frame.f_code
        if _gathers(code):
            owner = frame.f_locals.get(code.co_varnames[0])
            if owner is stage or (stage is None and hasattr(owner, "pipeline_rank")):
                return called is None or called in _codes(mx.distributed.all_gather)
        if not frame.f_globals.get("__name__", "").startswith("wrapt."):
            called = code
        frame = frame.f_back
    return False


@functools.cache
def _gathers(code: CodeType) -> bool:
    return code.co_argcount > 0 and drift.count_in(code, "all_gather") == 1


def _codes(function: Any) -> set[Any]:
    """The code of a function, of what wraps it and of what it wraps."""
    wrappers = [getattr(layer, "_self_wrapper", layer) for layer in wrapt.wrapper_chain(function)]
    return {getattr(wrapper, "__code__", None) for wrapper in wrappers}
