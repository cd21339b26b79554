"""What each rank downloads of a model on a hub, and a look at one without downloading it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.table import Table

from ..families import Family
from ..weights import fetching
from .arguments import Unusable
from .ranks import WAYS
from .tables import table

Downloads = dict[str, dict[str, int]]
"""By way, "unpatched" or "skip": the bytes of each file of weights that a rank fetches."""


def of_rank(folder: Path, model: Any, family: Family) -> Downloads:
    """What a rank fetches of the checkpoint in `folder`. `model` is split as the rank has it."""
    from ..weights.on_disk import part

    owner = family.owner_of(model)
    mine = part(family, owner, family.stage_of(owner))
    weight_map = fetching.weight_map(folder)
    unpatched = fetching.unpatched(mine.layers, weight_map)
    ways = {"unpatched": unpatched, "skip": mine.needed(unpatched, weight_map)}
    return {
        way: {file: os.path.getsize(folder / file) for file in sorted(files)}
        for way, files in ways.items()
    }


def total(ranks: Sequence[Downloads], way: str) -> int:
    """The bytes that all ranks fetch together."""
    return sum(sum(rank[way].values()) for rank in ranks)


def report(ranks: Sequence[Downloads]) -> Table:
    """The table of what each rank fetches."""
    rows = []
    for rank, files in enumerate(ranks):
        left = files["unpatched"].keys() - files["skip"].keys()
        sizes = (f"{sum(files[way].values()) / 1e6:,.1f}" for way in WAYS)
        rows.append([str(rank), *sizes, ", ".join(sorted(left)) or "-"])
    title = "MB of weights to download, on a machine that has none"
    return table(title, ("rank", "unpatched", "plugin", "not needed"), rows)


def summary(ranks: Sequence[Downloads]) -> str:
    """The sum over all ranks, in a sentence."""
    before, after = (total(ranks, way) / 1e6 for way in WAYS)
    return (
        f"To download from a hub, over all ranks: {after:,.1f} MB of weights with the plugin, "
        f"{before:,.1f} MB unpatched, {before - after:,.1f} MB less."
    )


def fetch_headers(repo: str, folder: Path) -> None:
    """Make a folder that `models.split` takes for the model `repo` of a hub.

    It has the configuration of the model, and for each file of weights a sparse file of the same
    size that has the header only.

    Raises:
        Unusable: if the hub cannot be reached, or has no such model.
    """
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi()
    try:
        snapshot_download(repo, local_dir=folder, allow_patterns=["*.json"])
        siblings = api.model_info(repo, files_metadata=True).siblings or []
        for sibling in siblings:
            if not fnmatch(sibling.rfilename, "model*.safetensors"):
                continue
            found = api.parse_safetensors_file_metadata(repo, sibling.rfilename)
            header: dict[str, Any] = {"__metadata__": found.metadata} if found.metadata else {}
            for name, t in found.tensors.items():
                header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": t.data_offsets}
            text = json.dumps(header, separators=(",", ":")).encode()
            with open(folder / sibling.rfilename, "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(sibling.size)
    except Exception as error:  # whatever a hub's client raises
        raise Unusable(f"{repo} cannot be looked at on the hub: {error}") from error
