"""What can be patched: the state of families and loops in this process, patches of other packages,
and a model of the user. Of the model it reads config.json only."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ... import config
from ...families import BY_NAME, FAMILIES, family_of
from ..arguments import Unusable, one_line
from ..models import find

NOT_THERE = ("not pipelined", "not in this mlx-lm")
"""States of a family in which there is nothing to patch."""


def examine(report: dict[str, Any], modules: Sequence[str]) -> None:
    """Patch as a program that imports the plugin last, look at it, and undo that.

    Fills in ``families``, ``loops``, ``unknown`` and ``patches``.

    Raises:
        Unusable: if one of `modules` cannot be imported.
    """
    from ... import installing

    before = config.active
    installing.uninstall()
    try:
        _import_first(modules)
        installing.install("hidden" if report["mode"] == "hidden" else "on")
        for group in (*installing.LOOPS, *installing.PARTS):
            importlib.import_module(installing.MODULES[group])
        missing = {f.name: found for f in FAMILIES if (found := _import_family(f.module))}
        status = installing.status()
        report["loops"] = {name: target._asdict() for name, target in status.loops.items()}
        report["families"] = {
            name: missing.get(name) or target._asdict() for name, target in status.families.items()
        }
        report["unknown"] = _unknown()
        report["patches"] = _patches_of_others(report["families"])
    finally:
        if before == "off":
            installing.uninstall()
        else:
            installing.install(before)


def _import_first(modules: Sequence[str]) -> None:
    if modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for python -m
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise Unusable(f"--import {name}: {one_line(error)}") from error


def _import_family(module: str) -> dict[str, str] | None:
    """State and reason if it cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return {"state": "not in this mlx-lm", "reason": ""}
        return {"state": "refused", "reason": f"it cannot be imported: {one_line(error)}"}
    return None


def _unknown() -> dict[str, str]:
    """Modules of mlx-lm that `sharded_load` would pipeline and the table lacks."""
    package = importlib.import_module("mlx_lm.models")
    sources = {}
    for _, name, _ in pkgutil.iter_modules(package.__path__):
        spec = importlib.util.find_spec(f"mlx_lm.models.{name}")
        if name not in BY_NAME and name != "pipeline" and spec and spec.origin:
            sources[name] = Path(spec.origin).read_bytes().decode(errors="replace")
    found: dict[str, str] = {}
    # To import all of them would take seconds. One that builds on an unknown one is unknown too.
    while True:
        mention = re.compile(rf"pipeline|\b({'|'.join([*BY_NAME, *found])})\b")
        candidates = [name for name, source in sources.items() if mention.search(source)]
        if not candidates:
            return dict(sorted(found.items()))
        for name in candidates:
            del sources[name]
            if _import_family(f"mlx_lm.models.{name}"):
                continue
            model = getattr(sys.modules[f"mlx_lm.models.{name}"], "Model", None)
            if inspect.isclass(model) and can_be_pipelined(model):
                found[name] = "works as upstream"
                if base := family_of(model.__new__(model)):
                    found[name] = f"treated as {base.name}, whose Model it builds on"


def can_be_pipelined(model: type) -> bool:
    """Whether `sharded_load` would find a ``model.model.pipeline`` in an instance.

    Judged by classes: `Model` has or assigns ``model``, and its module has a pipelined class, or
    imports a module of mlx-lm that has one.
    """
    from ...patching import drift

    initializers = (vars(cls).get("__init__") for cls in model.__mro__)
    if not hasattr(model, "model") and not any(
        drift.mentions(init, "model", ("STORE_ATTR",))
        for init in initializers
        if inspect.isfunction(init)
    ):
        return False
    own = [sys.modules[c.__module__] for c in model.__mro__ if c.__module__.startswith("mlx_lm.")]
    imported = [m for module in own for m in vars(module).values() if inspect.ismodule(m)]
    return any(drift.is_pipelined(m) for m in (*own, *imported) if m.__name__.startswith("mlx_lm."))


