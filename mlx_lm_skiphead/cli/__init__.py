"""The command line, ``mlx-lm-skiphead`` or ``python -m mlx_lm_skiphead``: one module a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..config import deadline_seconds, fetches_all, layers_by_rank, requested_mode, watch_seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) names; its exit code."""
    from . import bench, demo, doctor, plan, run
    from .shared import Unusable, add_command

    parser = argparse.ArgumentParser(
        prog="mlx-lm-skiphead",
        description="Pipeline-parallel mlx-lm without the output head on ranks that do not sample.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (demo, doctor, run, plan, bench):
        add_command(commands, module)
    arguments = parser.parse_args(argv)
    try:
        for setting in (watch_seconds, deadline_seconds, fetches_all, layers_by_rank):
            setting()  # of which each raises where it is not understood
        if arguments.run is not doctor.run:  # which reports it among the rest
            requested_mode()
    except ValueError as error:
        print(f"mlx-lm-skiphead: {error}", file=sys.stderr)
        return 2
    try:
        return int(arguments.run(arguments))
    except Unusable as error:
        print(f"mlx-lm-skiphead {arguments.command}: {error}", file=sys.stderr)
        return 2
