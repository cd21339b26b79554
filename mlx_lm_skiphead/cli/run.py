"""``mlx-lm-skiphead run MODULE [ARGS...]``: runs ``python -m MODULE`` with the plugin on.

For modules to which no import can be added, such as ``mlx_lm.server``. The module runs in this
process: exit code, output and signals are its own.
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
        help="run a module or a script with the plugin on",
        description="Runs a module (mlx_lm.server) or a script (a path that ends in .py) as python "
        f"does, with the plugin on. {VARIABLE}=hidden and {VARIABLE}=0 have their usual effect.",
        epilog="example: mlx.launch -n 2 --backend ring -- python -m mlx_lm_skiphead "
        "run mlx_lm.server --model PATH --pipeline",
    )
    parser.add_argument("module", metavar="MODULE", help="a module's name or a script's path")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the module.

    Returns:
        The exit code: the module's own; 2 if there is no such module or script.
    """
    from .. import install

    if VARIABLE in os.environ and requested_mode() == "off":
        print(f"{VARIABLE} is set to off, so mlx-lm-skiphead stays off", file=sys.stderr)
    else:
        os.environ.setdefault(VARIABLE, "1")  # also for processes that the module starts
        install(requested_mode())
    name = arguments.module
    sys.argv = [name, *arguments.arguments]
    is_script = name.endswith(".py")
    sys.path[0] = str(Path(name).resolve().parent) if is_script else os.getcwd()
    if not (Path(name).is_file() if is_script else _exists(name)):
        kind = "file" if is_script else "module"
        print(f"mlx-lm-skiphead run: there is no {kind} {name}", file=sys.stderr)
        return 2
    with _error_ends_all_ranks():
        if is_script:
            runpy.run_path(name, run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


@contextmanager
def _error_ends_all_ranks() -> Iterator[None]:
    """Over MPI, exit at once after an error, so that mpirun ends the other ranks.

    Otherwise the process waits in MPI_Finalize for the other ranks, and they wait for it.
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
