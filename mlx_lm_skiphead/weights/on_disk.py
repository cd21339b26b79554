"""Weights that a rank does not use stay on disk.

mlx-lm loads lazily: a weight is read when something evaluates it, and what evaluates them all is
``mx.eval(model.parameters())``. So when a pipeline is set up, the modules whose weights this rank
never uses are noted: a worker's head, and the embedding of every rank but the last, which embeds
the tokens. (Where the embedding is the head too, tied, rank 0 keeps it as well.) `mx.eval` leaves
out their weights as long as they are lazy arrays of a file. They stay in the model, and whatever
really uses them gets them, since a lazy array is a valid one: `set_dtype`, adapters, saving,
pickling and copying work as upstream. Weights that somebody recasts are evaluated, and take memory,
as upstream.

What needs them reads them once, in any thread: a direct call of the model, saving it, or a loop
that was imported by name before the plugin. A call says so in the log. This also holds after
`uninstall`. A model that was loaded eagerly, as `mlx_lm.load` does, keeps everything.

A file that has nothing else need not be there (`fetching`), and then also a worker's final norm may
be in it. NaN takes the place of what is not there, until a direct call of the model needs it.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import re
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import config
from ..families import LOADING_MODULE, Family
from ..patching import drift, registry
from ..patching.handles import Patch
from ..patching.registry import MLX, ModelStatus
from ..skipping.sharing import not_computed
from . import fetching
from .loading import files_of, loading

log = logging.getLogger("mlx_lm_skiphead")

NEEDED = (
    "the model was called outside mlx-lm's loops, or in one that was imported by name before "
    "mlx_lm_skiphead. It stays on disk if the plugin is imported first, and in a loop of your own "
    "with mlx_lm_skiphead.rank_zero_head()."
)


class Left(NamedTuple):
    """What is known of a module with dead weights: ``vars(module)["_skiphead"]``."""

    name: str
    where: str
    repo: str
    """What `sharded_load` was given, or ""."""
    files: list[str]
    """Those that have its weights; where some of these are not there, they."""
    absent: bool = False
    """Whether the files are not there, or cannot be read: NaN is in the place of the weights."""
    kind: mx.Dtype | None = None
    """The type of that NaN, unless somebody recasts it."""


class Pipelined(NamedTuple):
    """A model whose pipeline was set up while the plugin was on."""

    owner: weakref.ref[Any]
    family: Family
    rank: int
    ranks: int
    dead: dict[str, weakref.ref[Any]]
    """By name, the modules with weights that this rank does not use."""

    def on_disk(self) -> dict[str, dict[str, mx.array]]:
        """The weights that have not been read, by name of their module."""
        modules = {name: reference() for name, reference in self.dead.items()}
        return {k: weights for k, module in modules.items() if (weights := on_disk(module))}

    def status(self) -> ModelStatus:
        sizes = {name: sum(a.nbytes for a in w.values()) for name, w in self.on_disk().items()}
        return ModelStatus(self.family.name, self.rank, self.ranks, sizes, self.absent())

    def absent(self) -> tuple[str, ...]:
        """The files that were left out and are not there."""
        modules = (reference() for reference in self.dead.values())
        return tuple(
            sorted({os.path.basename(f) for m in modules if is_absent(m) for f in _left(m).files})
        )


_pipelined: list[Pipelined] = []


def models() -> list[Pipelined]:
    """The pipelined models that are alive."""
    return [p for p in _pipelined if p.owner() is not None]


def complete(stage: Any = None) -> None:
    """Bring what is not here and upstream needs, for one pipelined model or all that are alive.

    Raises as `bring`.
    """
    if stage is None and any(p.absent() for p in models()):
        gc.collect()  # not for models that nobody has any more
    for reference, family, rank, *_ in models():
        owner = reference()
        if owner is not None and rank and (stage is None or family.stage_of(owner) is stage):
            bring(family, owner, *needed(family, owner), read=False)


def on_disk(module: Any) -> dict[str, mx.array]:
    """The weights of a module, or of None, that have not been read.

    Not those that somebody has recast or replaced: these are evaluated as upstream.
    """
    if _left(module) is None:
        return {}
    every = is_absent(module)
    return {k: v for k, v in _arrays(module).items() if every or _is_of_file(v)}


def is_absent(module: Any) -> bool:
    """Whether NaN is in the place of the weights of a module, or of None; recast it stays NaN."""
    left = _left(module)
    if left is None or not left.absent:
        return False
    return _is_nan(module)


def _is_nan(module: Any) -> bool:
    for array in _floats(module):
        with suppress(RuntimeError):  # it is of another thread, where alone it can be computed
            if mx.isnan(array[(0,) * array.ndim]).item():
                return True
    return False


def _left(module: Any) -> Any:
    return None if module is None else vars(module).get("_skiphead")


def _arrays(module: Any) -> dict[str, mx.array]:
    return {k: v for k, v in module.items() if isinstance(v, mx.array)}


def _floats(module: Any) -> list[mx.array]:
    return [a for a in _arrays(module).values() if mx.issubdtype(a.dtype, mx.inexact)]


def pipeline(wrapped: Any, stage: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of ``pipeline(group)``: upstream's, then this rank's dead weights are noted."""
    result = wrapped(*args, **kwargs)
    split = registry.owner_of(stage) if stage.pipeline_size > 1 else None
    if split is not None:
        family, owner, _ = split
        rank, ranks = stage.pipeline_rank, stage.pipeline_size
        found = {name: attrgetter(name)(parent) for parent, name in dead(family, owner, stage)}
        if rank != 0:
            found["norm"] = stage.norm
        loading.part = part(family, owner, stage)
        for name, module in found.items():
            _note(module, name, f"{name} of {family.name} on rank {rank}")
        _raise_if_needed(owner)
        references = {k: weakref.ref(m) for k, m in found.items() if _left(m)}
        new = Pipelined(weakref.ref(owner), family, rank, ranks, references)
        _pipelined[:] = [*(p for p in models() if p.owner() is not owner), new]
        loading.model = new
    return result


