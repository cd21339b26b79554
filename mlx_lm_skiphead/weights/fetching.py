"""Files of weights that a rank need not fetch, and the modules that stand for missing ones.

mlx-lm's `sharded_load` lets each rank fetch the files of its layers and every file with a weight
outside the layers. Of these a rank needs none that has only what it never uses in mlx-lm's loops.
With ``MLX_LM_SKIPHEAD_DOWNLOAD=needed`` it does not fetch them. Where this cannot tell what a
weight is, its file is fetched.

An example: three ranks and four files, with the embedding in the first, norm and head in the last,
and layers in all. Rank 0 fetches files 3 and 4 (unpatched also 1, which it needs only if head and
embedding are tied), rank 1 fetches 2 and 3 (unpatched all), rank 2 fetches 1 and 2 (unpatched also
4). In mode "hidden" workers use the norm, and so fetch file 4 too.

A module whose file is not there, since it was not fetched or lacks in a folder of this machine, is
`Absent`. Nothing is fetched behind the user's back, and no number is made up.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Collection, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.nn.layers.base import Module

from .. import config
from ..families import LOADING_MODULE
from ..patching.drift import anything
from ..patching.handles import Patch
from ..patching.registry import SkipheadError, this_thread
from ..ranks import agreement

NORM = "norm"
INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")  # as in sharded_load


class Part(NamedTuple):
    """The part of a model that one rank uses in mlx-lm's loops."""

    layers: range
    embedding: str
    """The pipelined model's name for it."""
    unused: tuple[str, ...]
    """The modules outside the layers that this rank never uses: of the pipelined model, or
    ``lm_head``."""

    def needed(self, files: Iterable[str], weight_map: dict[str, str]) -> set[str]:
        """The files among `files` with a weight that this rank uses, or with an unknown one."""
        unused = {key for name in self.unused for key in keys_of(name, self.embedding, weight_map)}
        layers = {key: int(m[1]) for key in weight_map if (m := _LAYER.search(key))}
        unused |= {key for key, layer in layers.items() if layer not in self.layers}
        used = {file for key, file in weight_map.items() if key not in unused}
        return {file for file in files if file in used or file not in weight_map.values()}


def weight_map(folder: str | Path) -> dict[str, str]:
    """By key of a weight, its file; empty where there is no index that can be read."""
    try:
        return dict(json.loads(Path(folder, INDEX).read_text())["weight_map"])
    except (OSError, ValueError, KeyError):
        return {}


def keys_of(name: str, embedding: str, keys: Collection[str]) -> set[str]:
    """The keys of a module of the pipelined model, or of ``lm_head``, by their exact path.

    The pipelined model is where the embedding stands beside the layers. If that cannot be told,
    no key is.
    """
    stages = {key[: m.start(1) - len("layers.")] for key in keys if (m := _LAYER.search(key))}
    modules = {key: key.rpartition(".")[0] for key in keys}
    stages &= {m.removesuffix(embedding) for m in modules.values() if m.endswith(embedding)}
    if len(stages) != 1:
        return set()
    (stage,) = stages
    # The head may be in the pipelined model, or in what that is in.
    above = ["", *accumulate(f"{part}." for part in stage.split(".")[:-1])]
    paths = {place + name for place in (above if name == "lm_head" else [stage])}
    return {key for key, module in modules.items() if module in paths}


