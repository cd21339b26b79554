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
from rich.text import Text

from .. import __version__, config
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

    - ``plugin``, ``python``, ``platform``: versions.
    - ``packages``: by name ``{"version", "needs", "problem"}``. The version is null if it is not
      installed, `needs` is what the plugin requires, `problem` is "" if there is none.
    - ``backends``: the distributed backends that this mlx has.
    - ``variable``: the value of MLX_LM_SKIPHEAD, or null; ``mode``: "off", "on" or "hidden", or
      "invalid".
    - ``targets``: parts, loops and families, by name ``{"state", "reason"}``, as in `status()`.
      They are of this process, which is patched whatever the mode: "not imported yet" is not in
      this mlx-lm. Empty if a package cannot be imported.
    - ``patches``: other packages' ``{"target", "by"}``: the function, and the module that wraps or
      replaces it.
    - ``model``: ``{"name", "model_type", "family", "head", "supported", "reason"}``, or null. The
      head is "tied to the embedding", "its own" or "unknown".
    - ``rank``: this rank; ``ranks``: the facts of each rank, a list by rank, or null if there is
      only one; ``differences``: by name of a fact that differs, a list of its values by rank.
    - ``links``: null if they are not measured, else what `links.measure` returns.
    - ``warnings``, ``problems``: lines; ``exit_code``: of the command.

    Raises:
        Unusable: see `examine.look_at_targets`.
    """
    found = examine.packages()
    report: examine.Report = {"plugin": __version__, "packages": found, "mode": "invalid"}
    report |= {"python": platform.python_version(), "platform": platform.platform()}
    report |= {"variable": os.environ.get(config.VARIABLE), "targets": {}, "patches": []}
    report |= {"model": None, "rank": 0, "ranks": None, "differences": {}, "links": None}
    report |= {"backends": [], "warnings": [], "problems": []}
    problems, warnings = report["problems"], report["warnings"]
    try:
        report["mode"] = config.requested_mode()
    except ValueError as error:
        problems.append(str(error))
    # With the plugin off, nothing has been asked for that could fail.
    wanted = warnings if report["mode"] == "off" else problems
    wanted += [f"{n} {p['version']}: {p['problem']}." for n, p in found.items() if p["problem"]]
    is_usable = not any("imported" in package["problem"] for package in found.values())
    if is_usable:
        examine.look_at_targets(report, modules)
        warnings += examine.judge_versions(found["mlx"]["version"], found["mlx-lm"]["version"])
    targets = report["targets"].items()
    if left := [name for name, t in targets if t["state"] in ("refused", "replaced")]:
        wanted.append(f"Left to upstream mlx-lm: {', '.join(left)}.")
    if model:
        report["model"] = examine.look_at_model(model, report["targets"])
    if report["model"] and (reason := report["model"]["reason"]):
        problems.append(f"The model {model} is not supported: {reason}.")
    if patches := ", ".join("{target} (by {by})".format_map(p) for p in report["patches"]):
        warnings.append(f"Other packages have patched the same functions: {patches}.")
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
    rows: list[list[str | Text]] = [["mlx-lm-skiphead", report["plugin"], "", ""]]
    for name, package in report["packages"].items():
        state = Text(package["problem"], "red") if package["problem"] else "ok"
        rows.append([name, package["version"] or "", package["needs"], state])
    console.print(table("versions", ("", "version", "needed", ""), rows, is_text=True))
    line(f"Python {report['python']} on {report['platform']}")
    line(f"Distributed backends: {', '.join(report['backends']) or 'unknown'}.")
    value = report["variable"]
    setting = f"{config.VARIABLE} is not set" if value is None else f"{config.VARIABLE}={value}"
    mode = "not understood" if report["mode"] == "invalid" else f"the plugin is {report['mode']}"
    line(f"{setting}: {mode}.")
    if split := os.environ.get(config.SPLIT):
        line(f"{config.SPLIT}={split}: layers of each rank, rank 0 first.")
    rows = []
    for name, target in report["targets"].items():
        state = Text(target["state"], "red" if target["reason"] else "")
        rows.append([name, state, target["reason"]])
    if rows:
        console.print(table("", ("patches", "state", "why"), rows, is_text=True))
    ranks, model = report["ranks"] or [], report["model"]
    if model and model["supported"]:
        line("The model {name} is supported: {family}; head: {head}.".format_map(model))
    if ranks and not report["differences"]:
        line(f"{len(ranks)} ranks agree.")
    if links := report["links"]:
        rows = [
            ["{} - {}".format(*link.pop("between")), *(f"{number:.2f}" for number in link.values())]
            for link in links["links"]
        ]
        columns = ["ranks", "latency", "there", "back"]
        console.print(table("links: ms one way, and MB/s each way", columns, rows))
        step = "A step takes {step_ms:.2f} ms on the links alone, at most {highest_step_ms:.2f}."
        line(step.format_map(links))
    for kind, style in (("warning", "yellow"), ("problem", "red")):
        for text in report[f"{kind}s"]:
            line(f"{kind.capitalize()}: {text}", style=style)
    if not report["problems"] and not report["warnings"]:
        console.print("No problem was found.", style="green")
