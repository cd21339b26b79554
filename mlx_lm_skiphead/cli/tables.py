"""How commands print: one JSON document, or tables of numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


def show(as_json: bool, told: dict[str, Any], report: Callable[[Console, Any], None]) -> None:
    """Print what a command has found: as one JSON document, or as its `report` prints it."""
    if as_json:
        print(json.dumps(told, indent=2, default=str))  # paths
    else:
        report(Console(markup=False, highlight=False), told)


def table(title: str, rows: Sequence[Mapping[str, str]], is_text: bool = False) -> Table:
    """A table of `rows`, each the cells by column. A column without any text is left out.

    Columns are aligned to the right, or to the left if they have text.
    """
    made = Table(title=title)
    columns = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    for column in columns:
        justify: Literal["left", "right"] = "left" if is_text or column == "role" else "right"
        made.add_column(column, justify=justify, overflow="fold")  # no digit is left out
    for row in rows:
        made.add_row(*(row[column] for column in columns))
    return made


def digits(value: float) -> str:
    """A number as tables have it: ``"0.25"``, ``"12.5"``, ``"1,234.5"``."""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}"


def both(by_way: Mapping[str, float], unit: float = 1.0) -> str:
    """The value without the plugin and the one with it: ``"254.9 → 141.6"``."""
    return " → ".join(digits(by_way[way] / unit) for way in ("unpatched", "plugin"))


def commas(numbers: Iterable[int]) -> str:
    """Whole numbers as options take them: ``"8,4,4"``."""
    return ",".join(map(str, numbers))
