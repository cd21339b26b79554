"""Who calls: for what may have been imported by name before the plugin, and so is not wrapped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType


def caller(module: str, *functions: str) -> FrameType | None:
    """The frame of code of `module` that the caller of this is called by, if it is.

    Args:
        module: its name; also where it runs as ``__main__``.
        functions: the names of the functions that are looked for; without any, all.
    """
    for frame in _frames(sys._getframe(2)):
        if _module(frame) == module and (not functions or frame.f_code.co_name in functions):
            return frame
    return None


def is_called_by(module: str, *through: str) -> bool:
    """Whether the caller of this is called by `module`, with code of some packages in between only.

    Args:
        module: its name.
        through: the names with which the modules in between may begin.
    """
    for frame in _frames(sys._getframe(2)):
        name = _module(frame)
        if name == module:
            return True
        if not name.startswith(through):
            return False
    return False


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    """The name of the module of the code that runs in `frame`."""
    # By its spec: a module that is run has another name.
    spec = frame.f_globals.get("__spec__")
    return str(getattr(spec, "name", "") or frame.f_globals.get("__name__", ""))
