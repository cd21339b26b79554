"""What each rank downloads of a model on a hub, and a look at one without downloading it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import DOWNLOAD
from .models import Split
from .shared import Unusable

CHOICES = ("all", "needed")
"""Values of `config.DOWNLOAD`: the files that unpatched mlx-lm fetches (also if it is not set), or
those of them that the rank uses."""

Downloads = dict[str, dict[str, int]]
"""By choice, the bytes of each file of weights that a rank fetches."""


def of_rank(folder: Path, split: Split) -> Downloads:
    """What a rank fetches of the checkpoint in `folder`, which is split as the rank has it."""
    from ..weights import fetching, on_disk

    mine = on_disk.part(split.family, split.owner, split.stage)
    weight_map = fetching.weight_map(folder)
    every = mine._replace(unused=()).needed(weight_map.values(), weight_map)
    return {
        choice: {file: os.path.getsize(folder / file) for file in sorted(files)}
        for choice, files in zip(CHOICES, (every, mine.needed(every, weight_map)), strict=True)
    }


def summary(ranks: Sequence[Downloads]) -> str:
    """The sum over all ranks, in a sentence."""
    before, after = (sum(sum(r[choice].values()) for r in ranks) / 1e6 for choice in CHOICES)
    return (
        f"From a hub, {DOWNLOAD}=needed downloads {after:,.1f} MB of weights over all ranks, in "
        f"place of {before:,.1f} MB: {before - after:,.1f} MB less."
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
        # In the model's own folder only: a listing may name any path.
        snapshot_download(repo, local_dir=folder, allow_patterns="*.json", ignore_patterns="*/*")
        for sibling in api.model_info(repo, files_metadata=True).siblings or []:
            if not re.fullmatch(r"model[^/\\]*\.safetensors", sibling.rfilename):
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
