"""What `doctor` finds out: of versions, of patches, of a model, of all ranks and their links.

It patches its own process as a program's would be, and looks at the state of each target. It loads
no weights and does not use the network: of a model it reads the config.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion

from .. import config
from ..families import BY_NAME
from .models import locate
from .ranks import launched_rank
from .shared import Unusable, one_line

Report = dict[str, Any]

TESTED = ">=0.31.3,<=0.32.2"
"""The versions of mlx-lm with which all is tested (tests/versions.py)."""
JACCL_RING = "over its ring all_gather gives wrong data (mlx #4443): install mlx 0.32.3 or newer"
FAST_SYNCH = "with it ranks sometimes stand still (mlx #3142, #3830): leave it unset"
JACCL = (
    "over JACCL, sends of different shapes one after the other can go wrong (mlx #3149). A "
    "collective between them cures it, and the plugin leaves that out between two calls in one "
    "rank_zero_head block: call share_tokens after each call of the model"
)
FAULTS = {
    "MLX_JACCL_RING": (">=0.32.1,<0.32.3", JACCL_RING),
    "MLX_METAL_FAST_SYNCH": ("", FAST_SYNCH),
    "MLX_JACCL_COORDINATOR": ("", JACCL),
}
"""By a variable: with which versions of mlx it is dangerous to set it, and why."""
HARMLESS = {"mlx", "wrapt", "settings of mlx"}
"""Facts in which ranks may differ."""
SLOW_MS, UNEVEN = 5.0, 5.0
"""A latency that no wired link has, and how many times slower than the best one a link may be."""
NO_MPI = (
    "MLX does not find MPI, and each rank is alone: set MLX_MPI_LIBNAME to its library, as in "
    "mpirun -x MLX_MPI_LIBNAME=/path/to/libmpi.so.40 ..."
)


def packages() -> dict[str, dict[str, Any]]:
    """By name of a package that the plugin needs, its version, the versions needed, a problem."""
    found = {}
    for needed in map(Requirement, metadata.requires("mlx-lm-skiphead") or []):
        name, needs, version, problem = needed.name, str(needed.specifier), None, ""
        if needed.marker is not None:  # of an extra
            continue
        try:
            version = metadata.version(name)
            problem = "" if satisfies(version, needs) else f"{needs} is needed"
            importlib.import_module("mlx.core" if name == "mlx" else name.replace("-", "_"))
        except Exception as error:
            problem = f"cannot be imported: {one_line(error)}"
            if name == "mlx" and sys.platform == "linux":
                problem += " (on Linux it needs one of the extras cpu, cuda12 and cuda13)"
        found[name] = {"version": version, "needs": needs, "problem": problem}
    return found


def satisfies(version: str, needs: str) -> bool:
    """Whether a version, pre-releases included, is one of those needed."""
    try:
        return SpecifierSet(needs).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def judge_versions(mlx: str, mlx_lm: str) -> Iterator[str]:
    """Warnings of versions, and of settings of MLX that are known to fail with this one."""
    if not satisfies(mlx_lm, TESTED):
        yield f"mlx-lm {mlx_lm}: the plugin has been tested with {TESTED}."
    if not satisfies(mlx, ">=0.32.3"):
        line = "its ring may not notice that a rank is lost (mlx #4060)"
        yield f"mlx {mlx}: {line}. Version 0.32.3 or newer is recommended."
    for variable in settings_of_mlx():
        versions, line = FAULTS[variable]
        if satisfies(mlx, versions):
            yield f"{variable} is set: {line}."


def settings_of_mlx() -> list[str]:
    """Those of the dangerous variables that are set."""
    return [name for name in FAULTS if os.environ.get(name, "0").strip() not in ("", "0")]


def look_at_targets(report: Report, modules: Sequence[str]) -> None:
    """Patch as a program that imports the plugin last, look at it, and undo that.

    Fills in ``targets`` and ``patches``.

    Raises:
        Unusable: if one of `modules` cannot be imported.
    """
    from .. import install, status, uninstall
    from ..installing import MODULES

    before = status().mode
    uninstall()
    try:
        sys.path.insert(0, os.getcwd())  # as for python -m
        for name in modules:
            try:
                importlib.import_module(name)
            except (Exception, SystemExit) as error:
                raise Unusable(f"--import {name}: {one_line(error)}") from error
        install("hidden" if report["mode"] == "hidden" else "on")
        for module in dict.fromkeys(MODULES.values()):
            try:
                importlib.import_module(module)
            except Exception as error:
                if getattr(error, "name", None) != module:  # else this mlx-lm has it not
                    report["warnings"].append(f"{module} cannot be imported: {one_line(error)}.")
        now = status()
        targets = now.parts | now.loops | now.families
        report["targets"] = {name: target._asdict() for name, target in targets.items()}
        report["patches"] = [{"target": t, "by": by} for t, by in dict.fromkeys(_by_others())]
    finally:
        uninstall() if before == "off" else install(before)


def _by_others() -> Iterator[tuple[str, str]]:
    """Each target with the module of what is at, over or under it, if not ours or upstream's."""
    import wrapt

    from ..installing import table
    from ..patching.handles import written_in

    for row in table():
        with suppress(AttributeError, KeyError):
            for layer in wrapt.wrapper_chain(inspect.getattr_static(*row.locate())):
                by = written_in(layer)
                if by.partition(".")[0] not in ("mlx", "mlx_lm", "mlx_lm_skiphead"):
                    yield f"{row.module}.{row.path}", by


