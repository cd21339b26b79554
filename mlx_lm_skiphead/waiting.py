"""Waits for mlx-lm: until a program imports it, being switched on costs next to nothing.

Installing imports wrapt and a good part of the standard library, some 50 ms on a slow machine: not
for each Python that starts where the variable is set.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as typing's, without importing typing
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .config import Mode


class _Finder:
    """Finds no module; its turn is before any other finder's, and tells that mlx-lm is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> None:
        if name == "mlx_lm":
            end()


_mode: Mode = "off"
_finder = _Finder()


def begin(mode: Mode) -> None:
    """Install with `mode` when mlx-lm is imported; now, if it is already."""
    global _mode
    _mode = mode
    if "mlx_lm" in sys.modules:
        end()
    else:
        sys.meta_path.insert(0, _finder)


def end() -> None:
    """Install now, if that has been waited for."""
    global _mode
    mode, _mode = _mode, "off"
    if mode != "off":
        from .patching import install

        # The finder stays, and does nothing: Python may be going through the list of them.
        install(mode)
