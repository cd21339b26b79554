"""What commands share: types of arguments, and the error for what cannot be used."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Unusable(ValueError):
    """Something that the user named cannot be used; the message is one line that says why."""


def new_command(
    commands: Any, run: Callable[[argparse.Namespace], int], document: str
) -> argparse.ArgumentParser:
    """A new subcommand, named by the last part of the module of its `run`.

    Args:
        commands: the subcommands of a parser.
        run: runs it, and returns the exit code.
        document: of the module. After the colon of its first line is the summary for the list of
            commands, and its last paragraph is an example.
    """
    description, _, example = document.replace("`", "").strip().rpartition("\n\n")
    summary = description.partition(".\n\n")[0].partition(": ")[2]
    parser: argparse.ArgumentParser = commands.add_parser(
        run.__module__.rpartition(".")[2], help=summary, description=description, epilog=example
    )
    parser.set_defaults(run=run)
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            wanted = f"a whole number of {least} or more"
            raise argparse.ArgumentTypeError(f"{wanted} is needed, not {text!r}")
        return int(text)

    return parse


def above_0(text: str) -> float:
    """A number above 0, and finite."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, not {text!r}")
    return number


def listed(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A list of what `parse` takes, as in ``8,4,4``."""
    return lambda text: [parse(part) for part in text.split(",")]


def one_line(error: BaseException) -> str:
    """The type and the message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
