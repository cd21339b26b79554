"""The table of programs: each by its name, with its story and with how it is judged."""

from __future__ import annotations

import functools
import importlib
import itertools
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

UNPATCHED = "as unpatched"
ALONE = "alone with the plugin"
OTHER_PROMPTS = "other prompts"
REFUSED = "refused"


class Program(NamedTuple):
    """One program: a function with its choices made."""

    run: Callable[[], Any]
    story: str
    reports: tuple[str, ...]
    judged: str


PROGRAMS: dict[str, Program] = {}
NOTES: dict[str, Any] = {}
"""What the program that runs says of itself beside what its user sees."""


def program(*reports: str, judged: str = UNPATCHED, **choices: Any) -> Callable[[Any], Any]:
    """The function is a program for each combination of `choices`, its arguments.

    `reports` are the public reports that it comes from. With the plugin each rank must see what it
    sees without it.
    """

    def add(function: Any) -> Any:
        for values in itertools.product(*choices.values()):
            said = [getattr(value, "__name__", str(value)) for value in values]
            name = ", ".join([function.__name__.replace("_", " "), *said])
            assert name not in PROGRAMS, name
            run = functools.partial(function, **dict(zip(choices, values, strict=True)))
            story = function.__doc__.splitlines()[0]
            PROGRAMS[name] = Program(run, story, reports, judged)
        return function

    return add


def alone_with_the_plugin(*reports: str, **choices: Any) -> Callable[[Any], Any]:
    """Unpatched stands still: the program gives what was seen, and what ought to be."""
    return program(*reports, judged=ALONE, **choices)


def other_prompts(*reports: str, **choices: Any) -> Callable[[Any], Any]:
    """Ranks are given different prompts: all see rank 0's tokens, and each is warned."""
    return program(*reports, judged=OTHER_PROMPTS, **choices)


def refused(*reports: str, **choices: Any) -> Callable[[Any], Any]:
    """Cannot be right by design: an error, the same on all ranks, and not a wrong token."""
    return program(*reports, judged=REFUSED, **choices)


def all_programs() -> dict[str, Program]:
    """The table, when each file of this folder has been imported."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"programs.{module.name}")
    return PROGRAMS
