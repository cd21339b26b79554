"""What the parts of an examination share."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]
"""See `examine`."""


class WrongArgument(ValueError):
    """Of the command line; the message says what is wrong."""


def line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
