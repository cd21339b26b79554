"""Weights that a rank does not use stay on disk.

mlx-lm loads lazily: a weight is read when something evaluates it, and what evaluates them all is
``mx.eval(model.parameters())``. So when a pipeline is set up, a worker's head and the embedding of
a rank that embeds nothing leave the module tree, and a `StandIn` takes their place. They are still
there as attributes, with shapes and types, and are read if something really calls them.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import wrapt
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten

from . import config, patching
from .families import Family
from .sharing import this_thread

log = logging.getLogger("mlx_lm_skiphead")


class _Origin(NamedTuple):
    """Where a lazy array comes from."""

    file: str
    key: str


class _Loading:
    """A call of mlx-lm's `sharded_load` for a pipeline, while it lasts."""

    def __init__(self) -> None:
        self.folder = ""
        """Where the weights are."""
        self.unreadable: dict[str, Exception] = {}
        """Files of weights that could not be opened, which is an error if they are needed."""

    def lost_files(self) -> list[str]:
        """Files of the checkpoint that are not there, or cannot be opened."""
        try:
            with open(os.path.join(self.folder, "model.safetensors.index.json")) as file:
                named = set(json.load(file)["weight_map"].values())
        except (OSError, ValueError, KeyError):
            named = set()
        paths = {os.path.join(self.folder, name) for name in named}
        return sorted({p for p in paths if not os.path.exists(p)} | self.unreadable.keys())


