"""Families and loops: what becomes of each of them here, in this process."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ... import config
from ...families import BY_NAME, FAMILIES
from . import patches
from .report import Report, WrongArgument, line


def examine(report: Report, modules: Sequence[str]) -> None:
    """Patch as a program that imports the plugin last, look at it, and undo that."""
    from ... import installing, registry

    before = config.active
    installing.uninstall()
    try:
        _import_first(modules)
        installing.install("hidden" if report["mode"] == "hidden" else "on")
        for group in (*installing.LOOPS, registry.MLX):
            importlib.import_module(installing.MODULES[group])
        missing = {f.name: found for f in FAMILIES if (found := _import_family(f.module))}
        status = installing.status()
        for name, target in status.families.items():
            state, reason = missing.get(name, target)
            report["families"][name] = {"state": state, "reason": reason}
        for name, (state, reason) in status.loops.items():
            report["loops"][name] = {"state": state, "reason": reason}
        report["unknown"] = _unknown()
        report["patches"] = patches.of_others(report["families"])
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
            raise WrongArgument(f"--import {name}: {line(error)}") from error


def _import_family(module: str) -> tuple[str, str] | None:
    """State and reason if it cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return "not in this mlx-lm", ""
        return "refused", f"it cannot be imported: {line(error)}"
    return None


def _unknown() -> dict[str, str]:
    """Modules of mlx-lm that `sharded_load` would pipeline and the table lacks."""
    from ... import registry

    package = importlib.import_module("mlx_lm.models")
    sources = {}
    for _, name, _ in pkgutil.iter_modules(package.__path__):
        spec = importlib.util.find_spec(f"mlx_lm.models.{name}")
        if name not in BY_NAME and name != "pipeline" and spec and spec.origin:
            sources[name] = Path(spec.origin).read_bytes().decode(errors="replace")
    found: dict[str, str] = {}
    # Importing all of them would take seconds. One that builds on an unknown one is unknown too.
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
                for base, outcome in registry.outcomes.items():
                    if outcome.model is not None and issubclass(model, outcome.model):
                        found[name] = f"treated as {base}, whose Model it builds on"


def can_be_pipelined(model: type) -> bool:
    """Whether `sharded_load` would find a ``model.model.pipeline`` in an instance.

    As far as classes show it: `Model` has or assigns ``model``, and its module has a pipelined
    class, or imports a module of mlx-lm that has one.
    """
    from ... import drift

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