def look_at_model(name: str, targets: dict[str, dict[str, str]]) -> dict[str, Any]:
    """``model`` of the report; see `doctor`."""
    found = {"name": name, "model_type": "", "family": "", "head": "unknown", "reason": ""}
    try:
        written = json.loads((locate(name) / "config.json").read_bytes())
        found["model_type"] = written["model_type"]
        tied = {**written, **(written.get("text_config") or {})}.get("tie_word_embeddings")
        if tied is not None:
            found["head"] = "tied to the embedding" if tied else "its own"
        if written.get("model_file"):
            raise Unusable("not covered: it brings a model_file of its own")
        if not targets:
            raise Unusable("the packages cannot be used")
        from mlx_lm.utils import _get_classes

        # Not built, so by its class: the module of that, or of one that it inherits from.
        classes = _get_classes(config=written)[0].__mro__
        modules = [cls.__module__.rpartition(".")[2] for cls in classes]
        found["family"] = next((name for name in modules if name in BY_NAME), "")
        if not found["family"]:
            raise Unusable("the plugin does not know it, and it works as upstream")
        if (target := targets[found["family"]])["state"] != "patched":
            raise Unusable(": ".join(filter(None, target.values())))
        base = BY_NAME[BY_NAME[found["family"]].base or found["family"]]
        stage = getattr(importlib.import_module(base.module), base.stage_class)
        if config.layers_by_rank() and "split" not in inspect.signature(stage.pipeline).parameters:
            raise Unusable(f"{config.SPLIT} is set, and this mlx-lm splits it evenly only")
    except Unusable as error:
        found["reason"] = str(error)
    except Exception as error:
        found["reason"] = f"it cannot be loaded: {one_line(error)}"
    return {**found, "supported": not found["reason"]}


def look_at_ranks(report: Report, measures_links: bool) -> None:
    """Compare the facts of all ranks, and measure the links; fill in what is theirs."""
    import mlx.core as mx

    from ..ranks.agreement import exchanged

    problems = report["problems"]
    report["rank"] = launched_rank() or 0
    try:
        group = mx.distributed.init()
        if group.size() == 1:  # as MLX takes a library of MPI that it cannot load
            problems += [NO_MPI] if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1" else []
            return
        ranks = report["ranks"] = exchanged(_facts(report, measures_links))
        facts = {name: [rank.get(name, "") for rank in ranks] for name in ranks[0]}
        differing = {name: values for name, values in facts.items() if len(set(values)) > 1}
        report["differences"] = differing
        if differing:
            said = ", ".join(f"{name} ({' | '.join(v)})" for name, v in differing.items())
            kind = "problems" if differing.keys() - HARMLESS else "warnings"
            report[kind].append(
                f"The ranks differ in: {said}. Give all of them the variable (mlx.launch --env "
                f"{config.VARIABLE}=1 ...), and install the same versions for all."
            )
        if measures_links and not differing.keys() & {"plugin", "links"}:
            from . import links

            report["links"] = links.measure(group)
            judge_links(report["links"], report["warnings"], problems)
    except (RuntimeError, ValueError) as error:
        problems.append(f"The ranks cannot be connected: {one_line(error)}")


def _facts(report: Report, measures_links: bool) -> dict[str, str]:
    """What ranks should have in common, in few bytes."""
    targets = report["targets"].items()
    return {
        "mode": report["mode"],
        "download": (os.environ.get(config.DOWNLOAD) or "all")[:40],
        "split": (os.environ.get(config.SPLIT) or "even")[:40],
        "plugin": report["plugin"],
        **{name: str(report["packages"][name]["version"]) for name in ("mlx-lm", "mlx", "wrapt")},
        "not patched": ", ".join(n for n, t in targets if t["state"] != "patched"),
        "model": str((report["model"] or {}).get("reason"))[:200],
        "settings of mlx": ", ".join(settings_of_mlx()),
        "links": str(measures_links),
    }


def judge_links(found: dict[str, Any], warnings: list[str], problems: list[str]) -> None:
    """Say which of the links are broken, or slower than others."""
    if found["garbled"]:
        problems.append(f"The links are broken: {found['garbled']}.")
    # The faster way of each link: a machine with other work to do makes one of them look slow.
    links = [(x["latency_ms"], max(x["there_mb_s"], x["back_mb_s"])) for x in found["links"]]
    best, most = min(latency for latency, _ in links), max(speed for _, speed in links)
    for link, (latency, speed) in zip(found["links"], links, strict=True):
        name = "The link between ranks {} and {}".format(*link["between"])
        if latency > SLOW_MS or latency > max(UNEVEN * best, 1.0):
            line = f"a latency of {latency:.1f} ms, and each token waits for it; the best has"
            warnings.append(f"{name} has {line} {best:.1f}.")
        if speed < most / UNEVEN:
            line = f"carries {speed:.0f} MB/s, and prompts wait for it; the best carries"
            warnings.append(f"{name} {line} {most:.0f}.")
