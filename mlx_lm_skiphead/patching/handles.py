"""One patch: what it is, how it is put in place with wrapt, and how it is taken out again.

Knows nothing of mlx-lm.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple

import wrapt

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""As wrapt calls it: with the wrapped function, its instance, and the arguments of the call."""


class Patch(NamedTuple):
    """A row of the table of patches."""

    group: str
    """The name of its group; the patches of a group are put in place together or not at all."""
    module: str
    """The module that has the target."""
    path: str
    """The attribute path of the target in that module."""
    wrapper: Any
    """A `Wrapper` of the target; or a data descriptor, for an attribute of a class's instances."""
    needs: Callable[[Any], str]
    """A check of the target: gives "", or a message with what was expected and what was found."""
    lost: str
    """The consequence of leaving the target unpatched."""
    base: str = ""
    """The group without which this one is of no use."""

    def locate(self) -> tuple[Any, str]:
        """The object that has the target, and the attribute of it that the target is."""
        parents, _, attribute = self.path.rpartition(".")
        module = sys.modules[self.module]
        return (attrgetter(parents)(module) if parents else module), attribute

    def refusal(self) -> str:
        """Why the target is not as the patch needs it, or ""."""
        try:
            owner, attribute = self.locate()
            absent = None if self.is_descriptor else AttributeError
            reason = self.needs(getattr(owner, attribute, *([] if absent else [None])))
        except AttributeError as error:
            reason = f"expected {self.path}, found none ({error})"
        return f"{self.module}.{self.path}: {reason}; {self.lost}" if reason else ""

    @property
    def is_descriptor(self) -> bool:
        return hasattr(self.wrapper, "__set__")


class Handle:
    """A patch that has been put in place; what a class inherits is wrapped for that class only."""

    def __init__(self, row: Patch) -> None:
        self.row = row
        self._owner, self._attribute = row.locate()
        self._is_on = True
        if row.is_descriptor:
            self._layer = row.wrapper
            setattr(self._owner, self._attribute, row.wrapper)
        else:
            # Another package's wrapper above it can keep the layer in place: it does nothing then.
            wrapper = (row.wrapper, lambda: self._is_on)
            self._layer = wrapt.wrap_object(self._owner, self._attribute, _Wrapped, wrapper)

    def __str__(self) -> str:
        return f"{self.row.module}.{self.row.path}"

    def displaced_by(self) -> str:
        """A sentence about what has displaced this patch, or "" while it is still in place.

        For information only: another package's function on top may call the patch or not. One
        without ``__wrapped__`` looks like a replacement even if it calls the patch.
        """
        try:
            owner, attribute = self.row.locate()
        except AttributeError as error:
            return str(error)
        if owner is not self._owner:
            return f"{self.row.module} has been loaded anew"
        current = vars(owner).get(attribute)
        if self._is_on and self._is_below(current):
            return ""
        return f"{self} has been replaced by something of {written_in(current)}"

    def _is_below(self, current: Any) -> bool:
        # A wrapper made with functools.wraps has our wrapper as bound to the class below it.
        return wrapt.is_wrapped_by(
            current,
            predicate=lambda layer: (
                layer is self._layer or getattr(layer, "_self_parent", None) is self._layer
            ),
        )

    def undo(self) -> bool:
        """Take the patch out; False if another package's wrapper above it prevents that."""
        if self.row.is_descriptor:
            if vars(self._owner).get(self._attribute) is self._layer:
                delattr(self._owner, self._attribute)
        else:
            with suppress(wrapt.WrapperNotOutermostError):
                wrapt.unwrap_object(self._owner, self._attribute, self._layer, missing_ok=True)
        is_out = bool(self.displaced_by())
        self._is_on = False
        return is_out


class _Wrapped(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    """A wrapper that is pickled as what it wraps is: by name."""

    def __reduce_ex__(self, protocol: Any) -> str:
        name: str = self.__wrapped__.__qualname__
        return name


def written_in(layer: Any) -> str:
    """The module that the code of a function or a wrapper comes from, as well as it can be known.

    Not ``__module__``, which functools.wraps copies from what is wrapped.
    """
    # A wrapper around ``Class.method`` has wrapt's bound form of what sits there.
    if isinstance(layer, wrapt.FunctionWrapper | wrapt.BoundFunctionWrapper):
        layer = layer._self_wrapper
    layer = getattr(layer, "__func__", layer)  # of a method
    while type(layer) is functools.partial:
        layer = layer.func
    if type(layer) is FunctionType:
        return str(layer.__globals__.get("__name__", layer.__module__))
    if type(layer).__module__ in ("builtins", "nanobind"):
        return str(getattr(layer, "__module__", "") or "builtins")
    return type(layer).__module__
