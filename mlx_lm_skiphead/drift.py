"""Does the installed mlx-lm look as the table and the wrapped loops need? A reason if not.

Looks at classes and code, runs nothing. What does not fit is left to upstream.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable
from types import CodeType, ModuleType
from typing import Any

from .families import Family


def family_drift(family: Family, module: ModuleType) -> str | None:
    """Why `family` of the installed mlx-lm cannot be patched, or None where it can."""
    for name in ("Model", family.head_class, family.stage_class):
        if not inspect.isclass(getattr(module, name, None)):
            return f"{module.__name__} has no class {name}"
    stage = getattr(module, family.stage_class)
    for name in ("pipeline", "__call__"):
        if not callable(getattr(stage, name, None)):
            return f"{module.__name__}.{family.stage_class} has no {name}()"
    broadcasts = _mentions(stage.__call__, "all_gather")
    if broadcasts != 1:
        return (
            f"{module.__name__}.{family.stage_class} has {broadcasts} calls of all_gather where "
            "one was expected, the hidden broadcast"
        )
    head = getattr(module, family.head_class)
    if not (_mentions(head.__call__, "lm_head") or _mentions(head.__call__, "as_linear")):
        return f"{module.__name__}.{family.head_class} runs no lm_head"
    return None


def alias_drift(family: Family, module: ModuleType, base: ModuleType) -> str | None:
    """Why `Model` of `module` is not covered by what is patched in `base`, or None."""
    model = getattr(module, "Model", None)
    if not (inspect.isclass(model) and issubclass(model, base.Model)):
        return f"{module.__name__}.Model is no {base.__name__}.Model"
    if model is not base.Model and "__call__" in vars(model):
        return f"{module.__name__}.Model has a __call__ of its own"
    return None


def loop_drift(function: Any, *needed: str) -> str | None:
    """Why a generation loop cannot be wrapped: a generator that takes the `needed` parameters."""
    if not inspect.isgeneratorfunction(function):
        return "it is not a generator function"
    missing = [name for name in needed if name not in inspect.signature(function).parameters]
    return f"it has no parameter {', '.join(missing)}" if missing else None


def _mentions(function: Callable[..., Any], name: str) -> int:
    """How often the code of `function`, and of functions inside it, reads the attribute `name`."""
    code = inspect.unwrap(function).__code__
    return sum(
        instruction.argval == name
        for part in _with_inner(code)
        for instruction in dis.get_instructions(part)
        if instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))
    )


def _with_inner(code: CodeType) -> Iterable[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)
