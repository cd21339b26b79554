"""Installing and uninstalling: import hooks, the list of handles, and what became of each target.

Nothing here imports mlx or mlx-lm. A hook patches a module of mlx-lm when a program imports it,
or at once where it already has. wrapt has no way to take a hook back, so hooks are registered
once per process and look at whether the plugin is installed.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import wrapt

from . import config
from .families import BY_NAME, FAMILIES, Family

log = logging.getLogger("mlx_lm_skiphead")

LOOPS_MODULE = "mlx_lm.generate"
LOOPS = {
    "generate_step": (
        "model",
        "stream",
        "sampler",
        "logits_processors",
        "prompt_progress_callback",
    )
}
"""The wrapped loops, and the parameters by which they are steered."""


class SkipheadError(RuntimeError):
    """Something that the user demanded cannot be patched; the message says what and why."""


class Target(NamedTuple):
    """What became of one thing to patch: ``"patched"``, ``"not imported"`` or ``"refused"``.

    ``"off"`` where the plugin is not installed. `reason` says why something was refused.
    """

    state: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state


class Status(NamedTuple):
    """What the plugin does in this process: see `status`."""

    mode: config.Mode
    """``"off"``, ``"on"`` or ``"hidden"``."""
    families: dict[str, Target]
    """By module of ``mlx_lm.models``."""
    loops: dict[str, Target]
    """By function of ``mlx_lm.generate``."""

    def __str__(self) -> str:
        lines = [f"mlx-lm-skiphead is {self.mode}"]
        for title, targets in (("loops", self.loops), ("families", self.families)):
            lines += [f"{title}:", *(f"  {name:<24}{target}" for name, target in targets.items())]
        return "\n".join(lines)


class _Handle(NamedTuple):
    """One patch: `wrapper` sits at ``owner.attribute``."""

    owner: Any
    attribute: str
    wrapper: Any


_lock = threading.RLock()
_handles: list[_Handle] = []
_refused: dict[str, str] = {}
_patched: set[str] = set()
_loaded_classes: dict[type, Family] = {}
_hooked: set[str] = set()
_strict = False
_running = 0


def install(mode: str = "on", strict: bool = False) -> None:
    """Switch the plugin on in this process, whatever the environment variable says.

    Patches what mlx-lm has imported already, and the rest when it is imported. Installing twice
    is installing once; the last `mode` and `strict` hold. All ranks must do the same.

    Args:
        mode: ``"on"``, or ``"hidden"``: then a model called outside mlx-lm's loops gives the final
            hidden states ``(B, L, hidden)`` on workers, in place of logits.
        strict: raise where a family or a loop has to be refused, here or when it is imported,
            instead of leaving it to upstream with a warning.

    Raises:
        ValueError: for another `mode`.
        SkipheadError: if `strict`, and something that is imported already had to be refused.
    """
    global _strict
    if mode not in ("on", "hidden"):
        raise ValueError(f"mode={mode!r} is not understood. Accepted: 'on', 'hidden'.")
    with _lock:
        config.active, _strict = mode, strict  # type: ignore[assignment]
        for name in (LOOPS_MODULE, *(family.module for family in FAMILIES)):
            module = sys.modules.get(name)
            if module is not None:
                _patch(name, module)
            elif name not in _hooked:
                _hooked.add(name)
                wrapt.register_post_import_hook(_on_import, name)


def uninstall() -> None:
    """Give mlx-lm its own functions back; safe at any time, also when nothing is installed.

    A generation that is running goes on as it began, and the functions are given back when it
    ends. Where another package has replaced a patched function, or has wrapped it in a way that
    cannot be taken apart, what is left of ours only calls what it wraps. All ranks must do the
    same.
    """
    with _lock:
        config.active = "off"
        if not _running:
            _restore()


def status() -> Status:
    """What is patched in this process, what waits for its import, and what was refused and why."""
    with _lock:
        return Status(
            config.active,
            {family.name: _target(family.name, family.module) for family in FAMILIES},
            {name: _target(name, LOOPS_MODULE) for name in LOOPS},
        )


def family_of(model: Any) -> Family | None:
    """The patched family that `model`, as mlx-lm loads it, belongs to; None if there is none."""
    for cls in type(model).__mro__:
        if cls in _loaded_classes:
            return _loaded_classes[cls]
    return None


@contextmanager
def running() -> Iterator[None]:
    """While a generation runs: `uninstall` waits for its end before it takes patches away."""
    global _running
    with _lock:
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running and config.active == "off":
                _restore()


def _target(name: str, module: str) -> Target:
    if name in _refused:
        return Target("refused", _refused[name])
    if name in _patched:
        return Target("patched")
    return Target("off" if config.active == "off" or module in sys.modules else "not imported")


def _on_import(module: ModuleType) -> None:
    with _lock:
        if config.active != "off":
            _patch(module.__name__, module)


def _patch(name: str, module: ModuleType) -> None:
    """Patch what is to be patched in one imported module. Only a `strict` install raises."""
    if name == LOOPS_MODULE:
        for loop in LOOPS:
            _attempt(loop, module, _patch_loop)
    else:
        _attempt(name.rpartition(".")[2], module, _patch_family)


def _attempt(name: str, module: ModuleType, patch: Callable[[str, ModuleType], str | None]) -> None:
    if name in _patched:
        return
    before = len(_handles)
    try:
        reason = patch(name, module)
    except Exception as error:  # an import of the user's must not fail for it
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        _refused.pop(name, None)
        _patched.add(name)
        return
    while len(_handles) > before:
        _undo(_handles.pop())
    _refused[name] = reason
    message = f"{name} is left to upstream mlx-lm, its head is not skipped: {reason}"
    if _strict:
        raise SkipheadError(message)
    log.warning(message)


def _patch_family(name: str, module: ModuleType) -> str | None:
    import mlx.core as mx

    from . import drift, head

    family = BY_NAME[name]
    if family.same_as:
        base = BY_NAME[family.same_as].module
        _patch(base, sys.modules[base])
        if family.same_as in _refused:
            return f"{family.same_as} was refused: {_refused[family.same_as]}"
        return drift.alias_drift(family, module, sys.modules[base])
    reason = drift.family_drift(family, module)
    if reason is not None:
        return reason
    _wrap(mx.distributed, "all_gather", head.all_gather)
    _wrap(getattr(module, family.stage_class), "__call__", head.stage_call)
    _wrap(getattr(module, family.head_class), "__call__", head.model_call(family))
    _loaded_classes[module.Model] = family
    return None


def _patch_loop(name: str, module: ModuleType) -> str | None:
    from . import drift, loops

    reason = drift.loop_drift(getattr(module, name, None), *LOOPS[name])
    if reason is None:
        _wrap(module, name, getattr(loops, name))
    return reason


def _wrap(target: Any, attribute: str, wrapper: Callable[..., Any]) -> None:
    """Wrap ``target.attribute`` where it is defined, once."""
    owner, attribute, _ = wrapt.resolve_owner(target, attribute)
    if not any(h.owner is owner and h.attribute == attribute for h in _handles):
        wrapped = wrapt.wrap_function_wrapper(owner, attribute, wrapper)
        _handles.append(_Handle(owner, attribute, wrapped))


def _undo(handle: _Handle) -> None:
    try:
        wrapt.unwrap_object(handle.owner, handle.attribute, handle.wrapper, missing_ok=True)
    except wrapt.WrapperNotOutermostError as error:
        log.warning("%s; what is left of mlx-lm-skiphead there does nothing", error)


def _restore() -> None:
    while _handles:
        _undo(_handles.pop())
    _patched.clear()
    _refused.clear()
    _loaded_classes.clear()
