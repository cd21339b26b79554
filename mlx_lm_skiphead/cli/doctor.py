"""``mlx-lm-skiphead doctor``: does the plugin work here, with this mlx-lm, this model, these ranks?

`examine` finds out; this is the command, and its report as text.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import config
from .examination import examine
from .examination.ranks import NO_MPI
from .examination.report import Report


def add_command(commands: Any) -> None:
    """Add ``doctor`` to the parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="say what works here: versions, families, loops, a model, other patches, all ranks",
        description="Says whether the plugin works with the installed mlx-lm: versions, each "
        "family of models, each loop, what other packages have patched, and a model of yours. "
        "Under mlx.launch or mpirun it also says whether all ranks agree, and with --links how "
        "fast their links are. It loads no weights and uses no network but those links.",
        epilog="example: mlx.launch -n 2 --backend ring --env MLX_LM_SKIPHEAD=1 -- python -m "
        "mlx_lm_skiphead doctor --model ./my-model",
    )
    parser.add_argument(
        "--model", metavar="PATH_OR_REPO", help="a folder, or a repository in the hub's cache"
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import it first, to see what it patches; may be given again",
    )
    parser.add_argument(
        "--links",
        action="store_true",
        help="under mlx.launch or mpirun, send between the ranks what a step does, some hundred "
        "times, and measure each link; it ends if nothing moves for half a minute",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code: 0 if all is well; 1 if what was asked for cannot work, by the variable or by
    ``--model``, or if ranks differ; 2 for wrong arguments."""
    with _quiet():
        report = examine(arguments.model, arguments.modules, measures_links=arguments.links)
    code: int = report["exit_code"]
    if report["rank"] == 0:
        if code == 2:
            print(f"mlx-lm-skiphead doctor: {report['wrong_argument']}", file=sys.stderr)
        elif arguments.json:
            print(json.dumps(report, indent=2))
        else:
            _print(Console(markup=False, highlight=False), report)
        sys.stdout.flush()
    if report["ranks"]:
        _meet()
    elif report["rank"] and NO_MPI in report["problems"]:
        return 0  # mpirun would kill rank 0, which says so for all, and ends with the code
    return code


@contextmanager
def _quiet() -> Iterator[None]:
    """The report says what the plugin logs; what an import prints is kept out of it."""
    log = logging.getLogger("mlx_lm_skiphead")
    before, log.disabled = log.disabled, True
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        log.disabled = before


def _meet() -> None:
    """Wait for rank 0's report: mlx.launch kills all ranks when one has exited with an error."""
    import mlx.core as mx

    with suppress(RuntimeError):
        mx.eval(mx.distributed.all_sum(mx.array(1)))


# The report as text

_MEANING = {
    "off": "the plugin is off, and importing it does nothing",
    "on": "the plugin is on",
    "hidden": "the plugin is on, and outside mlx-lm's loops workers give hidden states",
    "invalid": "not understood",
}
_STYLES = {"patched": "green", "refused": "red", "replaced": "red", "unknown": "yellow"}


def _print(console: Console, report: Report) -> None:
    console.print(_versions(report))
    console.print(f"Python {report['python']} on {report['platform']}", soft_wrap=True)
    has = {True: "", False: "no "}
    said = [f"{has[available]}{name}" for name, available in report["backends"].items()]
    if said:
        console.print(f"Distributed backends: {', '.join(said)}.")
    value = report["variable"]
    setting = f"{config.VARIABLE} is not set" if value is None else f"{config.VARIABLE}={value}"
    console.print(f"{setting}: {_MEANING[report['mode']]}.", soft_wrap=True)
    if report["families"]:
        console.print(_states("family", report["families"], report["unknown"]))
        console.print(_states("loop", report["loops"], {}))
    if report["patches"]:
        console.print(_patches(report["patches"]))
    model = report["model"]
    if model and model["supported"]:
        head = {"tied": "tied to the embedding", "own": "its own"}.get(model["head"], "unknown")
        console.print(
            f"The model {model['name']} is supported: {model['model_type']}, of the family "
            f"{model['family']}; head: {head}.",
            soft_wrap=True,
        )
    if report["differences"].keys() - {"variable"}:
        console.print(_differences(report["differences"]))
    elif report["ranks"]:
        console.print(f"{len(report['ranks'])} ranks agree.")
    if report["links"]:
        _print_links(console, report["links"])
    for line in report["warnings"]:
        console.print(f"Warning: {line}", style="yellow", soft_wrap=True)
    for line in report["problems"]:
        console.print(f"Problem: {line}", style="red", soft_wrap=True)
    if not report["problems"] and not report["warnings"]:
        console.print("No problem was found.", style="green")
    if report["mode"] == "off" and not report["problems"]:
        console.print(f"To switch the plugin on, set {config.VARIABLE}=1 for all ranks.")


def _print_links(console: Console, links: Report) -> None:
    table = Table(title="links: ms one way, and MB/s each way")
    for column in ("ranks", "latency", "highest", "there", "back"):
        table.add_column(column, justify="right")
    for link in links["links"]:
        table.add_row(
            "{} - {}".format(*link["between"]),
            f"{link['latency_ms']:.2f}",
            f"{link['highest_ms']:.2f}",
            f"{link['there_mb_s']:.0f}",
            f"{link['back_mb_s']:.0f}",
        )
    console.print(table)
    console.print(
        f"A step takes {links['step_ms']:.2f} ms on the links alone (median of {links['steps']}, "
        f"highest {links['highest_step_ms']:.2f}): the least that a token can take.",
        soft_wrap=True,
    )


def _versions(report: Report) -> Table:
    table = Table(title="versions")
    for column in ("", "version", "needed", ""):
        table.add_column(column)
    table.add_row("mlx-lm-skiphead", report["plugin"], "", "")
    for name, package in report["packages"].items():
        problem = package["problem"]
        style = "red" if problem else None
        table.add_row(
            name, package["version"] or "", package["needs"], problem or "ok", style=style
        )
    return table


def _states(what: str, targets: dict[str, dict[str, str]], unknown: dict[str, str]) -> Table:
    rows = [(name, target["state"], target["reason"]) for name, target in targets.items()]
    rows += [(name, "unknown", f"pipelined by mlx-lm: {n}") for name, n in unknown.items()]
    table = Table()
    table.add_column(what)
    table.add_column("state")
    if any(reason for _, _, reason in rows):
        table.add_column("why")
    for name, state, reason in rows:
        said = Text("supported" if state == "patched" else state, _STYLES.get(state, ""))
        table.add_row(name, said, *([Text(reason)] if len(table.columns) > 2 else []))
    return table


def _patches(patches: list[dict[str, str]]) -> Table:
    """One row for each package that patches in one way."""
    table = Table(title="patches of other packages")
    for column in ("by", "how", "what"):
        table.add_column(column)
    grouped: dict[tuple[str, str], list[str]] = {}
    for patch in patches:
        how = ", ".join(filter(None, (patch["how"], patch["where"])))
        grouped.setdefault((patch["by"], how), []).append(patch["target"])
    for (by, how), targets in grouped.items():
        table.add_row(by, how, "\n".join(targets))
    return table


def _differences(differences: dict[str, list[str]]) -> Table:
    table = Table(title="what differs")
    table.add_column("")
    for rank in range(len(next(iter(differences.values())))):
        table.add_column(f"rank {rank}")
    for name, values in differences.items():
        table.add_row(name, *values)
    return table
