"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str | Text]], is_text: bool = False
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
