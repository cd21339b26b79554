"""A model that the command line was given: where it is, and whether a pipeline can run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from .. import families
from ..families import Family
from .shared import Unusable

HINT = "plan --fetch-headers looks at the hub"


def locate(path_or_repo: str) -> Path:
    """The folder of a model: a local one, or the cached copy of a hub repository.

    Raises:
        Unusable: if there is neither. Nothing is fetched.
    """
    folder = Path(path_or_repo).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            # Weights need not be there: mlx-lm fetches some files, and each rank some of these.
            copy = snapshot_download(path_or_repo, local_files_only=True, allow_patterns="*.json")
        except (OSError, ValueError) as error:  # it is not there, or no name of a repository
            line = f"there is no folder {path_or_repo}, and no copy of such a hub repository here"
            raise Unusable(f"{line} ({HINT})") from error
        folder = Path(copy)
    if not (folder / "config.json").is_file():
        raise Unusable(f"there is no model in {folder}: it has no config.json")
    return folder


def family_of(model: Any) -> Family:
    """The family of a loaded model.

    Raises:
        ValueError: if mlx-lm-skiphead does not support it.
    """
    if (family := families.family_of(model)) is None:
        raise ValueError(f"mlx-lm-skiphead does not support {type(model).__module__}")
    return family


class Split(NamedTuple):
    """A model as one rank has it, with lazy weights."""

    model: Any
    family: Family
    config: dict[str, Any]

    @property
    def owner(self) -> Any:
        return self.family.owner_of(self.model)

    @property
    def stage(self) -> Any:
        return self.family.stage_of(self.owner)


def split(folder: Path, rank: int, ranks: int, layers: list[int] | None = None) -> Split:
    """The model in `folder` as `rank` of a pipeline of `ranks` has it. Reads headers only.

    Args:
        folder: see `locate`.
        rank: from 0, which has the last layers.
        ranks: how many.
        layers: how many each rank has, rank 0 first; mlx-lm's even split if None.

    Raises:
        Unusable: if mlx-lm or this plugin cannot do it.
    """
    import mlx_lm.utils

    from .. import uninstall
    from ..weights.fetching import INDEX, weight_map
    from ..weights.splitting import group_of

    uninstall()  # so that this is mlx-lm's own split
    if not (folder / INDEX).is_file():
        raise Unusable(f"{folder / INDEX} is missing: mlx-lm needs it to split a model")
    files = {folder / name for name in weight_map(folder).values()}
    if missing := sorted(str(file) for file in files if not file.exists()):
        raise Unusable(f"files of the model are missing: {', '.join(missing)} ({HINT})")
    try:
        model, config = mlx_lm.utils.load_model(folder, lazy=True, strict=False)
        made = Split(model, family_of(model), config)
    except Exception as error:  # whatever is wrong with the files of a model
        raise Unusable(f"{folder}: {error}") from error
    if ranks > (count := len(made.stage.layers)):
        raise Unusable(f"{ranks} ranks need {ranks} layers, and this model has {count}")
    try:
        made.stage.pipeline(group_of(rank, ranks), *([] if layers is None else [layers]))
    except (AttributeError, TypeError, ValueError) as error:  # it has no `pipeline`, or no `split`
        raise Unusable(f"mlx-lm cannot split {made.family.name} so: {error}") from error
    return made