class Absent(Module):
    """A module whose file is not on this machine: it has no weights.

    To read its weights, to save, quantize or cast it, and to call it is an error that says which
    file is missing. In a loop that skips the head it is called for nothing, and gives NaN. The
    embedding gives NaN everywhere: on a rank that lacks it only the shape and type are used, in
    which hidden states are received.

    Args:
        name: its name in the model.
        missing: the error.
        module: what it stands for.
    """

    missing = ""  # while it is being copied

    def __init__(self, name: str, missing: str, module: Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        rows = module.weight.shape[0]
        width = rows if name in ("lm_head", NORM) else module(mx.array([0])).shape[-1]
        self.name, self.missing, self.rows, self.width = name, missing, rows, width
        self.embeds_in(mx.float32)

    def embeds_in(self, dtype: mx.Dtype) -> None:
        """Give hidden states of that type."""
        # What reads weights through the model asks of each name whether it begins with "_".
        self[_Name(self.missing)] = mx.zeros((0,), dtype)

    def __call__(self, x: mx.array) -> mx.array:
        if mx.issubdtype(x.dtype, mx.integer):
            (like,) = self.values()
            return mx.full((*x.shape, self.width), float("nan"), like.dtype)
        return self._unused(x, self.width)

    def as_linear(self, x: mx.array) -> mx.array:
        """An embedding as the head."""
        return self._unused(x, self.rows)

    def _unused(self, x: mx.array, width: int) -> mx.array:
        if this_thread.run is None and this_thread.forward is None:
            raise SkipheadError(self.missing)
        return mx.full((*x.shape[:-1], width), float("nan"), x.dtype)

    def __getattr__(self, attribute: str) -> Any:
        if attribute in ("weight", "scales", "biases", "bias", "to_quantized"):
            raise SkipheadError(self.missing)
        raise AttributeError(f"{attribute}: {self.missing}")


class _Name(str):
    """A name in the place of a weight's: whoever looks at it in order to read the weight fails."""

    def startswith(self, *args: Any) -> bool:
        if loading.is_open:  # mlx-lm evaluates the whole model there
            return True
        raise SkipheadError(str(self))


class _Loading(threading.local):
    """A call of mlx-lm's `sharded_load`, while it lasts."""

    is_open = False
    repo = ""
    folder = ""
    """The checkpoint's."""
    part: Part | None = None
    """What this rank uses, once that is known."""
    has_files = False
    """Whether the files of weights have been fetched; a model without any is made before."""
    model: Any = None
    """The model, as on_disk.py notes it."""
    is_split = False
    """Whether splitting.py has split it."""


loading = _Loading()


def absent(name: str, module: Module) -> Absent | None:
    """The stand-in for a module of the checkpoint that is being loaded; None if its files exist."""
    if loading.part is None or not loading.has_files:
        return None
    index = weight_map(loading.folder)
    files = {index[key] for key in keys_of(name, loading.part.embedding, index)}
    lacks = sorted(f for f in files if not os.path.exists(os.path.join(loading.folder, f)))
    if not lacks:
        return None
    hint = f"{loading.folder} lacks that file"
    if not os.path.exists(loading.repo):
        is_modelscope = os.environ.get("MLXLM_USE_MODELSCOPE", "").lower() == "true"
        client = "modelscope download --model" if is_modelscope else "hf download"
        hint = (
            f"{config.DOWNLOAD}=needed has not fetched that file. `{client} {loading.repo} "
            f"{' '.join(lacks)}` brings it; then load the model again"
        )
    missing = f"{name} is not on this machine: its weights are in {', '.join(lacks)}, and {hint}."
    return Absent(name, missing, module)


def on_sharded_load(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mlx_lm.utils.sharded_load`: `loading` describes the call while it lasts.

    Where it fails, the other ranks are told.
    """
    given = {**dict(zip(("repo", "pipeline_group"), args, strict=False)), **kwargs}
    vars(loading).update(is_open=True, repo=str(given.get("repo", "")), is_split=False)
    try:
        return wrapped(*args, **kwargs)
    except Exception as error:
        agreement.take_part(error, loading.repo, given.get("pipeline_group"))
        raise
    finally:
        vars(loading).clear()


def on_download(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """The wrapper of `mlx_lm.utils._download`: for a rank of a pipeline, the files that it needs.

    Only where `sharded_load` names the files, having split the model.
    """
    files = kwargs.get("allow_patterns")
    if loading.is_open and loading.part is not None and files and not config.download_all:
        index = weight_map(loading.folder)
        kwargs = {**kwargs, "allow_patterns": sorted(loading.part.needed(files, index))}
    path = wrapped(*args, **kwargs)
    if loading.is_open:
        loading.folder, loading.has_files = os.path.abspath(path), loading.part is not None
    return path


DOWNLOADS = "downloads"
_LOST = "all files are fetched, and one that is missing is not told of"
PATCHES = (
    Patch(DOWNLOADS, LOADING_MODULE, "sharded_load", on_sharded_load, anything, _LOST),
    Patch(DOWNLOADS, LOADING_MODULE, "_download", on_download, anything, _LOST),
)
