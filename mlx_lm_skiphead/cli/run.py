"""``mlx-lm-skiphead run PROGRAM [ARGS...]``: runs a program as Python does, with the plugin on.

For programs to which no import can be added, such as mlx_lm.server: a module, or a script (a path).
It runs in this process: exit code, output and signals are its own. Each Python that it starts is
switched on too. MLX_LM_SKIPHEAD=hidden and MLX_LM_SKIPHEAD=0 have their usual effect.

Example: mlx.launch -n 2 --backend ring -- python -m mlx_lm_skiphead run mlx_lm.server --model PATH
--pipeline
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import signal
import sys
import threading
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config import SPLIT, VARIABLE, requested_mode
from .shared import Unusable, at_least, listed

CHILDREN = str(Path(__file__).with_name("children"))
"""The folder of the ``sitecustomize`` of child processes."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``run``."""
    option = parser.add_argument
    option("-m", dest="is_module", action="store_true", help="PROGRAM is a module, as for python")
    split = f"layers of rank 0, 1, ...: sets {SPLIT}"
    option("--split", type=listed(at_least(1)), metavar="A,...", help=split)
    option("program", metavar="PROGRAM", help="a module's name or a script's path")
    option("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its arguments")


def run(arguments: argparse.Namespace) -> int:
    """Run the program.

    Returns:
        The exit code: the program's own.

    Raises:
        Unusable: if there is no such module or script.
    """
    if arguments.split:
        os.environ[SPLIT] = ",".join(map(str, arguments.split))
    if VARIABLE in os.environ and requested_mode() == "off":
        print(f"{VARIABLE} is set to off, so mlx-lm-skiphead stays off", file=sys.stderr)
    else:
        _switch_on()
    name = arguments.program
    is_script = not arguments.is_module and (name.endswith(".py") or os.sep in name)
    sys.argv = [name, *arguments.arguments]
    sys.path[0] = str(Path(name).resolve().parent) if is_script else os.getcwd()
    if not (Path(name).exists() if is_script else _exists(name)):
        raise Unusable(f"there is no {'file' if is_script else 'module'} {name}")
    if is_script:
        runpy.run_path(name, run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


def _switch_on() -> None:
    """Switch the plugin on in this process and in each Python below it, and let errors end all."""
    from .. import install

    os.environ.setdefault(VARIABLE, "1")
    others = [path for path in _python_path() if path != CHILDREN]
    os.environ["PYTHONPATH"] = os.pathsep.join([CHILDREN, *others])
    install(requested_mode())
    logging.getLogger("mlx_lm_skiphead").addFilter(_end_where_ranks_differ)
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        sys.excepthook = _on_error_over_mpi


def _on_error_over_mpi(*error: Any) -> None:
    """A `sys.excepthook`: exit at once, so that mpirun ends the other ranks.

    Otherwise the process waits in MPI_Finalize for the other ranks, and they wait for it.
    """
    sys.__excepthook__(*error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _end_where_ranks_differ(record: logging.LogRecord) -> bool:
    """A filter of the plugin's log: where a thread finds that the ranks differ, this process ends.

    The error in that thread would not end it: mlx_lm.server catches it, and goes on with errors.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if record.levelno == logging.CRITICAL and not in_main:
        print(record.getMessage(), file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
    return True


def in_the_way() -> str:
    """The file of another ``sitecustomize`` that comes before that of `run`, or ""."""
    found = PathFinder.find_spec("sitecustomize", _python_path())
    if CHILDREN not in _python_path() or found is None or found.origin is None:
        return ""
    return "" if Path(found.origin).parent == Path(CHILDREN) else found.origin


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
