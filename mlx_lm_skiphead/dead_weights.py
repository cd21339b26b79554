"""Weights that a rank does not use stay on disk.

mlx-lm loads lazily: a weight is read when something evaluates it, and what evaluates them all is
``mx.eval(model.parameters())``. So when a pipeline is set up, the arrays of a worker's head, and
of the embedding of a rank that embeds nothing, are replaced by NaN that takes the memory of one
number. The modules stay where they are, and each gets a class of its own, a subclass of its
class: what really needs the weights reads them first, and the module is the plain one again.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from . import config, drift, registry
from .families import LOADING_MODULE, Family
from .handles import Patch
from .head import not_computed
from .sharing import this_thread

log = logging.getLogger("mlx_lm_skiphead")
_lock = threading.RLock()

NEEDED = (
    "the model was called outside mlx-lm's loops, or in one that was imported by name before "
    "mlx_lm_skiphead, or its weights were asked for. They stay on disk if the plugin is imported "
    "first, and in a loop of your own with mlx_lm_skiphead.rank_zero_head()."
)


class _Loading(threading.local):
    """A call of mlx-lm's `sharded_load` for a pipeline, while it lasts."""

    is_open = False
    folder = ""
    unreadable: dict[str, Exception] = {}  # noqa: RUF012
    """Files of weights that could not be opened, which is an error if they are needed."""


_loading = _Loading()


class _Origin(NamedTuple):
    """Where a lazy array comes from."""

    path: str
    key: str


_origins: dict[int, tuple[weakref.ref[mx.array], _Origin]] = {}


class Left:
    """What one module has left on disk: ``vars(module)["_skiphead"]``."""

    def __init__(self, module: Any, where: str, missing: list[str]) -> None:
        self.where = where
        self.missing = missing
        """Files that should hold the weights and are not there or cannot be opened."""
        self.arrays = {k: v for k, v in module.items() if isinstance(v, mx.array)}
        self.stand_ins = {k: not_computed(v) for k, v in self.arrays.items()}
        mx.eval(self.stand_ins)
        self.origins = {k: _origins[id(v)][1] for k, v in self.arrays.items() if id(v) in _origins}
        # They stay open, in case their folder goes.
        self.files = {path: open(path, "rb") for path in {o.path for o in self.origins.values()}}  # noqa: SIM115

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def read(self) -> dict[str, mx.array]:
        """The weights by name, in memory. In any thread: lazy arrays belong to one.

        Raises:
            RuntimeError: if they cannot be read; the message names the file.
        """
        paths = self.missing or sorted(self.files)
        try:
            if self.missing:
                raise FileNotFoundError("it is not there or cannot be opened")
            weights = {k: v for k, v in self.arrays.items() if k not in self.origins}
            for opened, file in self.files.items():
                file.seek(0)
                loaded: Any = mx.load(file, format="safetensors")
                for name, (path, key) in self.origins.items():
                    if path == opened:
                        was = self.arrays[name]
                        if (loaded[key].shape, loaded[key].dtype) != (was.shape, was.dtype):
                            raise ValueError(f"{key} was {was.dtype} {was.shape} when it loaded")
                        weights[name] = loaded[key]
            mx.eval(weights)
        except Exception as error:
            raise RuntimeError(
                f"{self.where} was left on disk and cannot be read from "
                f"{', '.join(paths) or 'where it was loaded from'} ({error}). It is needed now: "
                f"{NEEDED}"
            ) from error
        return weights

    def is_in(self, module: Any, name: str) -> bool:
        """Whether `module` still has no more than a stand-in, perhaps of another type, there."""
        now = module.get(name)
        if now is self.stand_ins[name] or not isinstance(now, mx.array):
            return now is self.stand_ins[name]
        is_float = mx.issubdtype(now.dtype, mx.inexact)
        return bool(is_float and now.size and mx.isnan(now.reshape(-1)[0]).item())


def _is_unused(is_embedding: bool) -> bool:
    """Whether what a module on disk gives now is never computed: a forward pass is being built."""
    forward = this_thread.forward
    return forward is not None and (forward.skips_head or is_embedding)


def read(module: Any) -> None:
    """Bring the weights of `module` into memory; from then on it is a plain module again.

    In the type that they have by now; what somebody has put in their place stays.
    """
    with _lock:
        left: Left | None = vars(module).get("_skiphead")
        if left is None:
            return
        wanted = [name for name in left.arrays if left.is_in(module, name)]
        weights = left.read() if wanted else {}
        module.__class__ = type(module).__mro__[1]
        del vars(module)["_skiphead"]
        for name in wanted:
            array, now = weights[name], module[name]
            module[name] = array if array.dtype == now.dtype else array.astype(now.dtype)
        if wanted:
            log.warning(
                "%s has been read from disk, %.1f MB: %s", left.where, left.nbytes / 1e6, NEEDED
            )


