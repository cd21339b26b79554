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

import functools
import gc
import io
import logging
import os
import re
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from . import config, drift, fetching, registry
from .families import LOADING_MODULE, Family
from .handles import Patch
from .registry import MLX, ModelStatus
from .sharing import not_computed

log = logging.getLogger("mlx_lm_skiphead")

NEEDED = (
    "the model was called outside mlx-lm's loops, or in one that was imported by name before "
    "mlx_lm_skiphead. It stays on disk if the plugin is imported first, and in a loop of your own "
    "with mlx_lm_skiphead.rank_zero_head()."
)


class _Loading(threading.local):
    """A call of mlx-lm's `sharded_load`, while it lasts."""

    is_open = False
    repo = ""
    folder = ""
    part: fetching.Part | None = None
    """What this rank has, once that is known."""
    model: Pipelined | None = None
    unreadable: dict[str, Exception] = {}  # noqa: RUF012
    """Files of weights that could not be opened, which is an error if they are needed."""


_loading = _Loading()


class Left(NamedTuple):
    """What is known of a module with dead weights: ``vars(module)["_skiphead"]``."""

    name: str
    where: str
    repo: str
    """What `sharded_load` was given, or ""."""
    files: list[str]
    """Those that have its weights; of these those that are not there, if there are any."""
    stand_ins: dict[str, mx.array]
    """NaN, where the files cannot be read."""


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
        lefts: list[Left] = [vars(m)["_skiphead"] for m in modules if on_disk(m)]
        return tuple(sorted({os.path.basename(f) for x in lefts if x.stand_ins for f in x.files}))


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
    """The weights of a module, or of None, that are as they were loaded and have not been read.

    Not those that somebody has recast or replaced: these are evaluated as upstream.
    """
    left = None if module is None else vars(module).get("_skiphead")
    if left is None:
        return {}
    arrays = {k: v for k, v in module.items() if isinstance(v, mx.array)}
    return {k: v for k, v in arrays.items() if _is_of_file(v) or v is left.stand_ins.get(k)}


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
        _loading.part = part(family, owner, stage)
        for name, module in found.items():
            _note(module, name, f"{name} of {family.name} on rank {rank}", owner)
        _raise_if_needed(owner)
        references = {k: weakref.ref(m) for k, m in found.items() if "_skiphead" in vars(m)}
        new = Pipelined(weakref.ref(owner), family, rank, ranks, references)
        _pipelined[:] = [*(p for p in models() if p.owner() is not owner), new]
        _loading.model = new
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


def _note(module: Any, name: str, where: str, owner: Any) -> None:
    """Note what a module has on disk; NaN takes the place of weights that no file has."""
    arrays = {k: v for k, v in module.items() if isinstance(v, mx.array)}
    files, missing = _files(name)
    stand_ins = {}
    if missing and all(map(_is_new, arrays.values())):
        # Made anew for want of a file, in any type: that of the others is what others send.
        loaded = [a.dtype for a in weights_of(owner).values() if _is_of_file(a)]
        kinds = Counter(dtype for dtype in loaded if mx.issubdtype(dtype, mx.inexact))
        for key, array in arrays.items():
            is_float = kinds and mx.issubdtype(array.dtype, mx.inexact)
            kind = kinds.most_common(1)[0][0] if is_float else array.dtype
            stand_ins[key] = module[key] = not_computed(array.astype(kind))
        mx.eval(stand_ins)
    if stand_ins or name != "norm":
        repo = _loading.repo if _loading.is_open else ""
        vars(module)["_skiphead"] = Left(name, where, repo, missing or files, stand_ins)


def _files(name: str) -> tuple[list[str], list[str]]:
    """The files of the checkpoint that is being loaded with a module's weights; those not there."""
    index = fetching.weight_map(_loading.folder)
    part = _loading.part
    found = {index[key] for key in fetching.keys_of(name, part.embedding, index)} if part else ()
    paths = sorted({os.path.join(_loading.folder, p) for p in found or index.values()})
    unreadable = _loading.unreadable.keys()
    is_missing = (_loading.is_open and (p in unreadable or not os.path.exists(p)) for p in paths)
    return paths, [path for path, missing in zip(paths, is_missing, strict=True) if missing]


def embedded_type() -> str:
    """The type of what the model that is being loaded embeds; "" where its embedding is not here.

    The ranks without it receive hidden states of that type.
    """
    embedding = _embedding()
    if embedding is None or (
        "_skiphead" in vars(embedding) and vars(embedding)["_skiphead"].stand_ins
    ):
        return ""
    return str(embedding(mx.array([0])).dtype).rpartition(".")[2]  # nothing is evaluated


def embed_as(kind: str) -> None:
    """Let NaN in the place of an embedding be of the type that another rank's gives."""
    embedding = _embedding()
    if kind and embedding is not None and not embedded_type():
        left: Left = vars(embedding)["_skiphead"]
        for key, array in left.stand_ins.items():
            if mx.issubdtype(array.dtype, mx.inexact):
                left.stand_ins[key] = embedding[key] = not_computed(array.astype(getattr(mx, kind)))


def _embedding() -> Any:
    model = _loading.model
    owner = model and model.owner()
    return (
        None
        if model is None or owner is None
        else model.family.part_of(owner, model.family.embedding)
    )


def _raise_if_needed(owner: Any) -> None:
    """What could not be opened is no error, unless a weight is missing that this rank needs."""
    for error in _loading.unreadable.values():
        if any(map(_is_new, weights_of(owner).values())):
            raise error
    _loading.unreadable = {}


