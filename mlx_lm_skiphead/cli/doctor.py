"""``mlx-lm-skiphead doctor``: whether the plugin works here, with this mlx-lm, model and ranks.

It looks at versions, each patch by family, loop or part, patches of other packages, and a model of
yours. Under mlx.launch or mpirun it also compares all ranks, and with --links measures their links.
It loads no weights and uses no network but those links.

Example: mlx.launch -n 2 --backend ring --env MLX_LM_SKIPHEAD=1 -- python -m mlx_lm_skiphead doctor
--model ./my-model
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from contextlib import redirect_stdout
from functools import partial
from typing import Any

from rich.console import Console

from .. import config
from . import examine
from .ranks import launched_rank
from .run import in_the_way
from .shared import Unusable, new_command, table

BACKENDS = ("ring", "jaccl", "mpi", "nccl")


def add_command(commands: Any) -> None:
    """Add ``doctor`` to the parser's subcommands."""
    summary = "check versions, families, loops, a model, patches of others, and all ranks"
    option = new_command(commands, run, __doc__, summary).add_argument
    option("--model", metavar="PATH_OR_REPO", help="a folder, or a hub repository in the cache")
    first = "to see what it patches; may be repeated"
    option("--import", dest="modules", action="append", default=[], metavar="MODULE", help=first)
    option("--links", action="store_true", help="measure each link, under mlx.launch or mpirun")
    option("--json", action="store_true", help="print one JSON document, and nothing else")


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
    code: int = report["exit_code"]
    if report["rank"]:
        return 0
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print(Console(markup=False, highlight=False), report)
    return code


def diagnose(model: str | None, modules: list[str], measures_links: bool) -> examine.Report:
    """All that doctor finds out, as ``--json`` prints it.

    Keys:

    - ``versions``: of the plugin, Python, and each package that the plugin requires, by name
      ``{"version", "needed", "state"}``. The version is "" if the package is not installed, and the
      state "ok" or what is wrong.
    - ``platform``; ``backends``: the distributed backends that this mlx has.
    - ``variable``: the value of MLX_LM_SKIPHEAD, or null; ``mode``: "off", "on" or "hidden", or
      "invalid".
    - ``targets``: parts, loops and families, by name ``{"state", "reason"}``, as in `status()`.
      They are of this process, which is patched whatever the mode: "not imported yet" is not in
      this mlx-lm. Empty if a package cannot be imported.
    - ``patches``: other packages' ``{"target", "by"}``: the function, and the module that wraps or
      replaces it.
    - ``model``: ``{"name", "model_type", "family", "head", "supported", "reason"}``, or null. The
      head is "tied to the embedding", "its own" or "unknown".
    - ``rank``: of this process. ``ranks``: the facts of each rank, a list by rank. It has one entry
      outside of mlx.launch and mpirun, and none if a package cannot be imported.
    - ``links``: null if they are not measured, else what `links.measure` returns.
    - ``warnings``, ``problems``: lines; ``exit_code``: of the command.

    Raises:
        Unusable: see `examine.look_at_targets`.
    """
    versions, variable = examine.versions(), os.environ.get(config.VARIABLE)
    report: examine.Report = {"versions": versions, "platform": platform.platform()}
    report |= {"backends": [], "variable": variable, "mode": "invalid", "targets": {}}
    report |= {"patches": [], "model": None, "rank": launched_rank() or 0, "ranks": []}
    report |= {"links": None, "warnings": [], "problems": []}
    problems, warnings = report["problems"], report["warnings"]
    try:
        report["mode"] = config.requested_mode()
    except ValueError as error:
        problems.append(str(error))
    # With the plugin off, nothing has been asked for that could fail.
    wanted = warnings if report["mode"] == "off" else problems
    wrong = {name: found for name, found in versions.items() if found["state"] != "ok"}
    wanted += [f"{name} {found['version']}: {found['state']}." for name, found in wrong.items()]
    is_usable = not any(found["state"].startswith(examine.NO_IMPORT) for found in wrong.values())
    if is_usable:
        examine.look_at_targets(report, modules)
        warnings += examine.judge_versions(
            versions["mlx"]["version"], versions["mlx-lm"]["version"]
        )
    targets = report["targets"].items()
    if left := [name for name, t in targets if t["state"] in ("refused", "replaced")]:
        wanted.append(f"Left to upstream mlx-lm: {', '.join(left)}.")
    if patches := ", ".join("{target} (by {by})".format_map(p) for p in report["patches"]):
        warnings.append(f"Other packages have patched the same functions: {patches}.")
    if model:
        report["model"] = found = examine.look_at_model(model, report["targets"])
        if not found["supported"]:
            problems.append(f"The model {model} is not supported: {found['reason']}.")
    if other := in_the_way():
        line = "`run` does not reach the Python processes that a program starts"
        warnings.append(f"{line}: {other} comes before its own, and does not run it.")
    if is_usable:
        import mlx.core as mx

        report["backends"] = [b for b in BACKENDS if mx.distributed.is_available(backend=b)]
        if launched_rank() is not None:
            examine.look_at_ranks(report, measures_links)
    return {**report, "exit_code": 1 if problems else 0}


def _print(console: Console, report: examine.Report) -> None:
    line = partial(console.print, soft_wrap=True)
    headings = {"versions": ("version", "needed", ""), "targets": ("state", "why")}
    for name, columns in headings.items():
        rows = [[name, *found.values()] for name, found in report[name].items()]
        console.print(table("", (name, *columns), rows, is_text=True))
    backends = ", ".join(report["backends"]) or "unknown"
    line(f"{report['platform']}. Distributed backends: {backends}.")
    value, mode = report["variable"], report["mode"]
    setting = f"{config.VARIABLE} is not set" if value is None else f"{config.VARIABLE}={value}"
    line(f"{setting}: {'not understood' if mode == 'invalid' else f'the plugin is {mode}'}.")
    if (model := report["model"]) and model["supported"]:
        line("The model {name} is supported: {family}; head: {head}.".format_map(model))
    ranks = report["ranks"]
    if len(ranks) > 1 and all(facts == ranks[0] for facts in ranks):
        line(f"{len(ranks)} ranks agree.")
    if links := report["links"]:
        rows = [
            ["{} - {}".format(*link.pop("between")), *(f"{number:.2f}" for number in link.values())]
            for link in links["links"]
        ]
        columns = ("ranks", "latency", "there", "back")
        console.print(table("links: ms one way, and MB/s each way", columns, rows))
        step = "A step takes {step_ms:.2f} ms on the links alone, at most {highest_step_ms:.2f}."
        line(step.format_map(links))
    for kind, style in (("warning", "yellow"), ("problem", "red")):
        for text in report[f"{kind}s"]:
            line(f"{kind.capitalize()}: {text}", style=style)
    if not report["problems"] and not report["warnings"]:
        line("No problem was found.", style="green")
