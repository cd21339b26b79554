"""``mlx-lm-skiphead demo``: a `bench` on this machine that also answers a sentence.

Without ``--model`` it makes a small model of DeepSeek-V3's shape with random weights. It prints how
many heads each rank ran for a token, whether the tokens of the answers agree, and what `bench`
prints: times, memory, and what is left on disk.

Example: mlx-lm-skiphead demo --model ./my-model -n 3 --prompt 'Hello'
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from . import bench, demo_model, downloads
from .arguments import at_least, new_command
from .ranks import WAYS, role
from .tables import both, table

Result = dict[str, Any]


def add_command(commands: Any) -> None:
    """Add ``demo`` to the parser's subcommands."""
    summary = "run a model on ranks of this machine, without the plugin and with it, and compare"
    parser = new_command(commands, run, __doc__, summary)
    option = parser.add_argument
    option("--model", metavar="PATH_OR_REPO", help="a model that mlx-lm can pipeline")
    option("-n", dest="ranks", type=at_least(2), default=2, metavar="N", help="ranks (2)")
    option("--backend", choices=("ring", "mpi"), default="ring", help="of MLX (ring)")
    sentence, size = "What is the capital of France?", at_least(1)
    option("--prompt", dest="text", default=sentence, help="(%(default)s)")
    tokens = "tokens of an answer (24)"
    option("--max-tokens", dest="tokens", type=size, default=24, metavar="N", help=tokens)
    as_bench = {"batch": [1], "prompt": [8], "rounds": 7}
    parser.set_defaults(hostfile=None, starting_port=0, gpus=None, **as_bench)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit code: as `bench.run`; also 1 if the tokens of answers differ or workers run heads.

    Raises:
        Unusable: if the model cannot be used.
    """
    console = Console(highlight=False)
    is_random = arguments.model is None
    with tempfile.TemporaryDirectory() as folder:
        if is_random:
            arguments.model = folder
            with console.status("building a model with random weights (330 MB)"):
                demo_model.write(Path(folder))
        told, code = bench.measure(arguments)
    results: list[Result] = told["memory"]
    if not all(results):
        return code
    told["model"] = "DeepSeek-V3's shape, random weights" if is_random else arguments.model
    rows = []
    for rank, result in enumerate(results):
        first, end = result["layers"]
        heads = {way: result["answers"][way]["heads_per_token"] for way in WAYS}
        rows.append([str(rank), role(rank, len(results)), f"{first}-{end - 1}", both(heads, 2)])
    title = f"a head of {results[0]['head_bytes'] / 1e6:.0f} MB: unpatched → plugin"
    console.print(table(title, ("rank", "role", "layers", "heads per token"), rows))
    bench.report(console, told)
    console.print(downloads.summary([result["downloads"] for result in results]))
    code = _compare(console, results) or code
    left = sum(sum(result["on_disk"].values()) for result in results)
    if code == 0 and is_random:
        console.print(
            f"So {len(results)} ranks gave the tokens of mlx-lm while only rank 0 ran the head, "
            f"and {left / 1e6:.0f} MB of weights stayed on disk. These ranks share the cores of "
            "one machine: between equal machines the plugin gains little time, see README.md. "
            f"`mlx-lm-skiphead plan MODEL -n {len(results)}` says what it saves with your model."
        )
    return code


def _compare(console: Console, results: list[Result]) -> int:
    """Compare tokens and heads. With the plugin each rank must have the tokens that rank 0 has
    without it, and no worker may run a head."""
    unpatched, plugin = ([result["answers"][way] for result in results] for way in WAYS)
    right = unpatched[0]
    console.print(f"text: {right['text']!r}", markup=False)
    wrong = [
        f"rank {rank}, {kind}: {answer[kind]} where unpatched mlx-lm gives {right[kind]}"
        for kind in ("greedy", "seeded")
        for rank, answer in enumerate(plugin)
        if answer[kind] != right[kind]
    ]
    if any(answer["heads_per_token"] for answer in plugin[1:]):
        wrong.append("workers ran heads with the plugin on")
    for line in wrong:
        console.print(f"Please report this: {line}", style="red", markup=False)
    if not wrong:
        console.print(
            f"[green]Answers agree[/]: {len(right['greedy'])} greedy tokens and "
            f"{len(right['seeded'])} at temperature 0.8, on all {len(plugin)} ranks, with and "
            "without the plugin."
        )
    return 1 if wrong else 0
