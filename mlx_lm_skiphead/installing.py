"""Installing and uninstalling: the one table of patches, and what became of each.

Nothing here imports mlx or mlx-lm before a program does. A hook patches a module of mlx-lm when it
is imported, or at once where it already has been. wrapt has no way to take a hook back, so hooks
are registered once per process and look at whether the plugin is installed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from types import ModuleType
from typing import Any, NamedTuple

import wrapt

from . import config, registry
from .families import BY_NAME, FAMILIES, LOADING_MODULE, LOOPS_MODULE, Family
from .handles import Handle, Patch, in_place, locate, undo, wrap, written_in
from .registry import Patched, SkipheadError, Target, lock, outcomes, patched

log = logging.getLogger("mlx_lm_skiphead")

LOOPS = ("generate_step", "speculative_generate_step", "GenerationBatch")
MODULES = {
    **dict.fromkeys(LOOPS, LOOPS_MODULE),
    "sharded_load": LOADING_MODULE,
    **{family.name: family.module for family in FAMILIES},
}
"""By group of patches, whose import it waits for."""


class ModelStatus(NamedTuple):
    """A model that was split into a pipeline while the plugin was on, on this rank."""

    family: str
    rank: int
    ranks: int
    on_disk: dict[str, int]
    """Bytes of weights that have not been read, by name of the module that they belong to."""

    def __str__(self) -> str:
        parts = [f"{name} {size / 1e6:.1f} MB" for name, size in self.on_disk.items()]
        left = " and ".join(parts) or "nothing"
        return f"{self.family}, rank {self.rank} of {self.ranks}: {left} left on disk"


class Status(NamedTuple):
    """What the plugin does in this process: see `status`."""

    mode: config.Mode
    """``"off"``, ``"on"`` or ``"hidden"``."""
    families: dict[str, Target]
    """By module of ``mlx_lm.models``."""
    loops: dict[str, Target]
    """By function or class of ``mlx_lm.generate``."""
    models: tuple[ModelStatus, ...]
    """The models that are alive."""

    def __str__(self) -> str:
        lines = [f"mlx-lm-skiphead is {self.mode}"]
        for title, targets in (("loops", self.loops), ("families", self.families)):
            lines += [f"{title}:", *(f"  {name:<26}{target}" for name, target in targets.items())]
        if self.models:
            lines += ["models:", *(f"  {model}" for model in self.models)]
        return "\n".join(lines)


_handles: list[Handle] = []
_left_behind: list[Handle] = []
"""What could not be taken out again from under another package's wrapper. It does nothing."""
_hooked: set[str] = set()
_strict = False


@functools.cache
def table() -> tuple[Patch, ...]:
    """Every patch, one row each."""
    from . import agreement, dead_weights, head, loops

    rows = [*loops.PATCHES, *agreement.PATCHES, *dead_weights.PATCHES]
    for family in FAMILIES:
        if not family.same_as:
            rows += [*head.patches(family), *dead_weights.patches(family)]
    return tuple(rows)


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
        SkipheadError: if `strict`, and something that is imported already had to be refused. The
            rest is installed.
    """
    global _strict
    if mode not in ("on", "hidden"):
        raise ValueError(f"mode={mode!r} is not understood. Accepted: 'on', 'hidden'.")
    # Not under the lock: a hook that runs in another thread waits for it, inside an import.
    for name in dict.fromkeys(MODULES.values()):
        _await_import(name)
    with lock:
        config.active, _strict = mode, strict  # type: ignore[assignment]
        refused = []
        for name in dict.fromkeys(MODULES.values()):
            if name in sys.modules:
                try:
                    _patch_module(sys.modules[name])
                except SkipheadError as error:
                    refused.append(str(error))
        if refused:
            raise SkipheadError("\n".join(refused))


def _await_import(name: str) -> None:
    """Have a hook for when `name` is imported, or its import by another thread finished."""
    if name not in sys.modules and name not in _hooked:
        _hooked.add(name)
        wrapt.register_post_import_hook(_on_import, name)
    if _is_being_imported(sys.modules.get(name)):
        importlib.import_module(name)  # waits for the other thread


def _is_being_imported(module: ModuleType | None) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def uninstall() -> None:
    """Give mlx-lm its own functions back; also safe when nothing is installed.

    Where another package has replaced a patched function, or has wrapped it in a way that cannot be
    taken apart, what is left of ours only calls what it wraps. All ranks must do the same.

    Raises:
        SkipheadError: while a generation is running.
    """
    with lock:
        if count := registry.generations():
            raise SkipheadError(
                f"mlx-lm-skiphead cannot be uninstalled while {count} generations are running. "
                "Let them end first, or end them: close() of a generator, remove() of all requests "
                "of a batch."
            )
        config.active = "off"
        while _handles:
            _take_out(_handles.pop())
        for known in (outcomes, patched):
            known.clear()


def status() -> Status:
    """What is patched in this process, what waits for its import, and what was refused and why."""
    with lock:
        models = []
        if "mlx.core" in sys.modules:
            from . import dead_weights

            models = [
                ModelStatus(p.family.name, p.rank, p.ranks, p.on_disk())
                for p in dead_weights.models()
            ]
        return Status(
            config.active,
            {family.name: _target(family.name) for family in FAMILIES},
            {name: _target(name) for name in LOOPS},
            tuple(models),
        )


def _target(group: str) -> Target:
    outcome = outcomes.get(group)
    if outcome is None:
        is_off = config.active == "off" or MODULES[group] in sys.modules
        return Target("off" if is_off else "not imported yet")
    if outcome.state == "patched" and (reason := _displaced(group)):
        return Target("replaced", reason)
    return outcome


def _displaced(group: str) -> str:
    """What has been put in the place of the patches of a group, or ""."""
    if group in BY_NAME:
        # An alias has the Model of another family, or one that inherits from it.
        model = getattr(sys.modules.get(MODULES[group]), "Model", None)
        found = next((patched[c] for c in getattr(model, "__mro__", ()) if c in patched), None)
        if found is None:
            return f"{MODULES[group]} has been loaded anew; install() patches it again"
        handles = found.handles
    else:
        handles = [_handle_of(row) for row in table() if row.group == group]
    for handle in handles:
        if not in_place(handle):
            current = inspect.getattr_static(handle.owner, handle.attribute, None)
            return (
                f"{handle.name} has been replaced by something of {written_in(current)}; "
                "install() patches that"
            )
    return ""


def _handle_of(row: Patch) -> Handle:
    owner, attribute = locate(sys.modules[row.module], row.path)
    for handle in _handles:
        if handle.owner is owner and handle.attribute == attribute:
            return handle
    return Handle(owner, attribute, None)  # its module has been loaded anew


def _on_import(module: ModuleType) -> None:
    """Runs inside the import, when the module's own code has run."""
    with lock:
        if config.active != "off":
            _patch_module(module)


