"""Types of command-line arguments, and the error for arguments that cannot be used."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)


class Unusable(ValueError):
    """Something that the user named cannot be used; the message is one line that says why."""


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"a whole number of {least} or more is needed, not {text!r}"
            )
        return int(text)

    return parse


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


def indices(text: str) -> list[int]:
    """A list of whole numbers from 0 on, as in ``0,1``; the same one may come twice."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"needs numbers, as in 0,1, not {text!r}")
    return [int(part) for part in parts]


def indices_by_rank(text: str) -> list[list[int]]:
    """Such a list for each rank, as in ``0;1`` or ``0,1;2,3``."""
    return [indices(part) for part in text.split(";")]


def one_line(error: BaseException) -> str:
    """The type and the message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
