"""The switch: the environment variable ``MLX_LM_SKIPHEAD``, read here and nowhere else.

Imports nothing, so that a plugin that is off costs nothing.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as typing's, without importing typing
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Literal

    Mode = Literal["off", "on", "hidden"]

VARIABLE = "MLX_LM_SKIPHEAD"
WATCH = "MLX_LM_SKIPHEAD_WATCH"
DEADLINE = "MLX_LM_SKIPHEAD_DEADLINE"
DOWNLOAD = "MLX_LM_SKIPHEAD_DOWNLOAD"
SPLIT = "MLX_LM_SKIPHEAD_SPLIT"

_ACCEPTED: dict[Mode, tuple[str, ...]] = {
    "off": ("", "0", "off", "false", "no"),
    "on": ("1", "on", "true", "yes"),
    "hidden": ("hidden",),
}
SPELLINGS = {spelling: mode for mode, spellings in _ACCEPTED.items() for spelling in spellings}


def requested_mode(environ: Mapping[str, str] = os.environ) -> Mode:
    """What the environment asks for: ``"off"`` (also when unset), ``"on"`` or ``"hidden"``.

    Raises:
        ValueError: for a value that is not in ``SPELLINGS``; the message lists those.
    """
    value = environ.get(VARIABLE, "")
    if value not in SPELLINGS:
        accepted = ", ".join(f"{' '.join(map(repr, s))} ({mode})" for mode, s in _ACCEPTED.items())
        raise ValueError(
            f"{VARIABLE}={value!r} is not understood. Accepted values: {accepted}. "
            "Unset it to switch mlx-lm-skiphead off."
        )
    return SPELLINGS[value]


def watch_seconds(environ: Mapping[str, str] = os.environ) -> float:
    """After how long a step that has not gone on is told of, in seconds; 0 for never.

    Raises:
        ValueError: where the variable is no such number.
    """
    return _seconds(WATCH, "30", environ)


def deadline_seconds(environ: Mapping[str, str] = os.environ) -> float:
    """After how long a step that has not gone on ends this process, in seconds; 0 for never.

    Raises:
        ValueError: where the variable is no such number.
    """
    return _seconds(DEADLINE, "0", environ)


def _seconds(variable: str, default: str, environ: Mapping[str, str]) -> float:
    value = environ.get(variable) or default
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{variable}={value!r} is not understood. Give seconds, or 0 for never.")
    return seconds


def fetches_all(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a rank fetches the files of weights that it never uses, as unpatched.

    Raises:
        ValueError: where the variable is neither ``all`` nor ``needed``.
    """
    value = environ.get(DOWNLOAD) or "all"
    if value not in ("all", "needed"):
        raise ValueError(
            f"{DOWNLOAD}={value!r} is not understood. Give all (or unset it) or needed."
        )
    return value == "all"


def layers_by_rank(environ: Mapping[str, str] = os.environ) -> list[int] | None:
    """How many layers each rank is to have, rank 0 first; None for mlx-lm's even split.

    Raises:
        ValueError: where the variable is no list of whole numbers. Whether they fit a model and its
            ranks is for mlx-lm to say.
    """
    value = environ.get(SPLIT)
    try:
        return [int(part) for part in value.split(",")] if value else None
    except ValueError:
        raise ValueError(
            f"{SPLIT}={value!r} is not understood. Give the layers of each rank, rank 0 first, as "
            "in 20,12; or unset it."
        ) from None


active: Mode = "off"
"""What is installed in this process now."""
watch = 0.0
"""After how many seconds a step is told of; 0 for never."""
deadline = 0.0
"""After how many seconds a step ends this process; 0 for never."""
download_all = True
"""Whether files of weights that this rank never uses are fetched too."""
split: list[int] | None = None
"""How many layers each rank is to have, rank 0 first; None for mlx-lm's even split."""
