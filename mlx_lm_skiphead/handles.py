"""One patch: what it is, how it is put in place with wrapt, and how it is taken out again.

Knows nothing of mlx-lm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
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
    """What it belongs to: the patches of a group are put in place together or not at all."""
    module: str
    """Where the target is: a module ..."""
    path: str
    """... and an attribute path in it."""
    wrapper: Wrapper
    needs: Callable[[Any], str]
    """Is given the target; says what was expected and what was found, or ""."""
    lost: str
    """What is lost where it cannot be put in place."""


class Handle(NamedTuple):
    """A patch that is in place: `wrapper` sits at ``owner.attribute``."""

    owner: Any
    attribute: str
    wrapper: Any

    @property
    def name(self) -> str:
        named = getattr(self.owner, "__qualname__", getattr(self.owner, "__name__", ""))
        return f"{named}.{self.attribute}"


class _Wrapped(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    """A wrapper that is pickled as what it wraps is: by name."""

    def __reduce_ex__(self, protocol: Any) -> str:
        name: str = self.__wrapped__.__qualname__
        return name


def locate(root: Any, path: str) -> tuple[Any, str]:
    """The object that has the last attribute of `path`, and the name of that attribute."""
    parents, _, attribute = path.rpartition(".")
    return (attrgetter(parents)(root) if parents else root), attribute


def wrap(root: Any, path: str, wrapper: Wrapper) -> Handle:
    """Wrap ``root.path``; what a class inherits is wrapped for that class only."""
    owner, attribute = locate(root, path)
    return Handle(owner, attribute, wrapt.wrap_object(owner, attribute, _Wrapped, (wrapper,)))


def layers(function: Any) -> Iterator[Any]:
    """`function` and what it wraps, as far as each layer can call the next.

    ``functools.wraps`` marks a function as a wrapper even if it never calls what it replaces.
    """
    while function is not None:
        yield function
        inner = getattr(function, "__wrapped__", None)
        function = inner if inner is not None and _can_call(function, inner) else None


def _can_call(outer: Any, inner: Any) -> bool:
    if type(outer) is not FunctionType:
        return True
    held: list[Any] = [*(outer.__defaults__ or ()), *(outer.__kwdefaults__ or {}).values()]
    for cell in outer.__closure__ or ():
        with suppress(ValueError):  # it is empty
            held.append(cell.cell_contents)
    held += [outer.__globals__.get(name) for name in outer.__code__.co_names]
    return any(thing is inner for thing in held)


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


def in_place(handle: Handle) -> bool:
    """Whether a call of the target still reaches the wrapper."""
    return any(
        # A wrapper made with functools.wraps has our wrapper as bound to the class below it.
        layer is handle.wrapper or getattr(layer, "_self_parent", None) is handle.wrapper
        for layer in layers(vars(handle.owner).get(handle.attribute))
    )


def undo(handle: Handle) -> bool:
    """Take the patch out; False if another package's wrapper above it prevents that."""
    with suppress(wrapt.WrapperNotOutermostError):
        wrapt.unwrap_object(handle.owner, handle.attribute, handle.wrapper, missing_ok=True)
    return not in_place(handle)