def dead(family: Family, owner: Any, stage: Any) -> Iterator[tuple[Any, str]]:
    """What this rank never uses in mlx-lm's loops, as the parent module and a name."""
    rank, last = stage.pipeline_rank, stage.pipeline_size - 1
    tied = getattr(owner, "lm_head", None) is None
    if rank != 0 and not tied:
        yield owner, "lm_head"
    if rank != last and not (tied and rank == 0):
        yield stage, family.embedding


def part(family: Family, owner: Any, stage: Any) -> fetching.Part:
    """What this rank uses of a checkpoint in mlx-lm's loops."""
    unused = [name for _, name in dead(family, owner, stage)]
    if stage.pipeline_rank != 0 and config.active != "hidden":
        # Not to be left on disk, being a few kilobytes, but no reason to fetch a file.
        unused.append("norm")
    layers = range(stage.start_idx, stage.end_idx)
    return fetching.Part(layers, family.embedding, tuple(unused))


def needed(family: Family, owner: Any, logits: bool = True) -> list[Any]:
    """What a worker does not use in mlx-lm's loops, but in upstream's forward pass."""
    norm = family.stage_of(owner).norm
    return [norm, family.head_of(owner)] if logits else [norm]


def _note(module: Any, name: str, where: str) -> None:
    """Note what a module has on disk; NaN takes the place of weights that no file has."""
    files, missing = files_of(name)
    absent = bool(missing) and all(map(_is_new, _arrays(module).values()))
    if absent:
        _put_nan(module)
    if absent or name != "norm":
        repo = loading.repo if loading.is_open else ""
        vars(module)["_skiphead"] = Left(name, where, repo, missing or files, absent)


def _put_nan(module: Any) -> None:
    module.update({key: not_computed(array) for key, array in _arrays(module).items()})
    mx.eval(list(_arrays(module).values()))


def embedded_type() -> str:
    """The type of what the model that is being loaded embeds; "" where its embedding is not here.

    The ranks without it receive hidden states of that type.
    """
    loaded: Pipelined | None = loading.model
    owner = loaded and loaded.owner()
    if loaded is None or owner is None:
        return ""
    embedding = loaded.family.part_of(owner, loaded.family.embedding)
    # Nothing is evaluated.
    return "" if is_absent(embedding) else str(embedding(mx.array([0])).dtype).rpartition(".")[2]


def embed_as(name: str) -> None:
    """Let NaN in the place of weights be of the type that another rank embeds in."""
    loaded: Pipelined | None = loading.model
    kind = getattr(mx, name, None)
    for reference in loaded.dead.values() if loaded and kind else ():
        module: Any = reference()
        if is_absent(module):
            module.set_dtype(kind)
            _put_nan(module)
            vars(module)["_skiphead"] = _left(module)._replace(kind=kind)


def _raise_if_needed(owner: Any) -> None:
    """What could not be opened is no error, unless a weight is missing that this rank needs."""
    for error in loading.unreadable.values():
        if any(map(_is_new, weights_of(owner).values())):
            raise error
    loading.unreadable = {}


