"""Packages: the versions that are installed and needed, and the known faults of mlx."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from ..arguments import one_line

FAST_SYNCH = "MLX_METAL_FAST_SYNCH"


def examine() -> dict[str, dict[str, Any]]:
    """``packages`` in `examination.examine`."""
    found = {}
    for name, needs in _requirements().items():
        version, problem = None, ""
        try:
            version = metadata.version(name)
            if not satisfies(version, needs):
                problem = f"{needs} is needed"
            importlib.import_module("mlx.core" if name == "mlx" else name.replace("-", "_"))
        except metadata.PackageNotFoundError:
            problem = "not installed"
        except Exception as error:
            problem = f"cannot be imported: {one_line(error)}"
            if name == "mlx" and sys.platform == "linux":
                problem += " (on Linux it needs one of the extras cpu, cuda12 and cuda13)"
        found[name] = {"version": version, "needs": needs, "problem": problem}
    return found


def is_unusable(package: dict[str, Any]) -> bool:
    problem: str = package["problem"]
    return problem.startswith(("not installed", "cannot be imported"))


def _requirements() -> dict[str, str]:
    """By name of a package, the versions that the plugin needs: ``">=2.4,<3"``."""
    lines = metadata.requires("mlx-lm-skiphead") or []
    needed = [Requirement(line) for line in sorted(lines) if "extra ==" not in line]
    return {one.name: ",".join(sorted(map(str, one.specifier), reverse=True)) for one in needed}


def satisfies(version: str, needs: str) -> bool:
    """Whether a version, pre-releases included, is one of those needed."""
    try:
        return SpecifierSet(needs).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def known_faults(mlx: str) -> Iterator[tuple[str, bool]]:
    """A line for each known fault of a version of mlx, and whether it rules out this setting."""
    if satisfies(mlx, ">=0.32.1,<0.32.3"):
        line = "over JACCL's ring all_gather gives wrong data (mlx #4443)"
        yield f"mlx {mlx}: {line}. Install 0.32.3 or newer.", _is_on("MLX_JACCL_RING")
    elif not satisfies(mlx, ">=0.32.3"):
        line = "its ring may not notice that a rank is lost (mlx #4060)"
        yield f"mlx {mlx}: {line}. Version 0.32.3 or newer is recommended.", False


def has_fast_synch() -> bool:
    """Whether the setting of MLX with which ranks are known to stand still is on."""
    return _is_on(FAST_SYNCH)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "0").strip() not in ("", "0")
