"""Weights that a rank does not use stay on disk.

mlx-lm loads lazily: a weight is read when something evaluates it, and what evaluates them all is
``mx.eval(model.parameters())``. So when a pipeline is set up, the modules whose weights this rank
never uses are noted: a worker's head, and the embedding of every rank but the last, which embeds
the tokens. (Where the embedding is the head too, tied, rank 0 keeps it as well.) `mx.eval` leaves
out their weights as long as they are lazy arrays of a file. They stay in the model, and whatever
really uses them gets them, since a lazy array is a valid one: `set_dtype`, adapters, saving,
pickling and copying work as upstream, also after `uninstall`. Weights that somebody recasts are
evaluated, and take memory, as upstream.

A direct call of the model, or a loop that was imported by name before the plugin, reads them once,
in any thread, and the log says so. A model that was loaded eagerly, as `mlx_lm.load` does, keeps
everything.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import weakref
from contextlib import suppress
from operator import attrgetter
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import config
from ..families import BY_NAME, LOADING_MODULE, Family
from ..patching import drift
from ..patching.frames import caller
from ..patching.handles import Patch, Wrapper
from ..patching.registry import SkipheadError, lock
from ..ranks import agreement
from . import fetching
from .fetching import NORM, Absent, loading

log = logging.getLogger("mlx_lm_skiphead")

READ = (
    "%s of %s on rank %d has been read from disk, %.1f MB: the model was called outside mlx-lm's "
    "loops, or in one that was imported by name before mlx_lm_skiphead. It stays on disk if the "
    "plugin is imported first, and in a loop of your own with mlx_lm_skiphead.rank_zero_head()."
)


class ModelStatus(NamedTuple):
    """A model that was split into a pipeline while the plugin was on, on this rank."""

    family: str
    rank: int
    ranks: int
    layers: tuple[int, int]
    """The first one of this rank, and the one after the last."""
    on_disk: dict[str, int]
    """Bytes of weights that have not been read, by name of the module that they belong to."""
    not_here: tuple[str, ...] = ()
    """What is missing on this machine, a sentence for each module."""

    def __str__(self) -> str:
        parts = [f"{name} {size / 1e6:.1f} MB" for name, size in self.on_disk.items()]
        left = " and ".join(parts) or "nothing"
        absent = "".join(f"; {missing}" for missing in self.not_here)
        part = f"rank {self.rank} of {self.ranks}, layers {self.layers[0]}-{self.layers[1] - 1}"
        return f"{self.family}, {part}: {left} left on disk{absent}"


class Pipelined(NamedTuple):
    """A model whose pipeline was set up while the plugin was on."""

    owner: weakref.ref[Any]
    family: Family
    rank: int
    ranks: int
    layers: tuple[int, int]
    unused: dict[str, weakref.ref[Any]]
    """By name, the modules with weights that this rank does not use in mlx-lm's loops."""
    lacks: dict[int, str]
    """By rank, what a direct call of the model needs and that rank lacks."""

    def on_disk(self) -> dict[str, dict[str, mx.array]]:
        """The weights that have not been read, by name of their module.

        Not those that somebody has recast or replaced: these are evaluated as upstream.
        """
        modules = {name: reference() or {} for name, reference in self.unused.items()}
        lazy = {k: {n: a for n, a in m.items() if _is_of_file(a)} for k, m in modules.items()}
        return {name: weights for name, weights in lazy.items() if weights}

    def status(self) -> ModelStatus:
        sizes = {name: sum(a.nbytes for a in w.values()) for name, w in self.on_disk().items()}
        missing = tuple(module.missing for module in self.absent())
        place = self.rank, self.ranks, self.layers
        return ModelStatus(self.family.name, *place, sizes, missing)

    def absent(self) -> list[Absent]:
        """What stands for modules that are not on this machine."""
        modules = (reference() for reference in self.unused.values())
        return [module for module in modules if isinstance(module, Absent)]