def bring(family: Family, owner: Any, *parts: Any, read: bool = True) -> None:
    """Fetch and read the weights of parts of a model, if that is to be done: a use of them follows.

    Says so in one line of the log. Without `read` only what is not there is brought.

    Raises:
        RuntimeError: if they cannot be had; the message names the file.
    """
    modules = [module for part in parts for module in getattr(part, "modules", list)()]
    absent = [(module, _left(module)) for module in modules if is_absent(module)]
    noted = absent if not read else [(m, _left(m)) for m in modules if on_disk(m)]
    if _is_replaced(owner) and any(_is_nan(module) for module in modules if not _left(module)):
        raise RuntimeError(
            "The head or the norm was made (quantized, fused) from weights that are not here. "
            "Fetch all files of the model, or call mlx_lm_skiphead.uninstall(), before that."
        )
    if not noted:
        return
    where = " and ".join(left.where for _, left in noted)
    paths = sorted({path for _, left in absent for path in left.files})
    try:
        if absent:
            fetching.fetch(absent[0][1].repo, paths)
            _read(family, owner, Path(paths[0]).parent, absent)
        mx.eval([list(_arrays(module).values()) for module, _ in noted])
    except Exception as error:
        for module, left in noted:
            if _left(module):  # what could not be read must not be read again as if it could
                _put_nan(module)
                vars(module)["_skiphead"] = left._replace(absent=True)
        files = sorted({path for _, left in noted for path in left.files})
        raise RuntimeError(
            f"{where} was left on disk and cannot be read from {', '.join(files)} "
            f"({error}). It is needed now: {NEEDED}"
        ) from error
    size = sum(array.nbytes for module, _ in noted for array in _arrays(module).values())
    told = f"read from disk, {size / 1e6:.1f} MB"
    if absent:
        size = sum(map(os.path.getsize, paths))
        told = f"fetched with {', '.join(map(os.path.basename, paths))}, {size / 1e6:.1f} MB"
    log.warning("%s has been %s: %s", where, told, NEEDED)


def _is_replaced(owner: Any) -> bool:
    """Whether a module that had dead weights is gone."""
    mine = (p for p in models() if p.owner() is owner)
    return any(reference() is None for p in mine for reference in p.dead.values())


def _read(family: Family, owner: Any, folder: Path, absent: list[tuple[Any, Left]]) -> None:
    """Make each module in `absent` what it is in `folder`, for all that hold it.

    It may be quantized then; it has the type that the program has given it meanwhile.
    """
    model, _ = sys.modules[LOADING_MODULE].load_model(folder, lazy=True, strict=False)
    for module, left in absent:
        new = family.part_of(family.owner_of(model), left.name)
        kinds = {array.dtype for array in _floats(module)} - {left.kind}
        if left.kind and len(kinds) == 1:
            new.set_dtype(kinds.pop())
        mx.eval(list(_arrays(new).values()))
        module.__class__ = type(new)
        for mine, its in ((module, new), (vars(module), vars(new))):
            dict.clear(mine)
            dict.update(mine, its)


def evaluate(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.eval`, which does not read what this rank does not use.

    Of trees of weights, that is: what a loop evaluates in each step is no dict.
    """
    if not any(isinstance(arg, dict) for arg in args):
        return wrapped(*args, **kwargs)
    left_out = {id(a) for p in models() for w in p.on_disk().values() for a in w.values()}
    trees = ([value for _, value in _flat(arg) if id(value) not in left_out] for arg in args)
    return wrapped(*trees, **kwargs)


def save(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.save_safetensors`, which does not write NaN for what no file has.

    Raises:
        RuntimeError: if it would.
    """
    arrays = {id(value) for _, value in _flat([args, kwargs])}
    for module in (reference() for p in models() for reference in p.dead.values()):
        if is_absent(module) and arrays & set(map(id, _arrays(module).values())):
            left = _left(module)
            raise RuntimeError(f"{left.where} cannot be saved: {left.files} is not there.")
    return wrapped(*args, **kwargs)


def weights_of(module: Any) -> dict[str, mx.array]:
    """All arrays of `module` by name."""
    return dict(_flat(module.parameters()))


def _flat(tree: Any) -> list[tuple[str, Any]]:
    flat: Any = tree_flatten(tree)
    return flat  # type: ignore[no-any-return]


def size_of(module: Any) -> int:
    """The bytes of all weights of `module`, read or not."""
    return sum(array.nbytes for array in weights_of(module).values())


def is_pending(array: mx.array) -> bool:
    """Whether `array` has yet to be computed, or read."""
    return bool(_operations(array))


def _is_new(array: mx.array) -> bool:
    """Whether `array` is what a module begins with, and of no file."""
    operations = _operations(array)
    return bool(operations) and "Load" not in operations


def _is_of_file(array: mx.array) -> bool:
    return _operations(array) == ["Load"]


def _operations(array: mx.array) -> list[str]:
    """What has yet to be done for `array`."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return re.findall(r'label ="(\w+)', graph.getvalue())


def _row(module: str, path: str, wrapper: Any, lost: str) -> Patch:
    return Patch(MLX, module, path, wrapper, drift.anything, lost)


PATCHES = (
    _row(MLX, "eval", evaluate, "every rank reads the head"),
    _row(MLX, "save_safetensors", save, "NaN is saved for weights that are not there"),
)


def patches(family: Family) -> tuple[Patch, ...]:
    """What notes the dead weights of `family`."""
    path = f"{family.stage_class}.pipeline"
    lost = "every rank reads the head"
    row = Patch(family.name, family.module, path, pipeline, drift.anything, lost)
    return () if family.base else (row,)
