"""What commands share: types of arguments, and the error for what cannot be used."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


class Unusable(ValueError):
    """Something that the user named cannot be used; the message is one line that says why."""


def add_command(commands: Any, module: ModuleType) -> None:
    """Add a module's command, which is named like it, to the subcommands of a parser.

    The module has `add_options`, and `run`, which returns the exit code. Of its docstring, what
    follows the first colon is the summary in the list of commands, and the last paragraph is an
    example.
    """
    document = (module.__doc__ or "").replace("`", "").strip()
    description, _, example = document.rpartition("\n\n")
    summary = description.partition(".\n\n")[0].partition(": ")[2]
    name = module.__name__.rpartition(".")[2]
    parser = commands.add_parser(name, help=summary, description=description, epilog=example)
    parser.set_defaults(run=module.run)
    module.add_options(parser)


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return parse


def above_0(text: str) -> float:
    """A number above 0, and finite."""
    with suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no finite number above 0")


def listed(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A list of what `parse` takes, as in ``8,4,4``."""
    return lambda text: [parse(part) for part in text.split(",")]


def one_line(error: BaseException) -> str:
    """The type and the message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
