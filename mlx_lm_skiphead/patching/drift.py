"""Does a function of the installed mlx-lm look as a patch needs it? Says what differs if not.

Looks at code, runs nothing. Each check is made for one row of a table of patches
(`handles.Patch.needs`): it is given the function and gives "" or a message with what was expected
and what was found.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import wrapt

Needs = Callable[[Any], str]


def anything(function: Any) -> str:
    """For a patch that relies on no more than that its target can be called."""
    return "" if callable(function) else f"expected a function, found {function!r}"


def nothing(target: Any) -> str:
    """For a descriptor that takes the place of no attribute of the class."""
    return "" if target is None else f"expected no such attribute of the class, found {target!r}"


def signature(*parameters: str, is_generator: bool = False) -> Needs:
    """`parameters`, by name; and with `is_generator` a generator function."""

    def check(function: Any) -> str:
        has = list(inspect.signature(function).parameters)
        if missing := [name for name in parameters if name not in has]:
            return f"expected parameters {', '.join(missing)}, found {', '.join(has)}"
        code = code_of(function)
        if is_generator and not (code and code.co_flags & inspect.CO_GENERATOR):
            return f"expected a generator function, found {_described(function)}"
        return ""

    return check


def uses(*reads: str, assigns: str = "") -> Needs:
    """Code that reads the attributes `reads`, and assigns one, once."""

    def check(function: Any) -> str:
        if missing := [name for name in reads if not mentions(function, name)]:
            return f"expected it to use {', '.join(missing)}, found {_described(function)}"
        if assigns and (count := mentions(function, assigns, ("STORE_ATTR",))) != 1:
            return f"expected one assignment of {assigns}, found {count} in {_described(function)}"
        return ""

    return check


def broadcasts(function: Any) -> str:
    """A pipelined model's ``__call__``: the hidden broadcast, and behind it the final norm."""
    count = mentions(function, "all_gather")
    if count != 1:
        found = f"found {count} in {_described(function)}"
        return f"expected one call of all_gather, the hidden broadcast, {found}"
    if not mentions(function, "norm"):
        return f"expected it to use norm, found {_described(function)}"
    return ""


def runs_head(function: Any) -> str:
    """The ``__call__`` of the class that has the head."""
    if mentions(function, "lm_head") or mentions(function, "as_linear"):
        return ""
    return f"expected it to use lm_head or as_linear, found neither in {_described(function)}"


def is_pipelined(module: ModuleType) -> bool:
    """Whether this mlx-lm can pipeline the models of `module` at all; older ones can fewer."""
    classes = (cls for cls in vars(module).values() if inspect.isclass(cls))
    return any(hasattr(cls, "pipeline") for cls in classes if cls.__name__ != "PipelineMixin")


def code_of(function: Any) -> CodeType | None:
    """The code that a call of `function` ends in, under its wrappers."""
    last = _innermost(function)
    last = getattr(last, "__func__", last)
    return last.__code__ if isinstance(last, FunctionType) else None


def mentions(function: Any, name: str, how: tuple[str, ...] = ("LOAD_ATTR", "LOAD_METHOD")) -> int:
    """How often the code of `function`, and of functions inside it, uses the attribute `name`."""
    code = code_of(function)
    return sum(count_in(part, name, how) for part in (_with_inner(code) if code else ()))


def count_in(code: CodeType, name: str, how: tuple[str, ...] = ("LOAD_ATTR", "LOAD_METHOD")) -> int:
    """How often `code` uses the attribute `name`."""
    instructions = dis.get_instructions(code) if name in code.co_names else ()
    return sum(i.argval == name and i.opname in how for i in instructions)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _innermost(function: Any) -> Any:
    *_, last = wrapt.wrapper_chain(function)
    return last


def _described(function: Any) -> str:
    last = _innermost(function)
    name = getattr(last, "__qualname__", repr(last))
    return f"{name} of {getattr(code_of(function), 'co_filename', 'no Python file')}"
