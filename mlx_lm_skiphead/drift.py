"""Does the installed mlx-lm look as the table and the wrapped loops need? A reason if not.

Looks at classes and code, runs nothing. What does not fit is left to upstream.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable
from operator import attrgetter
from types import CodeType, ModuleType
from typing import Any, NamedTuple

from .families import Family


def is_pipelined(module: ModuleType) -> bool:
    """Whether this mlx-lm can pipeline the models of `module` at all; older ones can fewer."""
    classes = (cls for cls in vars(module).values() if inspect.isclass(cls))
    return any(hasattr(cls, "pipeline") for cls in classes if cls.__name__ != "PipelineMixin")


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


class _Needs(NamedTuple):
    """What the wrapper of a function relies on."""

    parameters: tuple[str, ...] = ()
    is_generator: bool = False
    reads: tuple[str, ...] = ()
    """Attributes that its code reads."""
    assigns: str = ""
    """An attribute that its code assigns once."""


_LOOPS = {
    "generate_step": _Needs(
        ("model", "sampler", "logits_processors", "prompt_progress_callback"), is_generator=True
    ),
    "speculative_generate_step": _Needs(
        ("model", "draft_model", "sampler", "logits_processors"), is_generator=True
    ),
    "GenerationBatch._step": _Needs(
        reads=("model", "uids", "samplers", "fallback_sampler", "logits_processors"),
        assigns="_next_tokens",
    ),
    "PromptProcessingBatch.prompt": _Needs(reads=("model",)),
    "GenerationBatch.filter": _Needs(("keep",)),
    "BatchGenerator.close": _Needs(reads=("_stream",)),
}


def loop_drift(path: str, module: ModuleType) -> str | None:
    """Why a function of mlx-lm's generation loops cannot be wrapped, or None where it can."""
    try:
        function = attrgetter(path)(module)
    except AttributeError as error:
        return str(error)
    needs = _LOOPS[path]
    if needs.is_generator and not inspect.isgeneratorfunction(function):
        return "it is not a generator function"
    missing = [n for n in needs.parameters if n not in inspect.signature(function).parameters]
    if missing:
        return f"it has no parameter {', '.join(missing)}"
    missing = [n for n in needs.reads if not _mentions(function, n)]
    if missing:
        return f"it does not read {', '.join(missing)}"
    if needs.assigns and _mentions(function, needs.assigns, ("STORE_ATTR",)) != 1:
        return f"it does not assign {needs.assigns} once"
    return None


def _mentions(
    function: Callable[..., Any], name: str, how: tuple[str, ...] = ("LOAD_ATTR", "LOAD_METHOD")
) -> int:
    """How often the code of `function`, and of functions inside it, uses the attribute `name`."""
    code = inspect.unwrap(function).__code__
    return sum(
        instruction.argval == name
        for part in _with_inner(code)
        for instruction in dis.get_instructions(part)
        if instruction.opname in how
    )


def _with_inner(code: CodeType) -> Iterable[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)