def _patches_of_others(families: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """What is at, over or under our targets and is neither ours nor upstream's."""
    from wrapt import wrapper_chain

    from ...patching.handles import written_in

    found = []
    for owner, attribute in dict.fromkeys(_targets(families)):
        layers = list(wrapper_chain(inspect.getattr_static(owner, attribute, None)))
        origins = [written_in(layer) for layer in layers]
        packages = [origin.partition(".")[0] for origin in origins]
        where = "above the plugin" if "mlx_lm_skiphead" in packages else ""
        name = f"{owner.__module__}.{owner.__qualname__}" if inspect.isclass(owner) else None
        for depth, package in enumerate(packages):
            if package == "mlx_lm_skiphead":
                where = "below the plugin"
            elif package not in ("mlx", "mlx_lm"):
                found.append(
                    {
                        "target": f"{name or owner.__name__}.{attribute}",
                        "by": origins[depth],
                        "how": "wraps" if depth < len(layers) - 1 else "replaces",
                        "where": where,
                    }
                )
    return found


def _targets(families: dict[str, dict[str, str]]) -> Iterator[tuple[Any, str]]:
    """All that the plugin patches, and the call of each `Model`, as an object and an attribute."""
    from ... import installing

    for row in installing.table():
        if families.get(row.group, {}).get("state") not in NOT_THERE:
            with suppress(AttributeError, KeyError):
                yield row.locate()
    for family in FAMILIES:
        model = getattr(sys.modules.get(family.module), "Model", None)
        if families[family.name]["state"] not in NOT_THERE and inspect.isclass(model):
            yield model, "__call__"


def examine_model(name: str, report: dict[str, Any], unusable: Sequence[str]) -> dict[str, Any]:
    """``model`` in `examination.examine`. `unusable` are packages that cannot be imported."""
    found: dict[str, Any] = {
        "name": name,
        "model_type": "",
        "family": "",
        "head": "unknown",
        "supported": False,
        "reason": "",
    }
    folder = find(name)
    if folder is None:
        return found | {"reason": "no such folder, and not in the hub's cache on this machine"}
    try:
        written = json.loads((folder / "config.json").read_bytes())
        found["model_type"] = written["model_type"]
    except FileNotFoundError:
        return found | {"reason": "it has no config.json"}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return found | {"reason": f"its config.json cannot be used: {one_line(error)}"}
    text = written.get("text_config")
    tied = {**written, **(text if isinstance(text, dict) else {})}.get("tie_word_embeddings")
    if tied is not None:
        found["head"] = "tied" if tied else "own"
    if written.get("model_file"):
        return found | {"reason": "not covered: it brings a model_file of its own"}
    if unusable:
        return found | {"reason": f"{', '.join(unusable)} cannot be used"}
    family, reason = _family_of(written, report)
    return found | {"family": family, "supported": not reason, "reason": reason}


def _family_of(written: dict[str, Any], report: dict[str, Any]) -> tuple[str, str]:
    """The family of a config, or ""; and the reason why it is not supported, or ""."""
    from mlx_lm.utils import _get_classes

    try:
        model, arguments = _get_classes(config=written)
    except Exception as error:
        return "", f"mlx-lm does not load it: {one_line(error)}"
    # solar_open's Model is another family's, its ModelArgs are its own.
    for cls in (arguments, model):
        name = cls.__module__.rpartition(".")[2]
        if name in BY_NAME and getattr(sys.modules[cls.__module__], "Model", None) is model:
            state, reason = report["families"][name].values()
            return name, "" if state == "patched" else f"{name} is {state}: {reason}".strip(": ")
    if can_be_pipelined(model):
        return "", "mlx-lm pipelines it, but the plugin does not know it: it works as upstream"
    return "", "mlx-lm cannot pipeline it"
