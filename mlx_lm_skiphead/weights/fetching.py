"""Which files of a checkpoint a rank needs, by its index; and fetching one that it needs after all.

mlx-lm's `sharded_load` lets each rank fetch the files of its layers and every file with a weight
outside the layers. Of these a rank needs none that has only what it never uses. Where this cannot
tell what a weight is, its file is fetched.

An example: three ranks and four files, with the embedding in the first, norm and head in the last,
and layers in all. Rank 0 fetches files 3 and 4 (unpatched also 1, which it needs only if head and
embedding are tied), rank 1 fetches 2 and 3 (unpatched all), rank 2 fetches 1 and 2 (unpatched also
4). In mode "hidden" workers use the norm, and so fetch file 4 too.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from ..families import LOADING_MODULE

INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")  # as in sharded_load


class Part(NamedTuple):
    """What one rank has of a model."""

    layers: range
    embedding: str
    """What the pipelined model calls it."""
    unused: tuple[str, ...]
    """The modules outside the layers that this rank never uses: of the pipelined model, or
    ``lm_head``."""

    def needed(self, files: Iterable[str], weight_map: dict[str, str]) -> set[str]:
        """Those of `files` that have what this rank uses, or what is not known."""
        unused = {key for name in self.unused for key in keys_of(name, self.embedding, weight_map)}
        used = {
            file
            for key, file in weight_map.items()
            if (
                int(layer[1]) in self.layers if (layer := _LAYER.search(key)) else key not in unused
            )
        }
        return {file for file in files if file in used or file not in weight_map.values()}


def weight_map(folder: str | Path) -> dict[str, str]:
    """By key of a weight, its file; empty where there is no index that can be read."""
    try:
        with open(os.path.join(folder, INDEX)) as file:
            found: dict[str, str] = json.load(file)["weight_map"]
            return found
    except (OSError, ValueError, KeyError):
        return {}


def keys_of(name: str, embedding: str, keys: Collection[str]) -> set[str]:
    """The keys of a module of the pipelined model, or of ``lm_head``, by their exact path.

    The pipelined model is where the embedding stands beside the layers. If that cannot be told,
    no key is.
    """
    stages = {key[: m.start(1) - len("layers.")] for key in keys if (m := _LAYER.search(key))}
    modules = {key: key.rpartition(".")[0] for key in keys}
    ends = (module for module in modules.values() if module.endswith(embedding))
    stages &= {module.removesuffix(embedding) for module in ends}
    if len(stages) != 1:
        return set()
    (stage,) = stages
    parts = stage.split(".")[:-1]  # the head may be in the pipelined model, or in what that is in
    above = {"".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1)}
    paths = {place + name for place in (above if name == "lm_head" else {stage})}
    return {key for key, module in modules.items() if module in paths}


def unpatched(layers: range, weight_map: dict[str, str]) -> set[str]:
    """The files that mlx-lm's `sharded_load` asks for on a rank with `layers`."""
    return {
        file
        for key, file in weight_map.items()
        if (layer := _LAYER.search(key)) is None or int(layer[1]) in layers
    }


def fetch(repo: str, paths: list[str]) -> None:
    """Bring files of a checkpoint that are not in its folder, with mlx-lm's own download.

    Raises:
        FileNotFoundError: if they are not there then; the message has the command that brings them.
    """
    if all(map(os.path.exists, paths)):
        return
    folder, names = Path(paths[0]).parent, [Path(path).name for path in paths]
    # The hub's cache has a folder for each commit, and a newer one may have other weights.
    commit = folder.name if folder.parent.name == "snapshots" else None
    error, upstream = None, sys.modules[LOADING_MODULE]
    try:
        upstream._download(repo, commit, names)
    except Exception as why:  # whatever a hub's client raises
        error = why
    if not all(map(os.path.exists, paths)):
        hint = "it is not there or cannot be opened"
        if not os.path.exists(repo):
            revision = f"--revision {commit} " if commit else ""
            is_modelscope = upstream.snapshot_download.__module__.startswith("modelscope")
            command = "modelscope download --model" if is_modelscope else "hf download"
            hint = f"it is not there; `{command} {repo} {revision}{' '.join(names)}` brings it"
        raise FileNotFoundError(hint) from error