def bring(family: Family, owner: Any, *parts: Any, read: bool = True) -> None:
    """Fetch and read the weights of parts of a model, if that is to be done: a use of them follows.

    Says so in one line of the log. Without `read` only what is not there is brought.

    Raises:
        RuntimeError: if they cannot be had; the message names the file.
    """
    modules = [module for part in parts for module in getattr(part, "modules", list)()]
    noted: list[tuple[Any, Left, dict[str, mx.array]]] = [
        (module, vars(module)["_skiphead"], weights)
        for module in modules
        if (weights := on_disk(module))
    ]
    absent = [(module, left) for module, left, _ in noted if left.stand_ins]
    if not read:
        noted = [each for each in noted if each[1].stand_ins]
    if not noted:
        return
    where = " and ".join(left.where for _, left, _ in noted)
    paths = sorted({path for _, left in absent for path in left.files})
    try:
        if absent:
            fetching.fetch(absent[0][1].repo, paths)
            load = sys.modules[LOADING_MODULE].load_model
            model, _ = load(Path(paths[0]).parent, lazy=True, strict=False)
            new_owner = family.owner_of(model)
            news = [family.part_of(new_owner, left.name) for _, left in absent]
            mx.eval([weights_of(new) for new in news])
            for (module, _), new in zip(absent, news, strict=True):
                _become(module, new)
        mx.eval([weights for *_, weights in noted])
    except Exception as error:
        for module, left, weights in noted:
            if "_skiphead" in vars(module):
                module.update(stand_ins := {k: not_computed(v) for k, v in weights.items()})
                vars(module)["_skiphead"] = left._replace(stand_ins=stand_ins)
        files = sorted({path for _, left, _ in noted for path in left.files})
        raise RuntimeError(
            f"{where} was left on disk and cannot be read from {', '.join(files)} "
            f"({error}). It is needed now: {NEEDED}"
        ) from error
    size = sum(array.nbytes for *_, weights in noted for array in weights.values())
    told = f"read from disk, {size / 1e6:.1f} MB"
    if absent:
        files_size = sum(map(os.path.getsize, paths))
        names = ", ".join(map(os.path.basename, paths))
        told = f"fetched with {names}, {files_size / 1e6:.1f} MB"
    log.warning("%s has been %s: %s", where, told, NEEDED)


def _become(module: Any, new: Any) -> None:
    """Make a module what another one is, for all that hold it: it may be quantized now."""
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


def sharded_load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mlx_lm.utils.sharded_load`: a file of dead weights only need not be there."""
    _loading.is_open, _loading.part, _loading.model, _loading.unreadable = True, None, None, {}
    _loading.repo = str(args[0] if args else kwargs.get("repo", ""))
    try:
        loaded = wrapped(*args, **kwargs)
        for error in _loading.unreadable.values():
            raise error  # there is no pipeline, which would have looked whether it is needed
        return loaded
    finally:
        _loading.is_open, _loading.part, _loading.model, _loading.unreadable = False, None, None, {}


def download(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mlx_lm.utils._download`: for a rank of a pipeline, the files that it needs.

    Only where `sharded_load` names the files, having split the model.
    """
    files = kwargs.get("allow_patterns")
    if _loading.is_open and _loading.part is not None and files:
        index = fetching.weight_map(_loading.folder)
        kwargs = {**kwargs, "allow_patterns": sorted(_loading.part.needed(files, index))}
    path = wrapped(*args, **kwargs)
    if _loading.is_open:
        _loading.folder = os.path.abspath(path)
    return path


def load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.load`: lazy arrays that any thread may evaluate.

    In mlx from 0.32 on an array belongs to the thread that made it, until it is evaluated.
    """
    if not (args and isinstance(args[0], str | os.PathLike)):
        return wrapped(*args, **kwargs)
    path = os.path.abspath(args[0])
    _loading.folder = os.path.dirname(path)
    try:
        return wrapped(*args, **{**_any_thread(), **kwargs})
    except Exception as error:
        if not _loading.is_open:
            raise
        _loading.unreadable[path] = error
        return {}


@functools.cache
def _any_thread() -> dict[str, Any]:
    make = getattr(mx, "new_thread_unsafe_stream", None)
    return {"stream": make(mx.cpu)} if make else {}


def save(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.save_safetensors`, which does not write NaN for what no file has.

    Raises:
        RuntimeError: if it would.
    """
    arrays = {id(value) for _, value in _flat([args, kwargs])}
    for pipelined in models():
        for module in filter(None, (reference() for reference in pipelined.dead.values())):
            left: Left = vars(module)["_skiphead"]
            if any(id(array) in arrays for array in left.stand_ins.values()):
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
    _row(MLX, "load", load, "a head is read in the thread that has loaded the model"),
    _row(MLX, "eval", evaluate, "every rank reads the head"),
    _row(MLX, "save_safetensors", save, "NaN is saved for weights that are not there"),
    _row(LOADING_MODULE, "sharded_load", sharded_load, "all files of weights must be there"),
    _row(LOADING_MODULE, "_download", download, "every rank fetches the files of the head"),
)


def patches(family: Family) -> tuple[Patch, ...]:
    """What notes the dead weights of `family`."""
    path = f"{family.stage_class}.pipeline"
    lost = "every rank reads the head"
    row = Patch(family.name, family.module, path, pipeline, drift.anything, lost)
    return () if family.base else (row,)