_pipelined: list[Pipelined] = []
"""Changed under `lock`."""
_owners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""By the id of a pipelined model, the head owner that it is a part of."""


def owner_of(stage: Any) -> Any:
    """The head owner that a pipelined model is a part of; None if it is of no family."""
    return _owners.get(id(stage))


def models() -> list[Pipelined]:
    """The pipelined models that are alive."""
    with lock:
        return [p for p in _pipelined if p.owner() is not None]


def unused(family: Family, owner: Any, stage: Any) -> list[str]:
    """The modules whose weights this rank never uses in mlx-lm's loops, by name."""
    rank, last, tied = stage.pipeline_rank, stage.pipeline_size - 1, family.is_tied(owner)
    head = ["lm_head"] if rank != 0 and not tied else []
    return head + ([family.embedding] if rank != last and not (tied and rank == 0) else [])


def part(family: Family, owner: Any, stage: Any) -> fetching.Part:
    """The part of a checkpoint that this rank uses in mlx-lm's loops."""
    names = unused(family, owner, stage)
    if stage.pipeline_rank != 0 and config.active != "hidden":
        # Not to be left on disk, being a few kilobytes, but no reason to fetch a file.
        names.append(NORM)
    layers = range(stage.start_idx, stage.end_idx)
    return fetching.Part(layers, family.embedding, tuple(names))


