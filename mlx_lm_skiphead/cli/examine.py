"""What `doctor` finds out: of versions, of patches, of a model, of all ranks and their links.

It patches its own process as a program's would be, and looks at the state of each target. It loads
no weights and does not use the network: of a model it reads the config, and on ranks the headers.
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
from ..families import FAMILIES, LOADING_MODULE, LOOPS_MODULE
from . import downloads
from .arguments import Unusable, one_line
from .models import locate, rows_of, split
from .ranks import launched_rank

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
FACTS_BYTES = 4096
"""What each rank gives to the others."""
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
        for module in (LOADING_MODULE, LOOPS_MODULE, *(family.module for family in FAMILIES)):
            try:
                importlib.import_module(module)
            except Exception as error:
                if getattr(error, "name", None) != module:  # else this mlx-lm has it not
                    report["warnings"].append(f"{module} cannot be imported: {one_line(error)}.")
        now = status()
        report["targets"] = {n: t._asdict() for n, t in (now.loops | now.families).items()}
        report["patches"] = list(_patches_of_others())
    finally:
        uninstall() if before == "off" else install(before)


def _patches_of_others() -> Iterator[dict[str, str]]:
    """What is at, over or under our targets and is neither ours nor upstream's."""
    from ..installing import table

    targets = {}
    for row in table():
        with suppress(AttributeError, KeyError):
            targets[f"{row.module}.{row.path}"] = inspect.getattr_static(*row.locate())
    for target, layer in targets.items():
        while layer is not None:
            # Not `__module__` of a function, which functools.wraps copies from what is wrapped.
            written = getattr(layer, "_self_wrapper", layer)
            written = getattr(written, "__func__", written)
            names = getattr(written, "__globals__", {})
            by = str(names.get("__name__") or written.__module__ or type(written).__module__)
            if by.partition(".")[0] not in ("mlx", "mlx_lm", "mlx_lm_skiphead"):
                yield {"target": target, "by": by}
            layer = getattr(layer, "__wrapped__", None)


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

        rows = rows_of(_get_classes(config=written)[0])
        if not rows:
            raise Unusable("the plugin does not know it, and it works as upstream")
        found["family"], target = rows[0].name, targets[rows[0].name]
        if target["state"] != "patched":
            raise Unusable(": ".join(filter(None, target.values())))
    except Unusable as error:
        found["reason"] = str(error)
    except Exception as error:
        found["reason"] = f"it cannot be loaded: {one_line(error)}"
    return {**found, "supported": not found["reason"]}


def look_at_ranks(report: Report, measures_links: bool) -> None:
    """Compare the facts of all ranks, and measure the links; fill in what is theirs."""
    import mlx.core as mx

    problems = report["problems"]
    report["rank"] = launched_rank() or 0
    try:
        group = mx.distributed.init() if launched_rank() is not None else None
        if group is None or group.size() == 1:
            # As MLX takes a library of MPI that it cannot load.
            if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
                problems.append(NO_MPI)
            elif measures_links:
                line = "--links needs ranks, as in mlx.launch -n 2 ... -- mlx-lm-skiphead doctor"
                report["wrong_argument"] = report["wrong_argument"] or f"{line} --links"
            return
        ranks = report["ranks"] = _exchanged(_facts(report, measures_links))
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


def _exchanged(facts: dict[str, str]) -> list[dict[str, str]]:
    """The facts of all ranks, by rank."""
    import mlx.core as mx

    data = json.dumps(facts).encode().ljust(FACTS_BYTES)
    gather: Any = inspect.unwrap(mx.distributed.all_gather)  # whatever wraps it
    gathered = bytes(gather(mx.array(list(data), mx.uint8)).tolist())
    places = range(0, len(gathered), FACTS_BYTES)
    return [json.loads(gathered[place : place + FACTS_BYTES]) for place in places]


def _facts(report: Report, measures_links: bool) -> dict[str, str]:
    """What ranks should have in common; it must fit into `FACTS_BYTES`."""
    targets = report["targets"].items()
    return {
        "mode": report["mode"],
        "download": (report["download"] or "all")[:40],
        "plugin": report["plugin"],
        **{name: str(report["packages"][name]["version"]) for name in ("mlx-lm", "mlx", "wrapt")},
        "not patched": ", ".join(n for n, t in targets if t["state"] != "patched"),
        "model": str((report["model"] or {}).get("reason"))[:200],
        "settings of mlx": ", ".join(settings_of_mlx()),
        "links": str(measures_links),
        "arguments": report["wrong_argument"][:200],
    }


def judge_links(found: dict[str, Any], warnings: list[str], problems: list[str]) -> None:
    """Say which of the links are broken, or slower than others."""
    if found["garbled"]:
        problems.append(f"The links are broken: {found['garbled']}.")
    best = min(link["latency_ms"] for link in found["links"])
    # The faster way of each link: a machine with other work to do makes one of them look slow.
    speeds = [max(link["there_mb_s"], link["back_mb_s"]) for link in found["links"]]
    for link, speed in zip(found["links"], speeds, strict=True):
        name = "The link between ranks {} and {}".format(*link["between"])
        latency = link["latency_ms"]
        if latency > SLOW_MS or latency > max(UNEVEN * best, 1.0):
            line = f"has a latency of {latency:.1f} ms, and each token waits for it; the best"
            warnings.append(f"{name} {line} link here has {best:.1f}.")
        if speed < max(speeds) / UNEVEN:
            line = f"carries {speed:.0f} MB/s, and prompts wait for it; the best"
            warnings.append(f"{name} {line} link here carries {max(speeds):.0f}.")


def saved_downloads(model: str, ranks: int) -> str:
    """What the choice of downloads saves over some ranks; "" where the model is not here."""
    with suppress(Unusable):
        folder = locate(model)
        parts = [downloads.of_rank(folder, split(folder, rank, ranks)) for rank in range(ranks)]
        return downloads.summary(parts)
    return ""
