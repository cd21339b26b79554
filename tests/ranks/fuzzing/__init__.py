"""The fuzzer's parts: programs as strategies and ranks that stay up, for fuzz.py; the rest is run
by the ranks, for rank_fuzz.py, and needs no hypothesis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BOTH = ["unpatched", "plugin"]
CHANGING = ("dtype", "adapter", "quantize", "new_head")
"""Steps that change a model."""


def write(file: Path, value: Any) -> None:
    """Writes a file for the other side to read: all of it, or nothing yet."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value), encoding="utf-8")
    part.replace(file)
