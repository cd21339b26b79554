"""mlx-lm's `sharded_load`: it fetches and opens the files that a rank needs, and no other.

What is known of a checkpoint while it is loaded is in `loading`, for each thread.
"""

from __future__ import annotations

import functools
import os
import threading
from typing import Any

import mlx.core as mx

from ..families import LOADING_MODULE
from ..patching.drift import anything
from ..patching.handles import Patch
from ..patching.registry import MLX
from . import fetching


class _Loading(threading.local):
    """A call of mlx-lm's `sharded_load`, while it lasts."""

    is_open = False
    repo = ""
    folder = ""
    """Of the checkpoint; also after other ways to load one."""
    part: fetching.Part | None = None
    """What this rank has, once that is known."""
    model: Any = None
    """Of it, what `dead_weights` notes."""
    unreadable: dict[str, Exception] = {}  # noqa: RUF012
    """Files of weights that could not be opened, which is an error if they are needed."""


loading = _Loading()


def files_of(name: str) -> tuple[list[str], list[str]]:
    """The files of the checkpoint that is being loaded with a module's weights; those not there."""
    index = fetching.weight_map(loading.folder)
    part = loading.part
    found = {index[key] for key in fetching.keys_of(name, part.embedding, index)} if part else ()
    paths = sorted({os.path.join(loading.folder, p) for p in found or index.values()})
    unreadable = loading.unreadable.keys()
    is_missing = (loading.is_open and (p in unreadable or not os.path.exists(p)) for p in paths)
    return paths, [path for path, missing in zip(paths, is_missing, strict=True) if missing]


def sharded_load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mlx_lm.utils.sharded_load`: a file of dead weights only need not be there."""
    repo = str(args[0] if args else kwargs.get("repo", ""))
    vars(loading).update(is_open=True, repo=repo, unreadable={})
    try:
        loaded = wrapped(*args, **kwargs)
        for error in loading.unreadable.values():
            raise error  # there is no pipeline, which would have looked whether it is needed
        return loaded
    finally:
        vars(loading).clear()


def download(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mlx_lm.utils._download`: for a rank of a pipeline, the files that it needs.

    Only where `sharded_load` names the files, having split the model.
    """
    files = kwargs.get("allow_patterns")
    if loading.is_open and loading.part is not None and files:
        index = fetching.weight_map(loading.folder)
        kwargs = {**kwargs, "allow_patterns": sorted(loading.part.needed(files, index))}
    path = wrapped(*args, **kwargs)
    if loading.is_open:
        loading.folder = os.path.abspath(path)
    return path


def load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mx.load`: lazy arrays that any thread may evaluate.

    In mlx from 0.32 on an array belongs to the thread that made it, until it is evaluated.
    """
    if not (args and isinstance(args[0], str | os.PathLike)):
        return wrapped(*args, **kwargs)
    path = os.path.abspath(args[0])
    loading.folder = os.path.dirname(path)
    try:
        return wrapped(*args, **{**_any_thread(), **kwargs})
    except Exception as error:
        if not loading.is_open:
            raise
        loading.unreadable[path] = error
        return {}


@functools.cache
def _any_thread() -> dict[str, Any]:
    make = getattr(mx, "new_thread_unsafe_stream", None)
    return {"stream": make(mx.cpu)} if make else {}


PATCHES = (
    Patch(MLX, MLX, "load", load, anything, "a head is read in the thread that loaded it"),
    Patch(MLX, LOADING_MODULE, "sharded_load", sharded_load, anything, "all files must be there"),
    Patch(MLX, LOADING_MODULE, "_download", download, anything, "the head's files are fetched"),
)