class StandIn(wrapt.CallableObjectProxy):  # type: ignore[type-arg]
    """In the place of a head, outside the module tree; a call of it reads its weights, once.

    Everything else of it is the head's, unread. Once read, the head itself is back in its place.

    Args:
        module: the head or embedding.
        parent: what it was taken out of, under the name `name`.
        family: whose module it is.
        rank: this process's.
        lost: files that should hold its weights and are not there or cannot be opened.
    """

    _self_reason = (
        "the model was called outside mlx-lm's loops, or in one that was imported by name before "
        "mlx_lm_skiphead. It stays on disk if the plugin is imported first, and in a loop of your "
        "own with mlx_lm_skiphead.rank_zero_head()."
    )

    def __init__(
        self,
        module: Module,
        parent: Module,
        name: str,
        family: str,
        rank: int,
        lost: list[str],
    ) -> None:
        super().__init__(module)
        self._self_parent = weakref.ref(parent)
        self._self_name = name
        self._self_where = f"{name} of {family} on rank {rank}"
        self._self_lost = lost
        self._self_unread = True
        self._self_lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._self_read()(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Module:
        module: Module = copy.deepcopy(self.__wrapped__, memo)
        return module

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__reduce_ex__(protocol)

    def _self_bytes(self) -> int:
        """How much of it is still on disk."""
        arrays = _weights(self.__wrapped__).values()
        return sum(a.nbytes for a in arrays if is_pending(a)) if self._self_unread else 0

    def _self_read(self) -> Module:
        """The module with its weights in memory, from now on in its place.

        Raises:
            RuntimeError: if they cannot be read; the message names the file.
        """
        with self._self_lock:
            module: Module = self.__wrapped__
            if not self._self_unread:
                return module
            size = self._self_bytes()
            files = self._self_lost or sorted({o.file for o in _origins_of(module).values()})
            try:
                if self._self_lost:
                    raise FileNotFoundError("it is not there or cannot be opened")
                _read(module)
            except Exception as error:
                raise RuntimeError(
                    f"{self._self_where} was left on disk and cannot be read from "
                    f"{', '.join(files) or 'where it was loaded from'} ({error}). It is needed "
                    f"now: {self._self_reason}"
                ) from error
            self._self_unread = False
            parent = self._self_parent()
            if parent is not None and vars(parent).get(self._self_name) is self:
                delattr(parent, self._self_name)
                parent[self._self_name] = module
            log.warning(
                "%s has been read from disk, %.1f MB: %s",
                *(self._self_where, size / 1e6, self._self_reason),
            )
            return module


class EmbeddingStandIn(StandIn):
    """In the place of an embedding, which may be a tied head too.

    Upstream embeds the tokens on every rank, and takes no more than shape and type from that on
    ranks that receive. So nothing is read for it within a forward pass.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.__wrapped__ if this_thread.embeds_for_shape else self._self_read()
        return module(*args, **kwargs)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits ``(..., V)`` of hidden states ``(..., H)``: as a head, its weights are read."""
        logits: mx.array = self._self_read().as_linear(x)
        return logits


class _Pipelined(NamedTuple):
    """A model whose pipeline was set up while the plugin was on."""

    owner: weakref.ref[Any]
    family: Family
    rank: int
    ranks: int
    stand_ins: list[weakref.ref[StandIn]]


_pipelined: list[_Pipelined] = []
_lock = threading.Lock()


def pipeline(wrapped: Callable[..., Any], stage: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of ``pipeline(group)``: upstream's, then this rank's dead weights leave the tree.

    Only what is not in memory yet: the weights of a model that was loaded eagerly stay.
    """
    result = wrapped(*args, **kwargs)
    if config.active == "off" or stage.pipeline_size == 1:
        return result
    with _lock:
        found = patching.owner_of(stage)
        if found is None:
            return result
        family, owner = found
        rank, ranks = stage.pipeline_rank, stage.pipeline_size
        taken = [
            weakref.ref(stand_in)
            for parent, name in dead(family, owner, stage)
            if (stand_in := _take_out(parent, name, family, rank)) is not None
        ]
        loading = this_thread.loading
        if loading is not None and loading.unreadable:
            _check_nothing_is_missed(owner, loading)
            loading.unreadable = {}
        # A model may be split anew.
        taken += [s for p in _pipelined if p.owner() is owner for s in p.stand_ins]
        _pipelined[:] = [p for p in _pipelined if p.owner() is not None and p.owner() is not owner]
        _pipelined.append(_Pipelined(weakref.ref(owner), family, rank, ranks, taken))
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


def _take_out(parent: Any, name: str, family: Family, rank: int) -> StandIn | None:
    module = parent.get(name)  # in the tree, so not a stand-in
    arrays = [] if module is None else list(_weights(module).values())
    lost: list[str] = []
    if not arrays or not all(map(is_pending, arrays)):
        return None
    if not any(map(_is_read_from_file, arrays)):
        # Made anew, for want of a file, or because this model has random weights.
        lost = this_thread.loading.lost_files() if this_thread.loading is not None else []
        if not lost:
            return None
    kind = EmbeddingStandIn if hasattr(module, "as_linear") else StandIn
    stand_in = kind(module, parent, name, family.name, rank, lost)
    del parent[name]
    object.__setattr__(parent, name, stand_in)  # so that Module keeps it out of the tree
    return stand_in


def _check_nothing_is_missed(owner: Any, loading: _Loading) -> None:
    """Raise what upstream would have, if a file that could not be opened is needed here."""
    for array in _weights(owner).values():
        if is_pending(array) and not _is_read_from_file(array):
            raise next(iter(loading.unreadable.values()))


def forward_pass(wrapped: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call `wrapped`, in which what an embedding that stays on disk gives is never evaluated."""
    if this_thread.embeds_for_shape:
        return wrapped(*args, **kwargs)
    this_thread.embeds_for_shape = True
    try:
        return wrapped(*args, **kwargs)
    finally:
        this_thread.embeds_for_shape = False


def sharded_load(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mlx_lm.utils.sharded_load`: a file of dead weights only need not be there."""
    try:
        given = inspect.signature(wrapped).bind(*args, **kwargs).arguments
    except TypeError:
        given = {}
    group = given.get("pipeline_group")
    if group is None or group.size() == 1 or config.active == "off":
        return wrapped(*args, **kwargs)
    before, this_thread.loading = this_thread.loading, _Loading()
    try:
        loaded = wrapped(*args, **kwargs)
        for error in this_thread.loading.unreadable.values():
            raise error  # nobody has looked whether it is needed
        return loaded
    finally:
        this_thread.loading = before


def load(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.load`: remembers where the arrays of safetensors files come from."""
    file = os.path.abspath(args[0]) if args and isinstance(args[0], str | os.PathLike) else ""
    loading = this_thread.loading
    if loading is not None:
        loading.folder = os.path.dirname(file)
    try:
        loaded = wrapped(*args, **kwargs)
    except Exception as error:
        if loading is None:
            raise
        loading.unreadable[file] = error
        return {}
    if file.endswith(".safetensors") and isinstance(loaded, dict):
        for key, array in loaded.items():
            _remember(array, _Origin(file, key))
    return loaded


_origins: dict[int, tuple[weakref.ref[mx.array], _Origin]] = {}


def _remember(array: mx.array, origin: _Origin) -> None:
    number = id(array)  # arrays compare by their elements
    _origins[number] = weakref.ref(array, lambda _: _origins.pop(number, None)), origin


def size_of(module: Any) -> int:
    """The bytes of all weights of `module`, read or not."""
    return sum(array.nbytes for array in _weights(module).values())


def _weights(module: Any) -> dict[str, mx.array]:
    """All arrays of `module` by name."""
    weights: dict[str, Any] = dict(tree_flatten(module.parameters()))
    return weights


def _origins_of(module: Module) -> dict[str, _Origin]:
    """By name of a weight of `module`, for those that come from a file as they are."""
    return {
        name: _origins[id(array)][1]
        for name, array in _weights(module).items()
        if id(array) in _origins
    }


def _read(module: Module) -> None:
    """Bring the weights of `module` into memory.

    From the file anew where that is known: a lazy array can be evaluated only in the thread that
    made it, and after an attempt that failed it holds whatever was in memory.
    """
    origins = _origins_of(module)
    files: dict[str, Any] = {file: mx.load(file) for file in {o.file for o in origins.values()}}
    weights = []
    for name, (file, key) in origins.items():
        array, expected = files[file][key], module[name]
        if (array.shape, array.dtype) != (expected.shape, expected.dtype):
            raise ValueError(f"{key} was {expected.dtype} {expected.shape} when it was loaded")
        weights.append((name, array))
    mx.eval([array for _, array in weights])
    module.load_weights(weights, strict=False)
    mx.eval(_weights(module))


def is_pending(array: mx.array) -> bool:
    """Whether `array` has yet to be computed, or read."""
    return "label" in _graph(array)


def _is_read_from_file(array: mx.array) -> bool:
    return '"Load"' in _graph(array)


def _graph(array: mx.array) -> str:
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return graph.getvalue()


def models() -> tuple[patching.ModelStatus, ...]:
    """Of each model that is alive, what is on disk now (`status`)."""
    return tuple(
        patching.ModelStatus(
            p.family.name,
            p.rank,
            p.ranks,
            {
                stand_in._self_name: size
                for reference in p.stand_ins
                if (stand_in := reference()) is not None and (size := stand_in._self_bytes())
            },
        )
        for p in _pipelined
        if p.owner() is not None
    )