def on_init(family: Family) -> Wrapper:
    """The wrapper of ``__init__`` of the class that has the head: notes whose stage is whose."""

    def init(wrapped: Any, owner: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        with suppress(AttributeError):  # a class that inherits and is built otherwise
            _owners[id(family.stage_of(owner))] = owner
            vars(owner)["_skiphead_family"] = family.name

    return init


def on_pipeline(wrapped: Any, stage: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of ``pipeline(group)``: upstream's, then what this rank never uses is noted."""
    result = wrapped(*args, **kwargs)
    owner = owner_of(stage)
    if owner is None or stage.pipeline_size == 1:
        return result
    family = BY_NAME[vars(owner)["_skiphead_family"]]
    if loading.is_open:
        loading.part = part(family, owner, stage)
    names = unused(family, owner, stage)
    for name in [*names, NORM] if stage.pipeline_rank else names:
        parent = family.parent_of(owner, name)
        absent = fetching.absent(name, attrgetter(name)(parent))
        if absent is not None:
            setattr(parent, name, absent)
            names += [name] if name == NORM else []
    references = {n: weakref.ref(attrgetter(n)(family.parent_of(owner, n))) for n in names}
    split = (stage.pipeline_rank, stage.pipeline_size, (stage.start_idx, stage.end_idx))
    new = Pipelined(weakref.ref(owner), family, *split, references, {})
    with lock:
        _pipelined[:] = [*(p for p in models() if p.owner() is not owner), new]
    if loading.is_open:
        loading.model = new
    return result


def read(stage: Any, with_head: bool) -> None:
    """Read the weights that this rank has left on disk and a forward pass of upstream's uses.

    Args:
        stage: the pipelined model that is called.
        with_head: whether logits are made of what it gives.

    Raises:
        SkipheadError: if any rank lacks it; on all ranks, so that none waits for another.
    """
    owner = owner_of(stage)
    for model in models():
        if model.owner() is not owner:
            continue
        if model.lacks:
            # A rank that fails alone has not sent, and the others wait.
            rank, missing = next(iter(model.lacks.items()))
            raise SkipheadError(
                "The model was called outside mlx-lm's loops, where every rank runs the norm and "
                f"the head. On rank {rank} {missing}"
            )
        name = model.family.embedding if model.family.is_tied(owner) else "lm_head"
        weights = model.on_disk().get(name, {}) if with_head and model.rank else {}
        if not weights:
            continue
        try:
            mx.eval(list(weights.values()))
        except RuntimeError as error:
            # A second attempt of MLX to read an array gives garbage, and no error.
            lost = {key: mx.full(a.shape, float("nan")) for key, a in weights.items()}
            cast(Any, model.unused[name]()).update(lost)
            model.lacks[model.rank] = f"{name} was left on disk and cannot be read ({error})"
            return read(stage, with_head)
        size = sum(array.nbytes for array in weights.values()) / 1e6
        log.warning(READ, name, model.family.name, model.rank, size)


def _tell() -> dict[str, str]:
    """This rank's facts about the model that is being loaded: the type that it embeds in, and the
    modules that it lacks and a direct call needs."""
    model: Pipelined | None = loading.model
    if model is None:
        return {}
    owner, family = model.owner(), model.family
    embedding = attrgetter(family.embedding)(family.stage_of(owner))
    # Nothing is evaluated.
    dtype = "" if isinstance(embedding, Absent) else str(embedding(mx.array([0])).dtype)
    used = (family.embedding if family.is_tied(owner) else "lm_head", NORM)
    is_used = model.rank != 0 and config.active != "hidden"
    lacks = [a.missing for a in model.absent() if is_used and a.name in used]
    return {"embeds in": dtype.rpartition(".")[2], "lacks": " ".join(lacks)[:800]}


def _hear(by_rank: list[dict[str, str]]) -> None:
    model: Pipelined | None = loading.model
    if model is None:
        return
    model.lacks.update({r: said["lacks"] for r, said in enumerate(by_rank) if said.get("lacks")})
    dtype = next(filter(None, (said.get("embeds in") for said in by_rank)), "")
    for absent in model.absent() if dtype else ():
        absent.embeds_in(getattr(mx, dtype))


agreement.topics.append((_tell, _hear))


def on_eval(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.eval`: leaves out weights that this rank never uses, of a tree of weights.

    A tree of weights is a dict. The arrays that a loop evaluates in each step are in none.
    """
    if not any(isinstance(arg, dict) for arg in args):
        return wrapped(*args, **kwargs)
    left_out = {id(a) for p in models() for w in p.on_disk().values() for a in w.values()}
    trees = ([value for _, value in _flat(arg) if id(value) not in left_out] for arg in args)
    return wrapped(*trees, **kwargs)


def on_load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.load`: lazy arrays of a model's file that any thread may evaluate.

    In mlx from 0.32 on an array belongs to the thread that made it, until it is evaluated. Only
    where there are several ranks and mlx-lm's `load_model` loads a model.
    """
    if not any(name in os.environ for name in RANK) or caller(LOADING_MODULE, "load_model") is None:
        return wrapped(*args, **kwargs)
    return wrapped(*args, **{**_any_thread(), **kwargs})


RANK = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""The variables by which launchers tell a rank its number."""


@functools.cache
def _any_thread() -> dict[str, Any]:
    make = getattr(mx, "new_thread_unsafe_stream", None)
    return {"stream": make(mx.cpu)} if make else {}


def size_of(module: Any) -> int:
    """The bytes of all weights of `module`, read or not."""
    return sum(array.nbytes for _, array in _flat(module.parameters()))


def is_pending(array: mx.array) -> bool:
    """Whether `array` has yet to be computed, or read."""
    return bool(_operations(array))


def _flat(tree: Any) -> list[tuple[str, Any]]:
    flat: Any = tree_flatten(tree)
    return flat  # type: ignore[no-any-return]


def _is_of_file(value: Any) -> bool:
    return isinstance(value, mx.array) and _operations(value) == ["Load"]


def _operations(array: mx.array) -> list[str]:
    """The operations that have yet to run for `array`, by name."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return re.findall(r'label ="(\w+)', graph.getvalue())


WEIGHTS = "weights"
_LOST = "every rank reads the head"
_THREAD = "a head is read in the thread that loaded it"
PATCHES = (
    Patch(WEIGHTS, "mlx.core", "eval", on_eval, drift.anything, _LOST),
    Patch(WEIGHTS, "mlx.core", "load", on_load, drift.anything, _THREAD),
)


def patches(family: Family) -> tuple[Patch, ...]:
    """The patches by which the weights are known that a rank of `family` never uses."""
    row = (family.name, family.module)
    path = f"{family.head_class}.__init__"
    init = Patch(*row, path, on_init(family), drift.anything, _LOST)
    if family.base:  # the patch of the pipelined model is the base family's
        return (init,)
    path = f"{family.stage_class}.pipeline"
    return (init, Patch(*row, path, on_pipeline, drift.anything, _LOST))
