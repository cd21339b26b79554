"""What `doctor` finds out: of this process, of a model, of all ranks, and of their links.

It patches its own process as a program's would be, and looks at the state of each target. It loads
no weights and does not use the network: of a model it reads the config, and on ranks the headers.
"""

from __future__ import annotations

import hashlib
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
from .models import find, rows_of, split
from .ranks import launched_rank

Report = dict[str, Any]

TESTED = ">=0.31.3,<=0.32.2"
"""The versions of mlx-lm with which all is tested (tests/versions.py)."""
FAULTS = {
    "MLX_JACCL_RING": (
        ">=0.32.1,<0.32.3",
        "over JACCL's ring all_gather gives wrong data (mlx #4443): install mlx 0.32.3 or newer",
    ),
    "MLX_METAL_FAST_SYNCH": (
        "",
        "with it ranks sometimes stand still (mlx #3142, #3830): leave it unset",
    ),
    "MLX_JACCL_COORDINATOR": (
        "",
        "over JACCL, sends of different shapes one after the other can go wrong (mlx #3149). A "
        "collective between them cures it, and the plugin leaves that out between two calls in one "
        "rank_zero_head block: call share_tokens after each call of the model",
    ),
}
"""By a variable: with which versions of mlx it is dangerous to set it, and why."""
NOT_THERE = ("not pipelined", "not in this mlx-lm")
"""States of a family in which there is nothing to patch."""
FACTS_BYTES = 4096
"""What each rank gives to the others."""
HARMLESS = {"variable", "mlx", "wrapt", "settings of mlx"}
"""Facts in which ranks may differ. Where the variable means something else, so does the mode."""
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
        name, version, problem = needed.name, None, ""
        if needed.marker is not None:  # of an extra
            continue
        try:
            version = metadata.version(name)
            if not satisfies(version, str(needed.specifier)):
                problem = f"{needed.specifier} is needed"
            importlib.import_module("mlx.core" if name == "mlx" else name.replace("-", "_"))
        except Exception as error:
            problem = f"cannot be imported: {one_line(error)}"
            if name == "mlx" and sys.platform == "linux":
                problem += " (on Linux it needs one of the extras cpu, cuda12 and cuda13)"
        found[name] = {"version": version, "needs": str(needed.specifier), "problem": problem}
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
        missing = {}
        for module in (LOADING_MODULE, LOOPS_MODULE, *(family.module for family in FAMILIES)):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                state = "not in this mlx-lm" if error.name == module else "refused"
                missing[module.rpartition(".")[2]] = {"state": state, "reason": one_line(error)}
        now = status()
        found = {name: target._asdict() for name, target in (now.loops | now.families).items()}
        report["targets"] = {**found, **missing}
        report["patches"] = list(_patches_of_others())
    finally:
        uninstall() if before == "off" else install(before)


def _patches_of_others() -> Iterator[dict[str, str]]:
    """What is at, over or under our targets and is neither ours nor upstream's."""
    from ..installing import table

    targets = []
    for row in table():
        with suppress(AttributeError, KeyError):
            targets.append((f"{row.module}.{row.path}", inspect.getattr_static(*row.locate())))
    for target, layer in dict(targets).items():
        origins = []
        while layer is not None:
            origins.append(_origin(layer))
            layer = getattr(layer, "__wrapped__", None)
        is_ours = [origin.startswith("mlx_lm_skiphead.") for origin in origins]
        for depth, origin in enumerate(origins):
            if origin.partition(".")[0] not in ("mlx", "mlx_lm", "mlx_lm_skiphead"):
                side = "below" if any(is_ours[:depth]) else "above"
                where = f"{side} the plugin" if any(is_ours) else ""
                how = "wraps" if depth < len(origins) - 1 else "replaces"
                yield {"target": target, "by": origin, "how": how, "where": where}


def _origin(layer: Any) -> str:
    """The module with the code of a function or of a wrapper of wrapt.

    Not ``__module__`` of a function, which functools.wraps copies from what is wrapped.
    """
    layer = getattr(layer, "_self_wrapper", layer)
    layer = getattr(layer, "__func__", layer)
    names = getattr(layer, "__globals__", {"__name__": getattr(layer, "__module__", None)})
    return str(names["__name__"] or type(layer).__module__)


