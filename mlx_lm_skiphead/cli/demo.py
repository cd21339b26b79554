"""``mlx-lm-skiphead demo``: the same model with and without the plugin, on ranks of this machine.

Shows whether the tokens agree, what each rank did for them, and what that cost. Everything in
the table was measured in this run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import downloads
from .arguments import backend, pipeline_ranks, positive
from .ranks import RankFailed, interrupted_by_sigterm, local_ranks, rank_command, role

ROUNDS = 5
Result = dict[str, Any]


def add_command(commands: Any) -> None:
    """Add ``demo`` to the parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="run a model on ranks of this machine, without the plugin and with it, and compare",
        description="Starts ranks on this machine twice, without the plugin and with it, and "
        "prints whether the tokens agree, how many heads each rank ran per token, memory, what "
        "is left on disk, and time. With no argument it makes a small DeepSeek-V3-shaped model "
        "with random weights.",
        epilog="example: mlx-lm-skiphead demo --model ./my-model -n 3 --prompt 'Hello'",
    )
    parser.add_argument("--model", metavar="PATH_OR_REPO", help="a model that mlx-lm can pipeline")
    parser.add_argument(
        "-n", dest="ranks", type=pipeline_ranks, default=2, metavar="RANKS", help="(2)"
    )
    parser.add_argument(
        "--backend", type=backend, default="ring", metavar="B", help="of MLX: ring or mpi (ring)"
    )
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument(
        "--max-tokens", type=positive, default=24, metavar="N", help="tokens per generation (24)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code: 0 if all is right, 1 if tokens differ, workers run heads or a rank failed, 130
    after Ctrl-C."""
    console = Console()
    try:
        with interrupted_by_sigterm(), tempfile.TemporaryDirectory() as folder:
            model = arguments.model or _build(console, Path(folder))
            task = {
                "model": model,
                "prompt": arguments.prompt,
                "max_tokens": arguments.max_tokens,
                "timing_rounds": 0,
            }
            start = partial(_start, console, count=arguments.ranks, backend=arguments.backend)
            plain = start("without the plugin", task=task, plugin=False)
            task["timing_rounds"] = ROUNDS
            skip = start("with the plugin", task=task, plugin=True)
    except RankFailed as failure:
        console.print(f"[red]The demo could not run:[/] {escape(str(failure))}")
        return 1
    except KeyboardInterrupt:
        console.print("Stopped; all ranks have been ended.")
        return 130
    code = _report(console, plain, skip)
    if code == 0 and arguments.model is None:
        console.print(_summary(skip), highlight=False)
    return code


def _summary(skip: list[Result]) -> str:
    left = sum(sum(result["on_disk"].values()) for result in skip)
    return (
        f"So {len(skip)} ranks gave mlx-lm's own tokens while only rank 0 ran the head, and "
        f"{left / 1e6:.0f} MB of weights stayed on disk; next, let `mlx-lm-skiphead plan MODEL -n "
        f"{len(skip)}` say what that saves with your model, and with --bandwidth and --link on "
        "your machines."
    )


def _build(console: Console, folder: Path) -> str:
    with console.status("building a model with random weights (DeepSeek-V3's shape, 320 MB)"):
        subprocess.run(
            [sys.executable, "-m", "mlx_lm_skiphead.cli.demo_model", str(folder)],
            check=True,
            stdin=subprocess.DEVNULL,
        )
    return str(folder)


def _start(
    console: Console, title: str, *, count: int, task: dict[str, Any], plugin: bool, backend: str
) -> list[Result]:
    """Run `task` on ranks of this machine; their results in order of rank."""
    results: list[Result] = [{} for _ in range(count)]
    step = ""
    with (
        console.status(f"{count} ranks {title}: starting") as line,
        local_ranks(count, rank_command(task), plugin=plugin, backend=backend) as ranks,
    ):
        for rank, event in ranks.events():
            if "result" in event:
                results[rank] = event["result"]
            elif event.get("step") != step:
                step = event["step"]
                line.update(f"{count} ranks {title}: {step}")
                if not console.is_terminal:
                    console.print(f"{count} ranks {title}: {step}")
    return results


def _report(console: Console, plain: list[Result], skip: list[Result]) -> int:
    console.print(_work(plain, skip), _memory(plain, skip))
    console.print(f"The head is {skip[0]['head_bytes'] / 1e6:.0f} MB.")
    console.print(downloads.summary([result["downloads"] for result in plain]), highlight=False)
    times = skip[0]["ms_per_token"]
    if all(times.values()):
        ratios = [s / u for s, u in zip(times["skip"], times["unpatched"], strict=True)]
        console.print(
            f"ms per token on rank 0 in {ROUNDS} interleaved rounds, median (lowest to highest): "
            f"unpatched {_spread(times['unpatched'])}, skip {_spread(times['skip'])}, "
            f"skip / unpatched {_spread(ratios, 2)}. These ranks share the cores of one machine; "
            "equal machines gain little, see README.md."
        )
    return _compare(console, plain, skip)


def _work(plain: list[Result], skip: list[Result]) -> Table:
    table = Table(title=f"{len(skip)} ranks of one pipeline: unpatched → with the plugin")
    for column in ("rank", "role", "layers", "heads per token", "ms per token"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for rank, (before, after) in enumerate(zip(plain, skip, strict=True)):
        times = after["ms_per_token"].values()
        table.add_row(
            str(rank),
            role(rank, len(skip)),
            "{}-{}".format(after["layers"][0], after["layers"][1] - 1),
            f"{before['heads_per_token']:.2f} → {after['heads_per_token']:.2f}",
            " → ".join(f"{statistics.median(t):.1f}" if t else "?" for t in times),
        )
    return table


def _memory(plain: list[Result], skip: list[Result]) -> Table:
    table = Table(
        title="MB in memory after loading, left on disk, and at most while generating; "
        "seconds to load from cached files"
    )
    for column in ("rank", "role", "unpatched", "plugin", "on disk", "peak", "s to load"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for rank, (before, after) in enumerate(zip(plain, skip, strict=True)):
        table.add_row(
            str(rank),
            role(rank, len(skip)),
            f"{before['loaded_bytes'] / 1e6:.1f}",
            f"{after['loaded_bytes'] / 1e6:.1f}",
            f"{sum(after['on_disk'].values()) / 1e6:.1f}",
            f"{before['peak_bytes'] / 1e6:.0f} → {after['peak_bytes'] / 1e6:.0f}",
            f"{before['load_seconds']:.2f} → {after['load_seconds']:.2f}",
        )
    return table


def _spread(values: list[float], digits: int = 1) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _compare(console: Console, plain: list[Result], skip: list[Result]) -> int:
    """Every rank's tokens with the plugin must be rank 0's without it, and no worker run a head."""
    right = plain[0]
    console.print(f"text: {right['text']!r}", markup=False)
    wrong = [
        f"rank {rank}, {kind}: {result[kind]} where unpatched mlx-lm gives {right[kind]}"
        for kind in ("greedy", "seeded")
        for rank, result in enumerate(skip)
        if result[kind] != right[kind]
    ]
    if wrong:
        console.print("[red bold]Tokens differ.[/] Please report this:")
        for line in wrong:
            console.print(f"  {line}", markup=False)
        return 1
    if any(result["heads_per_token"] for result in skip[1:]):
        console.print("[red bold]Workers ran heads with the plugin on.[/]", skip[0]["refused"])
        return 1
    console.print(
        f"[green]Tokens agree[/]: {len(right['greedy'])} greedy and {len(right['seeded'])} at "
        f"temperature 0.8, on all {len(skip)} ranks, with and without the plugin."
    )
    return 0