def _patch_module(module: ModuleType) -> None:
    """Patch what waits for one imported module. Only a `strict` install raises."""
    for group, name in MODULES.items():
        if name == module.__name__:
            _attempt(group, module)


def _attempt(group: str, module: ModuleType) -> None:
    if outcomes.get(group) == Target("patched") and not _displaced(group):
        return
    before = len(_handles)
    try:
        outcome = _patch(group, module)
    except Exception as error:  # an import of the user's must not fail for it
        outcome = Target("refused", f"{type(error).__name__}: {error}")
    outcomes[group] = outcome
    if outcome.state != "refused":
        return
    for handle in _handles[before:]:
        _handles.remove(handle)
        _take_out(handle)
    message = f"{group} is left to upstream mlx-lm: {outcome.reason}"
    if _strict:
        raise SkipheadError(message)
    log.warning(message)


def _patch(group: str, module: ModuleType) -> Target:
    from . import drift

    family = BY_NAME.get(group)
    if family is not None and family.same_as:
        base = BY_NAME[family.same_as]
        _attempt(base.name, sys.modules[base.module])
        reason = _alias_drift(module, sys.modules[base.module])
        return Target("refused", reason) if reason else outcomes[base.name]
    if family is not None:
        if _is_being_imported(module) and not hasattr(module, "Model"):
            return Target("refused", "it is being imported; call install() again after that")
        if not drift.is_pipelined(module):
            return Target("not pipelined")
        for name in ("Model", family.head_class, family.stage_class):
            if not inspect.isclass(getattr(module, name, None)):
                return Target(
                    "refused", f"expected a class {name} in {module.__name__}, found none"
                )
    rows = [row for row in table() if row.group == group]
    for row in rows:
        root = sys.modules[row.module]
        try:
            owner, attribute = locate(root, row.path)
            reason = row.needs(getattr(owner, attribute))
        except AttributeError as error:
            reason = f"expected {row.path}, found none ({error})"
        if reason:
            return Target("refused", f"{row.module}.{row.path}: {reason}; {row.lost}")
    handles = [_wrap(sys.modules[row.module], row) for row in rows]
    if family is not None:
        _register(family, module, handles)
    return Target("patched")


def _register(family: Family, module: ModuleType, handles: list[Handle]) -> None:
    known = [h for h in handles if h.attribute != "pipeline"]
    patched[module.Model] = Patched(family, getattr(module, family.head_class), known)


def _alias_drift(module: ModuleType, base: ModuleType) -> str:
    """Why `Model` of `module` is not covered by what is patched in `base`, or ""."""
    model = getattr(module, "Model", None)
    if not (inspect.isclass(model) and issubclass(model, base.Model)):
        return f"expected {module.__name__}.Model to be a {base.__name__}.Model, found {model!r}"
    if model is not base.Model and "__call__" in vars(model):
        return f"expected {module.__name__}.Model to inherit __call__, found one of its own"
    return ""


def _wrap(root: Any, row: Patch) -> Handle:
    owner, attribute = locate(root, row.path)
    for known in (_handles, _left_behind):
        for handle in known:
            if handle.owner is owner and handle.attribute == attribute:
                if not in_place(handle):
                    known.remove(handle)
                    break
                if known is _left_behind:  # a second layer of ours would not work
                    known.remove(handle)
                    _handles.append(handle)
                return handle
    handle = wrap(root, row.path, row.wrapper)
    _handles.append(handle)
    return handle


def _take_out(handle: Handle) -> None:
    if not undo(handle):
        _left_behind.append(handle)
        log.warning(
            "%s is wrapped by another package in a way that cannot be taken apart; what is left "
            "of mlx-lm-skiphead there does nothing",
            handle.name,
        )
