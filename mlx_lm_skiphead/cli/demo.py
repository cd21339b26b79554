"""``mlx-lm-skiphead demo``: runs a model without the plugin and with it, on this machine.

Prints whether the tokens agree, how many heads each rank ran for a token, memory and time. All of
that is measured in the run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from . import downloads
from .arguments import Unusable, at_least
from .bench import STOPPED, listen, memory_table, of_case, report_times
from .ranks import WAYS, RankFailed, Ranks, interrupted_by_sigterm, mpi_ranks, rank_command, role
from .tables import both, table

ROUNDS = 7
BATCH, PROMPT = 1, 8
Result = dict[str, Any]


def add_command(commands: Any) -> None:
    """Add ``demo`` to the parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="run a model on ranks of this machine, without the plugin and with it, and compare",
        description="Starts ranks on this machine, runs a model without the plugin and with it, "
        "and prints whether the tokens agree, how many heads each rank ran per token, memory, "
        "what is left on disk, and time. Without --model it makes a small model of "
        "DeepSeek-V3's shape with random weights.",
        epilog="example: mlx-lm-skiphead demo --model ./my-model -n 3 --prompt 'Hello'",
    )
    option = parser.add_argument
    option("--model", metavar="PATH_OR_REPO", help="a model that mlx-lm can pipeline")
    option("-n", dest="ranks", type=at_least(2), default=2, metavar="N", help="ranks (2)")
    option("--backend", choices=("ring", "mpi"), default="ring", help="of MLX (ring)")
    option("--prompt", default="What is the capital of France?", help="(%(default)s)")
    option(
        "--max-tokens", type=at_least(1), default=24, metavar="N", help="tokens of an answer (24)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 1 if tokens differ, workers run heads or a rank failed; 130 after Ctrl-C.
    """
    console = Console(highlight=False)
    count = arguments.ranks
    results: list[Any] = [None] * count
    measured: list[dict[str, Any]] = []
    try:
        with interrupted_by_sigterm(), tempfile.TemporaryDirectory() as folder:
            task = {
                "model": arguments.model or _build(console, Path(folder)),
                "cases": [(BATCH, PROMPT)],
                "tokens": arguments.max_tokens,
                "rounds": ROUNDS,
                "prompt": arguments.prompt,
            }
            is_mpi = arguments.backend == "mpi"
            ranks = mpi_ranks(count, task, None) if is_mpi else Ranks(count, rank_command(task))
            listen(ranks, results, measured, console)
    except (RankFailed, Unusable) as failure:
        console.print(f"[red]The demo could not run:[/] {escape(str(failure))}")
        return 1
    except KeyboardInterrupt:
        console.print(STOPPED)
        return 130
    _report(console, results, measured)
    code = _compare(console, results)
    if code == 0 and arguments.model is None:
        console.print(_summary(results))
    return code


def _build(console: Console, folder: Path) -> str:
    with console.status("building a model with random weights (DeepSeek-V3's shape, 320 MB)"):
        subprocess.run(
            [sys.executable, "-m", "mlx_lm_skiphead.cli.demo_model", str(folder)],
            check=True,
            stdin=subprocess.DEVNULL,
        )
    return str(folder)


def _report(console: Console, results: list[Result], measured: list[dict[str, Any]]) -> None:
    rows = []
    for rank, result in enumerate(results):
        first, end = result["layers"]
        heads = {way: result["answers"][way]["heads_per_token"] for way in WAYS}
        rows.append([str(rank), role(rank, len(results)), f"{first}-{end - 1}", both(heads, 2)])
    title = f"{len(results)} ranks of one pipeline: unpatched → plugin"
    console.print(table(title, ("rank", "role", "layers", "heads per token"), rows))
    console.print(memory_table(results))
    console.print(f"The head is {results[0]['head_bytes'] / 1e6:.0f} MB.")
    console.print(downloads.summary([result["downloads"] for result in results]))
    case = of_case(BATCH, PROMPT, measured)
    if case["ratio"]:  # not with one token
        report_times(console, [case])
        console.print(
            "These ranks share the cores of one machine. Between equal machines the plugin gains "
            "little time, see README.md."
        )


def _compare(console: Console, results: list[Result]) -> int:
    """Compare tokens and heads. With the plugin each rank must have the tokens that rank 0 has
    without it, and no worker may run a head."""
    unpatched, skip = ([result["answers"][way] for result in results] for way in WAYS)
    right = unpatched[0]
    console.print(f"text: {right['text']!r}", markup=False)
    wrong = [
        f"rank {rank}, {kind}: {answer[kind]} where unpatched mlx-lm gives {right[kind]}"
        for kind in ("greedy", "seeded")
        for rank, answer in enumerate(skip)
        if answer[kind] != right[kind]
    ]
    if wrong:
        console.print("[red bold]Tokens differ.[/] Please report this:")
        for line in wrong:
            console.print(f"  {line}", markup=False)
        return 1
    if any(answer["heads_per_token"] for answer in skip[1:]):
        console.print("[red bold]Workers ran heads with the plugin on.[/] Please report this.")
        return 1
    console.print(
        f"[green]Tokens agree[/]: {len(right['greedy'])} greedy and {len(right['seeded'])} at "
        f"temperature 0.8, on all {len(skip)} ranks, with and without the plugin."
    )
    return 0


def _summary(results: list[Result]) -> str:
    count, left = len(results), sum(sum(result["on_disk"].values()) for result in results)
    return (
        f"So {count} ranks gave the tokens of mlx-lm while only rank 0 ran the head, and "
        f"{left / 1e6:.0f} MB of weights stayed on disk. Next, `mlx-lm-skiphead plan MODEL -n "
        f"{count}` says what that saves with your model; --bandwidth and --link describe your "
        "machines."
    )