def look_at_model(name: str, targets: dict[str, dict[str, str]]) -> dict[str, Any]:
    """``model`` of the report; see `doctor`."""
    found = {"name": name, "model_type": "", "family": "", "head": "unknown", "supported": False}
    folder = find(name)
    if folder is None:
        return {**found, "reason": "no such folder, and not in the hub's cache on this machine"}
    try:
        written = json.loads((folder / "config.json").read_bytes())
        found["model_type"] = written["model_type"]
    except FileNotFoundError:
        return {**found, "reason": "it has no config.json"}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return {**found, "reason": f"its config.json cannot be used: {one_line(error)}"}
    tied = {**written, **(written.get("text_config") or {})}.get("tie_word_embeddings")
    if tied is not None:
        found["head"] = "tied" if tied else "own"
    if written.get("model_file"):
        return {**found, "reason": "not covered: it brings a model_file of its own"}
    if not targets:
        return {**found, "reason": "the packages cannot be used"}
    from mlx_lm.utils import _get_classes

    try:
        rows = rows_of(_get_classes(config=written)[0])
    except Exception as error:
        return {**found, "reason": f"mlx-lm does not load it: {one_line(error)}"}
    if not rows:
        return {**found, "reason": "the plugin does not know it, and it works as upstream"}
    target = targets[rows[0].name]
    reason = "" if target["state"] == "patched" else ": ".join(filter(None, target.values()))
    return {**found, "family": rows[0].name, "supported": not reason, "reason": reason}


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
        by_name = {name: [rank.get(name) for rank in ranks] for name in ranks[0]}
        report["differences"] = {n: v for n, v in by_name.items() if any(x != v[0] for x in v)}
        _judge_differences(report)
        if measures_links and not report["differences"].keys() & {"plugin", "links"}:
            from . import links

            report["links"] = links.measure(group)
            judge_links(report["links"], report["warnings"], problems)
    except (RuntimeError, ValueError) as error:
        problems.append(f"The ranks cannot be connected: {one_line(error)}")


def _exchanged(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of all ranks, by rank."""
    import mlx.core as mx

    data = json.dumps(facts).encode().ljust(FACTS_BYTES)
    gather: Any = inspect.unwrap(mx.distributed.all_gather)  # whatever wraps it
    gathered = bytes(gather(mx.array(list(data), mx.uint8)).tolist())
    places = range(0, len(gathered), FACTS_BYTES)
    return [json.loads(gathered[place : place + FACTS_BYTES]) for place in places]


def _facts(report: Report, measures_links: bool) -> dict[str, Any]:
    """What ranks should have in common; it must fit into `FACTS_BYTES`."""
    targets, model = report["targets"], report["model"] or {"supported": ""}
    variable = report["variable"]
    return {
        "mode": report["mode"],
        "variable": "not set" if variable is None else repr(variable[:40]),
        "download": (report["download"] or "all")[:40],
        "plugin": report["plugin"],
        **{name: report["packages"][name]["version"] for name in ("mlx-lm", "mlx", "wrapt")},
        "table": hashlib.sha256(repr(FAMILIES).encode()).hexdigest()[:12],
        "not patched": ", ".join(n for n, t in targets.items() if t["state"] != "patched"),
        "model is supported": str(model["supported"]),
        "settings of mlx": ", ".join(settings_of_mlx()),
        "links": str(measures_links),
        "arguments": report["wrong_argument"][:200],
    }


def _judge_differences(report: Report) -> None:
    differing = report["differences"].keys()
    line = f"The ranks differ in: {', '.join(differing)}."
    if differing - HARMLESS:
        if "mode" in differing:
            line += f" Give all of them the variable: mlx.launch --env {config.VARIABLE}=1 ..."
        if differing & {"plugin", "mlx-lm", "table"}:
            line += " Install the same versions for all of them."
        report["problems"].append(line)
    elif differing - {"variable"}:
        report["warnings"].append(line)


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
            warnings.append(
                f"{name} has a latency of {latency:.1f} ms, and each token waits for it; the best "
                f"link here has {best:.1f}."
            )
        if speed < max(speeds) / UNEVEN:
            warnings.append(
                f"{name} carries {speed:.0f} MB/s, and prompts wait for it; the best link here "
                f"carries {max(speeds):.0f}."
            )


def saved_downloads(model: str, ranks: int) -> str:
    """What the choice of downloads saves over some ranks; "" where the model is not here."""
    folder = find(model)
    with suppress(Unusable):
        if folder is not None and ranks > 1:
            parts = [downloads.of_rank(folder, split(folder, r, ranks)) for r in range(ranks)]
            return downloads.summary(parts)
    return ""
