"""``mlx-lm-skiphead doctor``: whether the plugin works here, with this mlx-lm, model and ranks.

`examine` finds that out; this is the command, and its report as text.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import config
from .examination import examine
from .examination.ranks import NO_MPI
from .tables import table

Report = dict[str, Any]


def add_command(commands: Any) -> None:
    """Add ``doctor`` to the parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="check versions, families, loops, a model, patches of others, and all ranks",
        description="Checks whether the plugin works with the installed mlx-lm: versions, each "
        "family of models, each loop, patches of other packages, and a model of yours. Under "
        "mlx.launch or mpirun it also checks whether all ranks agree, and with --links measures "
        "their links. It loads no weights and uses no network but those links.",
        epilog="example: mlx.launch -n 2 --backend ring --env MLX_LM_SKIPHEAD=1 -- python -m "
        "mlx_lm_skiphead doctor --model ./my-model",
    )
    option = parser.add_argument
    option("--model", metavar="PATH_OR_REPO", help="a folder, or a hub repository in the cache")
    option(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this first, to see what it patches; may be repeated",
    )
    option(
        "--links",
        action="store_true",
        help="under mlx.launch or mpirun, send what a step sends, some hundred times, and measure "
        "each link; ends if nothing moves for half a minute",
    )
    option("--json", action="store_true", help="print one JSON document, and nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 1 if something that was asked for cannot work, by the variable or by
        ``--model``, or if ranks differ; 2 for wrong arguments.
    """
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
        return 0  # with 1, mpirun would kill rank 0, which prints the report and ends with 1
    return code


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep out what the plugin logs, which the report has, and what an import prints."""
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
    line = partial(console.print, soft_wrap=True)
    console.print(_versions(report))
    line(f"Python {report['python']} on {report['platform']}")
    backends = [name if has else f"no {name}" for name, has in report["backends"].items()]
    if backends:
        line(f"Distributed backends: {', '.join(backends)}.")
    value = report["variable"]
    setting = f"{config.VARIABLE} is not set" if value is None else f"{config.VARIABLE}={value}"
    line(f"{setting}: {_MEANING[report['mode']]}.")
    if report["families"]:
        console.print(_states("family", report["families"], report["unknown"]))
        console.print(_states("loop", report["loops"], {}))
    if report["patches"]:
        console.print(_patches(report["patches"]))
    model = report["model"]
    if model and model["supported"]:
        head = {"tied": "tied to the embedding", "own": "its own"}.get(model["head"], "unknown")
        line(
            f"The model {model['name']} is supported: {model['model_type']}, of the family "
            f"{model['family']}; head: {head}."
        )
    differences = report["differences"]
    if differences.keys() - {"variable"}:
        columns = ["", *(f"rank {rank}" for rank in range(len(report["ranks"])))]
        rows = ([name, *values] for name, values in differences.items())
        console.print(table("what differs", columns, rows, is_text=True))
    elif report["ranks"]:
        line(f"{len(report['ranks'])} ranks agree.")
    if report["links"]:
        _print_links(console, report["links"])
    for text in report["warnings"]:
        line(f"Warning: {text}", style="yellow")
    for text in report["problems"]:
        line(f"Problem: {text}", style="red")
    if not report["problems"] and not report["warnings"]:
        console.print("No problem was found.", style="green")
    if report["mode"] == "off" and not report["problems"]:
        line(f"To switch the plugin on, set {config.VARIABLE}=1 for all ranks.")


def _print_links(console: Console, links: Report) -> None:
    rows = (
        [
            "{} - {}".format(*link["between"]),
            *(f"{link[key]:.2f}" for key in ("latency_ms", "highest_ms")),
            *(f"{link[key]:.0f}" for key in ("there_mb_s", "back_mb_s")),
        ]
        for link in links["links"]
    )
    columns = ("ranks", "latency", "highest", "there", "back")
    console.print(table("links: ms one way, and MB/s each way", columns, rows))
    console.print(
        f"A step takes {links['step_ms']:.2f} ms on the links alone (median of {links['steps']}, "
        f"highest {links['highest_step_ms']:.2f}). A token takes at least that.",
        soft_wrap=True,
    )


def _versions(report: Report) -> Table:
    rows: list[list[str | Text]] = [["mlx-lm-skiphead", report["plugin"], "", ""]]
    for name, package in report["packages"].items():
        state = Text(package["problem"], "red") if package["problem"] else "ok"
        rows.append([name, package["version"] or "", package["needs"], state])
    return table("versions", ("", "version", "needed", ""), rows, is_text=True)


def _states(what: str, targets: dict[str, dict[str, str]], unknown: dict[str, str]) -> Table:
    found = [(name, target["state"], target["reason"]) for name, target in targets.items()]
    found += [(name, "unknown", f"pipelined by mlx-lm: {how}") for name, how in unknown.items()]
    rows: list[list[str | Text]] = []
    for name, state, reason in found:
        shown = Text("supported" if state == "patched" else state, _STYLES.get(state, ""))
        rows.append([name, shown, reason])
    columns = [what, "state", *(["why"] if any(reason for *_, reason in found) else [])]
    return table("", columns, (row[: len(columns)] for row in rows), is_text=True)


def _patches(patches: list[dict[str, str]]) -> Table:
    """One row for each package that patches in one way."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for patch in patches:
        how = ", ".join(filter(None, (patch["how"], patch["where"])))
        grouped.setdefault((patch["by"], how), []).append(patch["target"])
    rows = ((by, how, "\n".join(targets)) for (by, how), targets in grouped.items())
    return table("patches of other packages", ("by", "how", "what"), rows, is_text=True)
