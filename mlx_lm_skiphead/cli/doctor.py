"""``mlx-lm-skiphead doctor``: checks that the plugin works here, with these versions and ranks.

It looks at versions, each patch by family, loop or part, patches of other packages, and a model of
yours. Under mlx.launch or mpirun it also compares all ranks, and with --links measures their links.
It loads no weights and uses no network but those links. To look at patches, it patches its own
process as a program's would be.

Example: mlx.launch -n 2 --backend ring --env MLX_LM_SKIPHEAD=1 -- python -m mlx_lm_skiphead doctor
--model ./my-model
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion
from rich.console import Console

from .. import __version__, config
from ..families import BY_NAME
from .models import locate
from .ranks import launched_rank
from .run import in_the_way
from .shared import Unusable, one_line
from .tables import commas, show, table

Report = dict[str, Any]

KNOWN = json.loads(Path(__file__).with_suffix(".json").read_text())
"""What is known of versions. ``tested``: those of mlx-lm with which all is tested
(tests/tools/versions.py). ``faults``: versions of mlx with a fault, and ``why`` that counts; with a
``setting``, a variable, only if that is set."""
BACKENDS = ("ring", "jaccl", "mpi", "nccl")
HARMLESS = {"Python", "mlx", "packaging", "rich", "wrapt", "settings of mlx"}
"""Facts in which ranks may differ."""
CACHE_BYTES = (
    "--prompt-cache-bytes over ranks: each drops prompts by the size of its own layers, and then "
    "the ranks go on with different parts of a prompt. Use --prompt-cache-size."
)
NO_IMPORT = "cannot be imported"
NO_MPI = "MLX does not find MPI, and each rank is alone: mpirun -x MLX_MPI_LIBNAME=.../libmpi.so.40"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``doctor``."""
    option = parser.add_argument
    option("--model", metavar="PATH_OR_REPO", help="a folder, or a hub repository in the cache")
    first = "to see what it patches; may be repeated"
    option("--import", dest="modules", action="append", default=[], metavar="MODULE", help=first)
    option("--links", action="store_true", help="measure each link, under mlx.launch or mpirun")
    option("--json", action="store_true", help="print one JSON document, and nothing else")
    option("program", nargs=argparse.REMAINDER, help="looked at, and not run: what run is given")


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 1 if something that was asked for cannot work, by the variable or by
        ``--model``, or if ranks differ; 2 for wrong arguments. On ranks other than 0 it is 0:
        a launcher would kill rank 0, which prints the report.
    """
    if arguments.links and launched_rank() is None:
        raise Unusable("--links needs ranks: mlx.launch -n 2 ... -- mlx-lm-skiphead doctor --links")
    # What the plugin logs is in the report, but for a link on which nothing moves.
    logging.getLogger("mlx_lm_skiphead").addFilter(lambda record: record.module == "watch")
    with redirect_stdout(sys.stderr):
        report = diagnose(arguments.model, arguments.modules, arguments.links)
    if launched_rank():
        return 0
    show(arguments.json, report, _print)
    return int(report["exit_code"])


def diagnose(model: str | None, modules: list[str], measures_links: bool) -> Report:
    """All that doctor finds out, as ``--json`` prints it.

    Keys:

    - ``versions``: of the plugin, Python, and each package that the plugin requires, by name
      ``{"version", "needed", "state"}``. The version is "" if the package is not installed, and the
      state "ok" or what is wrong.
    - ``variable``: the value of MLX_LM_SKIPHEAD, or null; ``mode``: "off", "on" or "hidden", or
      "invalid".
    - ``targets``: parts, loops and families, by name ``{"state", "reason"}``, as in `status()`.
      They are of this process, which is patched whatever the mode: "not imported yet" is not in
      this mlx-lm. Empty if a package cannot be imported.
    - ``left_to_upstream``: the names of those that were refused or replaced.
    - ``patches``: other packages' ``{"target", "by"}``: the function, and the module that wraps or
      replaces it.
    - ``model``: ``{"name", "model_type", "family", "head", "supported", "reason"}``, or null. The
      head is "tied to the embedding", "its own" or "unknown".
    - ``ranks``: the facts in which ranks should agree, by rank; empty if there is only one rank.
    - ``links``: null if they are not measured, else what `links.measure` returns.
    - ``notes``, ``warnings``, ``problems``: lines; ``exit_code``: of the command.

    Raises:
        Unusable: see `_look_at_targets`.
    """
    lists = ("left_to_upstream", "patches", "ranks", "notes", "warnings", "problems")
    versions, value = _versions(), os.environ.get(config.VARIABLE)
    report: Report = {"versions": versions, "variable": value, "mode": "invalid"}
    report |= {"targets": {}, "model": None, "links": None, **{name: [] for name in lists}}
    notes, warnings, problems = report["notes"], report["warnings"], report["problems"]
    try:
        mode = report["mode"] = config.requested_mode()
        setting = f"{config.VARIABLE} is not set" if value is None else f"{config.VARIABLE}={value}"
        notes.append(f"{setting}: the plugin is {mode}.")
        if split := config.layers_by_rank():
            notes.append(f"{config.SPLIT}={commas(split)}: layers of each rank, rank 0 first.")
    except ValueError as error:
        problems.append(str(error))
    # With the plugin off and no model, nothing has been asked for that could fail.
    wanted = warnings if report["mode"] == "off" and not model else problems
    wrong = {name: found for name, found in versions.items() if found["state"] != "ok"}
    wanted += [f"{name} {found['version']}: {found['state']}." for name, found in wrong.items()]
    if not any(found["state"].startswith(NO_IMPORT) for found in wrong.values()):
        _look_at_targets(report, modules)
        warnings += judge_versions(versions["mlx"]["version"], versions["mlx-lm"]["version"])
        if left := ", ".join(report["left_to_upstream"]):
            wanted.append(f"Left to upstream mlx-lm: {left}.")
        if model:
            _look_at_model(report, model)
        _look_at_ranks(report, measures_links)
    if other := in_the_way():
        line = "`run` does not reach the Python processes that a program starts"
        warnings.append(f"{line}: {other} comes before its own, and does not run it.")
    return {**report, "exit_code": 1 if problems else 0}


def _versions() -> dict[str, dict[str, str]]:
    """``versions`` of the report; see `diagnose`."""
    own = {"mlx-lm-skiphead": __version__, "Python": platform.python_version()}
    found = {name: {"version": v, "needed": "", "state": "ok"} for name, v in own.items()}
    packages = map(Requirement, metadata.requires("mlx-lm-skiphead") or [])
    for needed in (package for package in packages if package.marker is None):  # of no extra
        name, specifier, version = needed.name, str(needed.specifier), ""
        try:
            version = metadata.version(name)
            importlib.import_module("mlx.core" if name == "mlx" else name.replace("-", "_"))
            state = "ok" if satisfies(version, specifier) else f"{specifier} is needed"
        except Exception as error:
            state = f"{NO_IMPORT}: {one_line(error)}"
            if name == "mlx" and sys.platform == "linux":
                state += " (on Linux it needs one of the extras cpu, cuda12 and cuda13)"
        found[name] = {"version": version, "needed": specifier, "state": state}
    return found


def satisfies(version: str, needed: str) -> bool:
    """Whether a version, pre-releases included, is one of those needed."""
    with suppress(InvalidVersion):
        return SpecifierSet(needed).contains(version, prereleases=True)
    return False


def judge_versions(mlx: str, mlx_lm: str) -> Iterator[str]:
    """Warnings of versions, and of settings of MLX that are known to fail with this one."""
    if not satisfies(mlx_lm, KNOWN["tested"]):
        yield f"mlx-lm {mlx_lm}: the plugin has been tested with {KNOWN['tested']}."
    for fault in KNOWN["faults"]:
        if satisfies(mlx, fault["mlx"]) and fault["setting"] in ("", *_settings_of_mlx()):
            subject = f"{fault['setting']} is set" if fault["setting"] else f"mlx {mlx}"
            yield f"{subject}: {fault['why']}."


def _settings_of_mlx() -> list[str]:
    """Those of the dangerous variables that are set."""
    settings = (fault["setting"] for fault in KNOWN["faults"])
    return [name for name in settings if os.environ.get(name, "0").strip() not in ("", "0")]


def _look_at_targets(report: Report, modules: Sequence[str]) -> None:
    """Patch as a program that imports the plugin last, look at it, and undo that.

    Fills in ``targets``, ``left_to_upstream`` and ``patches``.

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
                if getattr(error, "name", None) != module:  # else this mlx-lm does not have it
                    report["warnings"].append(f"{module} {NO_IMPORT}: {one_line(error)}.")
        now = status()
        targets = now.parts | now.loops | now.families
        report["targets"] = {name: target._asdict() for name, target in targets.items()}
        left = [name for name, t in targets.items() if t.state in ("refused", "replaced")]
        report["left_to_upstream"] = left
        report["patches"] = [{"target": t, "by": by} for t, by in dict.fromkeys(_by_others())]
        if others := ", ".join(map("{target} (by {by})".format_map, report["patches"])):
            line = "Other packages have patched the same functions"
            report["warnings"].append(f"{line}: {others}.")
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