@functools.cache
def _class_of(cls: Any) -> type:
    """A subclass of `cls` for modules whose weights are on disk."""

    def reading(name: str, unless: Callable[[], bool]) -> Any:
        @functools.wraps(getattr(cls, name))
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not unless():
                read(self)
                return getattr(cls, name)(self, *args, **kwargs)
            vars(self)["_skiphead_calls"] = vars(self).get("_skiphead_calls", 0) + 1
            try:
                return getattr(cls, name)(self, *args, **kwargs)
            finally:
                vars(self)["_skiphead_calls"] -= 1

        return call

    def __getattr__(self: Any, name: str) -> Any:
        left = vars(self).get("_skiphead")
        is_used = not vars(self).get("_skiphead_calls") and not _is_unused(is_embedding=False)
        if left is not None and name in left.arrays and is_used:
            read(self)
            return getattr(self, name)
        return cls.__getattr__(self, name)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        copied = cls.__new__(cls)
        memo[id(self)] = copied
        for name, value in self.items():
            copied[name] = value if isinstance(value, mx.array) else copy.deepcopy(value, memo)
        vars(copied).update(
            {
                k: v if k == "_skiphead" else copy.deepcopy(v, memo)
                for k, v in vars(self).items()
                if k != "_skiphead_calls"
            }
        )
        copied.__class__ = type(self)
        return copied

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        read(self)
        return self.__reduce_ex__(protocol)

    has_head = hasattr(cls, "as_linear")
    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__call__": reading("__call__", lambda: _is_unused(is_embedding=has_head)),
        "__getattr__": __getattr__,
        "_extra_repr": reading("_extra_repr", lambda: True),
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": __reduce_ex__,
    }
    if has_head:
        members["as_linear"] = reading("as_linear", lambda: _is_unused(is_embedding=False))
    return type(cls.__name__, (cls,), members)


class Pipelined(NamedTuple):
    """A model whose pipeline was set up while the plugin was on."""

    owner: weakref.ref[Any]
    family: Family
    rank: int
    ranks: int
    modules: list[tuple[str, Any]]
    """Names and weak references of the modules whose weights were left on disk."""

    def left(self) -> Iterator[tuple[str, Any, Left]]:
        """The modules whose weights have not been read, by name, and what each has left."""
        for name, reference in self.modules:
            module = reference()
            if module is not None and "_skiphead" in vars(module):
                yield name, module, vars(module)["_skiphead"]

    def on_disk(self) -> dict[str, int]:
        """Bytes that have not been read, by name of the module that they belong to."""
        return {name: left.nbytes for name, _, left in self.left()}


_pipelined: list[Pipelined] = []


def models() -> list[Pipelined]:
    """The pipelined models that are alive."""
    return [p for p in _pipelined if p.owner() is not None]


