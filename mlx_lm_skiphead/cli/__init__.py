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
    from .shared import Unusable

    parser = argparse.ArgumentParser(
        prog="mlx-lm-skiphead",
        description="Pipeline-parallel mlx-lm without the output head on ranks that do not sample.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (demo, doctor, run, plan, bench):
        command.add_command(commands)
    arguments = parser.parse_args(argv)
    try:
        watch_seconds()
        deadline_seconds()
        fetches_all()
        layers_by_rank()
        if arguments.run is not doctor.run:  # which reports it among the rest
            requested_mode()
    except ValueError as error:
        print(f"mlx-lm-skiphead: {error}", file=sys.stderr)
        return 2
    try:
        code: int = arguments.run(arguments)
    except Unusable as error:
        print(f"mlx-lm-skiphead {arguments.command}: {error}", file=sys.stderr)
        return 2
    return code
