"""What commands share: types of arguments, the error for what cannot be used, and tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rich.table import Table

T = TypeVar("T")


class Unusable(ValueError):
    """Something that the user named cannot be used; the message is one line that says why."""


def new_command(
    commands: Any, run: Callable[[argparse.Namespace], int], document: str, summary: str
) -> argparse.ArgumentParser:
    """A new subcommand, named by the last part of the module of its `run`.

    Args:
        commands: the subcommands of a parser.
        run: runs it, and returns the exit code.
        document: of the module. Its last paragraph is an example.
        summary: a line for the list of commands.
    """
    description, _, example = document.replace("`", "").strip().rpartition("\n\n")
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


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], is_text: bool = False
) -> Table:
    """A table of `rows`. Columns are aligned to the right, or to the left if they have text."""
    made = Table(title=title)
    for column in columns:
        made.add_column(column, justify="left" if is_text or column == "role" else "right")
    for row in rows:
        made.add_row(*row)
    return made


def both(by_way: Mapping[str, float], digits: int = 1, unit: float = 1.0) -> str:
    """The value without the plugin and the one with it: ``"254.9 → 141.6"``."""
    return " → ".join(f"{by_way[way] / unit:,.{digits}f}" for way in ("unpatched", "plugin"))