def pipeline(wrapped: Any, stage: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of ``pipeline(group)``: upstream's, then this rank's dead weights are left.

    Only what is not in memory yet: the weights of a model that was loaded eagerly stay.
    """
    result = wrapped(*args, **kwargs)
    if config.active == "off" or stage.pipeline_size == 1:
        return result
    with _lock:
        split = registry.owner_of(stage)
        if split is None:
            return result
        family, owner, _ = split
        rank, ranks = stage.pipeline_rank, stage.pipeline_size
        modules = []
        for parent, name in dead(family, owner, stage):
            module = attrgetter(name)(parent)
            if _leave(module, f"{name} of {family.name} on rank {rank}"):
                modules.append((name, weakref.ref(module)))
        for array in weights_of(owner).values() if _loading.unreadable else ():
            if is_pending(array) and not _is_read_from_file(array):
                raise next(iter(_loading.unreadable.values()))  # a file that is needed here
        _loading.unreadable = {}
        # A model may be split anew.
        modules += [m for p in models() if p.owner() is owner for m in p.modules]
        _pipelined[:] = [p for p in models() if p.owner() is not owner]
        _pipelined.append(Pipelined(weakref.ref(owner), family, rank, ranks, modules))
    return result


def dead(family: Family, owner: Any, stage: Any) -> Iterator[tuple[Any, str]]:
    """What this rank never uses in mlx-lm's loops, as the parent module and a name."""
    rank, last = stage.pipeline_rank, stage.pipeline_size - 1
    tied = getattr(owner, "lm_head", None) is None
    if rank != 0 and not tied:
        yield owner, "lm_head"
    if rank != last and not (tied and rank == 0):
        yield stage, family.embedding
    # Not the final norm: a few kilobytes, and it is on the way to the hidden states.


def _leave(module: Any, where: str) -> bool:
    """Leave the weights of `module` on disk, if that is where they are."""
    arrays = [value for value in module.values() if isinstance(value, mx.array)]
    if "_skiphead" in vars(module) or not arrays or not all(map(is_pending, arrays)):
        return False
    if len(arrays) != len(weights_of(module)):  # it is made of other modules
        return False
    missing: list[str] = []
    if not any(map(_is_read_from_file, arrays)):
        # Made anew, for want of a file, or because this model has random weights.
        missing = _missing_files() if _loading.is_open else []
        if not missing:
            return False
    left = Left(module, where, missing)
    vars(module)["_skiphead"] = left
    for name, array in left.stand_ins.items():
        module[name] = array
    kind: Any = type(module)
    module.__class__ = _class_of(kind)
    return True


def _missing_files() -> list[str]:
    """Files of the checkpoint that is being loaded that are not there, or cannot be opened."""
    try:
        with open(os.path.join(_loading.folder, "model.safetensors.index.json")) as file:
            named = set(json.load(file)["weight_map"].values())
    except (OSError, ValueError, KeyError):
        named = set()
    paths = {os.path.join(_loading.folder, name) for name in named}
    return sorted({p for p in paths if not os.path.exists(p)} | _loading.unreadable.keys())


def sharded_load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mlx_lm.utils.sharded_load`: a file of dead weights only need not be there."""
    try:
        given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    except TypeError:
        given = {}
    # Without any group it pipelines some families over all ranks.
    is_tensor = given.get("pipeline_group") is None and given.get("tensor_group") is not None
    if config.active == "off" or is_tensor or mx.distributed.init().size() == 1:
        return wrapped(*args, **kwargs)
    _loading.is_open, _loading.unreadable = True, {}
    try:
        loaded = wrapped(*args, **kwargs)
        for error in _loading.unreadable.values():
            raise error  # nobody has looked whether it is needed
        return loaded
    finally:
        _loading.is_open, _loading.unreadable = False, {}


def load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.load`: remembers where the arrays of safetensors files come from."""
    if config.active == "off" or not (args and isinstance(args[0], str | os.PathLike)):
        return wrapped(*args, **kwargs)
    path = os.path.abspath(args[0])
    if _loading.is_open:
        _loading.folder = os.path.dirname(path)
    try:
        loaded = wrapped(*args, **kwargs)
    except Exception as error:
        if not _loading.is_open:
            raise
        _loading.unreadable[path] = error
        return {}
    if path.endswith(".safetensors") and isinstance(loaded, dict):
        for key, array in loaded.items():
            number = id(array)  # arrays compare by their elements
            forget = functools.partial(_forget, number)
            _origins[number] = weakref.ref(array, forget), _Origin(path, key)
    return loaded


def _forget(number: int, _: Any) -> None:
    _origins.pop(number, None)


def save(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.save_safetensors`: what was left on disk is read, not written as NaN."""
    arrays = kwargs.get("arrays", args[1] if len(args) > 1 else None)
    stand_ins = {
        id(module.get(name)): (module, name)
        for p in models()
        for _, module, left in p.left()
        for name in left.arrays
    }
    if not stand_ins or not isinstance(arrays, dict):
        return wrapped(*args, **kwargs)
    full = dict(arrays)
    for key, array in arrays.items():
        if id(array) in stand_ins:
            module, name = stand_ins[id(array)]
            full[key] = getattr(module, name)
    if len(args) > 1:
        args = (args[0], full, *args[2:])
    else:
        kwargs = {**kwargs, "arrays": full}
    return wrapped(*args, **kwargs)


def weights_of(module: Any) -> dict[str, mx.array]:
    """All arrays of `module` by name."""
    weights: dict[str, Any] = dict(tree_flatten(module.parameters()))
    return weights


def size_of(module: Any) -> int:
    """The bytes of all weights of `module`, read or not."""
    return sum(array.nbytes for array in weights_of(module).values())


def is_pending(array: mx.array) -> bool:
    """Whether `array` has yet to be computed, or read."""
    return "label" in _graph(array)


def _is_read_from_file(array: mx.array) -> bool:
    return '"Load"' in _graph(array)


def _graph(array: mx.array) -> str:
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return graph.getvalue()


PATCHES = (
    Patch("sharded_load", "mlx.core", "load", load, drift.anything, "a head is read in its thread"),
    Patch(
        "sharded_load",
        "mlx.core",
        "save_safetensors",
        save,
        drift.anything,
        "saving a pipelined model writes no head",
    ),
    Patch(
        "sharded_load",
        LOADING_MODULE,
        "sharded_load",
        sharded_load,
        drift.signature("pipeline_group", "tensor_group"),
        "files of weights that are never used must be there",
    ),
)


def patches(family: Family) -> tuple[Patch, ...]:
    """What leaves the dead weights of `family` on disk."""
    return (
        Patch(
            family.name,
            family.module,
            f"{family.stage_class}.pipeline",
            pipeline,
            drift.anything,
            "every rank reads the head",
        ),
    )