def _look_at_model(report: Report, name: str) -> None:
    """Fill in ``model``."""
    targets = report["targets"]
    found = {"name": name, "model_type": "", "family": "", "head": "unknown", "reason": ""}
    try:
        written = json.loads((locate(name) / "config.json").read_bytes())
        found["model_type"] = written["model_type"]
        tied = {**written, **(written.get("text_config") or {})}.get("tie_word_embeddings")
        if tied is not None:
            found["head"] = "tied to the embedding" if tied else "its own"
        if written.get("model_file"):
            raise Unusable("not covered: it brings a model_file of its own")
        from mlx_lm.utils import _get_classes

        # The model is not built. Its family is the module of its class, or of one that this
        # inherits from.
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
    report["model"] = {**found, "supported": not found["reason"]}
    if found["reason"]:
        report["problems"].append("The model {name} is not supported: {reason}.".format_map(found))
    else:
        line = "The model {name} is supported: {family}; head: {head}."
        report["notes"].append(line.format_map(found))


def _look_at_ranks(report: Report, measures_links: bool) -> None:
    """Compare all ranks, if there are others, and measure the links; fill in both."""
    import mlx.core as mx

    from ..ranks.agreement import FOR_ALL, exchanged
    from . import links

    backends = [b for b in BACKENDS if mx.distributed.is_available(backend=b)]
    notes, warnings, problems = report["notes"], report["warnings"], report["problems"]
    notes.append(f"Distributed backends: {', '.join(backends)}, on {platform.platform()}.")
    if launched_rank() is None:
        return
    try:
        group = mx.distributed.init()
        if group.size() == 1:  # as MLX takes a library of MPI that it cannot load
            problems += [NO_MPI] if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1" else []
            return
        if any("--prompt-cache-bytes" in text for text in (*sys.argv, *os.environ.values())):
            warnings.append(CACHE_BYTES)
        ranks = report["ranks"] = exchanged(_facts(report, measures_links))
        facts = {name: [rank.get(name, "") for rank in ranks] for name in ranks[0]}
        differing = {name: values for name, values in facts.items() if len(set(values)) > 1}
        said = ", ".join(f"{name} ({' | '.join(v)})" for name, v in differing.items())
        if differing.keys() - HARMLESS:
            problems.append(f"The ranks differ in: {said}. {FOR_ALL}")
        elif differing:
            warnings.append(f"The ranks differ in: {said}.")
        else:
            notes.append(f"{len(ranks)} ranks agree.")
        if measures_links and not differing.keys() & {"mlx-lm-skiphead", "links"}:
            found = report["links"] = links.measure(group)
            problems += [f"The links are broken: {found['garbled']}."] if found["garbled"] else []
            for is_slow, line in links.judge(found["links"]):
                (warnings if is_slow else notes).append(line)
    except (RuntimeError, ValueError) as error:
        problems.append(f"The ranks cannot be connected: {one_line(error)}")


def _facts(report: Report, measures_links: bool) -> dict[str, str]:
    """In what ranks should agree, by name."""
    return {
        config.VARIABLE: report["mode"],
        config.DOWNLOAD: os.environ.get(config.DOWNLOAD) or "all",
        config.SPLIT: os.environ.get(config.SPLIT) or "even",
        **{name: found["version"] for name, found in report["versions"].items()},
        "left to upstream": ", ".join(report["left_to_upstream"]),
        "model": str((report["model"] or {}).get("reason")),
        "settings of mlx": ", ".join(_settings_of_mlx()),
        "links": str(measures_links),
    }


def _print(console: Console, report: Report) -> None:
    for key, heading in (("versions", "versions"), ("targets", "patches")):
        rows = [{heading: name, **found} for name, found in report[key].items()]
        console.print(table("", rows, is_text=True))
    if not report["problems"] and not report["warnings"]:
        report["notes"].append("No problem was found.")
    for name, style in (("notes", ""), ("warnings", "yellow"), ("problems", "red")):
        heading = "" if name == "notes" else f"{name.removesuffix('s').capitalize()}: "
        for text in report[name]:
            console.print(f"{heading}{text}", style=style, soft_wrap=True)
