"""Patches of other packages: what is at, over or under what the plugin patches."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ...families import FAMILIES


def of_others(families: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """What is at, over or under our targets and is neither ours nor upstream's."""
    from ...handles import layers as layers_of
    from ...handles import written_in

    found = []
    for owner, attribute in dict.fromkeys(_targets(families)):
        layers = list(layers_of(inspect.getattr_static(owner, attribute, None)))
        origins = [written_in(layer) for layer in layers]
        packages = [origin.partition(".")[0] for origin in origins]
        ours = packages.index("mlx_lm_skiphead") if "mlx_lm_skiphead" in packages else None
        for depth, package in enumerate(packages):
            if layers[depth] is None or package in ("mlx", "mlx_lm", "mlx_lm_skiphead"):
                continue
            where = (
                "" if ours is None else "above the plugin" if depth < ours else "below the plugin"
            )
            found.append(
                {
                    "target": _name(owner, attribute),
                    "by": origins[depth],
                    "how": "wraps" if depth < len(layers) - 1 else "replaces",
                    "where": where,
                }
            )
    return found


def _targets(families: dict[str, dict[str, str]]) -> Iterator[tuple[Any, str]]:
    """All that the plugin patches, and the call of each `Model`, as an object and an attribute."""
    from ... import installing

    left_out = ("not pipelined", "not in this mlx-lm")
    for row in installing.table():
        if families.get(row.group, {}).get("state") not in left_out:
            with suppress(AttributeError, KeyError):
                yield row.locate()
    for family in FAMILIES:
        model = getattr(sys.modules.get(family.module), "Model", None)
        if families[family.name]["state"] not in left_out and inspect.isclass(model):
            yield model, "__call__"


def _name(owner: Any, attribute: str) -> str:
    if inspect.isclass(owner):
        return f"{owner.__module__}.{owner.__qualname__}.{attribute}"
    return f"{owner.__name__}.{attribute}"
