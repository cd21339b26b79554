"""``mlx-lm-skiphead run MODULE [ARGS...]``: as ``python -m MODULE``, with the plugin on.

For what has no line in which the plugin could be imported, such as ``mlx_lm.server``. It is the
module itself that runs, in this process: its exit code, output and signals are its own.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import VARIABLE, requested_mode


def add_command(commands: Any) -> None:
    """Add ``run`` to the parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "run",
        help="run a module or a script with the plugin on, as python -m would",
        description="Runs a module (mlx_lm.server) or a script (a path that ends in .py) as python "
        f"does, with the plugin on. {VARIABLE}=hidden is heeded; so is {VARIABLE}=0.",
        epilog="example: mlx.launch -n 2 --backend ring -- python -m mlx_lm_skiphead "
        "run mlx_lm.server --model PATH --pipeline",
    )
    parser.add_argument("module", metavar="MODULE", help="a module's name or a script's path")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code: the module's own; 2 if there is no such module or script."""
    from .. import install

    if VARIABLE in os.environ and requested_mode() == "off":
        print(f"{VARIABLE} is set to off, so mlx-lm-skiphead stays off", file=sys.stderr)
    else:
        os.environ.setdefault(VARIABLE, "1")  # also for processes that the module starts
        install(requested_mode())
    name = arguments.module
    sys.argv = [name, *arguments.arguments]
    if name.endswith(".py"):
        if not Path(name).is_file():
            print(f"mlx-lm-skiphead run: there is no file {name}", file=sys.stderr)
            return 2
        sys.path[0] = str(Path(name).resolve().parent)
        with _error_ends_all_ranks():
            runpy.run_path(name, run_name="__main__")
        return 0
    sys.path[0] = os.getcwd()
    if not _exists(name):
        print(f"mlx-lm-skiphead run: there is no module {name}", file=sys.stderr)
        return 2
    with _error_ends_all_ranks():
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


@contextmanager
def _error_ends_all_ranks() -> Iterator[None]:
    """Over MPI leave at once after an error, so that mpirun ends the other ranks.

    A process that ends as usual waits in MPI_Finalize for the others, which wait for it.
    """
    try:
        yield
    except Exception:
        if "OMPI_COMM_WORLD_RANK" not in os.environ:
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _exists(module: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
