"""Installing and uninstalling: import hooks, the list of handles, and what became of each target.

Nothing here imports mlx or mlx-lm. A hook patches a module of mlx-lm when a program imports it,
or at once where it already has. wrapt has no way to take a hook back, so hooks are registered
once per process and look at whether the plugin is installed.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import wrapt

from . import config
from .families import BY_NAME, FAMILIES, Family

log = logging.getLogger("mlx_lm_skiphead")

LOOPS_MODULE = "mlx_lm.generate"
LOOPS = {
    "generate_step": ("generate_step",),
    "speculative_generate_step": ("speculative_generate_step",),
    "GenerationBatch": (
        "GenerationBatch._step",
        "PromptProcessingBatch.prompt",
        "GenerationBatch.filter",
        "BatchGenerator.close",
    ),
}
"""The wrapped loops, and what is wrapped for each: all of it or nothing."""

LOADING_MODULE = "mlx_lm.utils"


class SkipheadError(RuntimeError):
    """Something that the user demanded cannot be patched; the message says what and why."""


class Target(NamedTuple):
    """What became of one thing to patch.

    `state` is ``"patched"``, ``"not imported yet"``, ``"refused"``, ``"replaced"`` (it was patched,
    and then another package or a reload has put something else in its place), ``"not pipelined"``
    (by the installed mlx-lm, so nothing is to be done) or ``"off"`` (the plugin is not installed).
    Where it is refused or replaced, mlx-lm works as upstream, and `reason` says why.
    """

    state: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}" if self.reason else self.state


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


class _Handle(NamedTuple):
    """One patch: `wrapper` sits at ``owner.attribute``."""

    owner: Any
    attribute: str
    wrapper: Any


class _Patched(NamedTuple):
    """A patched family."""

    family: Family
    head_class: type
    handles: list[_Handle]
    """Of what makes a forward pass end before the head."""


_lock = threading.RLock()
_handles: list[_Handle] = []
_left_behind: list[_Handle] = []
"""What could not be taken out again from under another package's wrapper. It does nothing."""
_outcomes: dict[str, Target] = {}
_patched: dict[type, _Patched] = {}
"""By the class `Model` of its module."""
_loop_handles: dict[str, list[_Handle]] = {}
_hooked: set[str] = set()
_held: weakref.WeakSet[Any] = weakref.WeakSet()
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
        SkipheadError: if `strict`, and something that is imported already had to be refused. The
            rest is installed.
    """
    global _strict
    if mode not in ("on", "hidden"):
        raise ValueError(f"mode={mode!r} is not understood. Accepted: 'on', 'hidden'.")
    names = (LOOPS_MODULE, LOADING_MODULE, *(family.module for family in FAMILIES))
    # Not under the lock: a hook that runs in another thread waits for it, inside an import.
    for name in names:
        _await_import(name)
    with _lock:
        config.active, _strict = mode, strict  # type: ignore[assignment]
        refused = []
        for name in names:
            module = sys.modules.get(name)
            if module is not None:
                try:
                    _patch(name, module)
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
    """Give mlx-lm its own functions back; safe at any time, also when nothing is installed.

    A generation that is running goes on as it began, and the functions are given back when it
    ends. Where another package has replaced a patched function, or has wrapped it in a way that
    cannot be taken apart, what is left of ours only calls what it wraps. All ranks must do the
    same.
    """
    with _lock:
        config.active = "off"
        _settle()


def status() -> Status:
    """What is patched in this process, what waits for its import, and what was refused and why."""
    with _lock:
        _settle()
        return Status(
            config.active,
            {family.name: _target(family.name, family.module) for family in FAMILIES},
            {name: _target(name, LOOPS_MODULE) for name in LOOPS},
            _models(),
        )


def family_of(model: Any) -> Family | None:
    """The patched family that `model`, as mlx-lm loads it, belongs to; None if there is none.

    None also where another package has since put something in place of what was patched, and for
    a subclass with a ``__call__`` of its own.
    """
    for cls in type(model).__mro__:
        if cls in _patched:
            family, _, handles = _patched[cls]
            return family if all(map(_in_place, handles)) else None
        if "__call__" in vars(cls):
            return None
    return None


def owner_of(stage: Any) -> tuple[Family, Any] | None:
    """The patched family of a pipelined model, and the head owner that it is a part of.

    A pipelined model does not know what it is a part of: this looks among all objects, which
    takes some 20 ms.
    """
    with _lock:
        patched = [p for p in _patched.values() if all(map(_in_place, p.handles))]
    for thing in gc.get_objects():
        for family, head_class, _ in patched:
            # By type(): asking some objects for their __class__ runs code of theirs.
            if issubclass(type(thing), head_class):
                try:
                    found = family.stage_of(thing) is stage
                except AttributeError:  # it is being built
                    continue
                if found:
                    return family, thing
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
            _settle()


def hold(batch: Any) -> None:
    """As `running`, for a batch that begins with the plugin: until it is empty or released."""
    if batch not in _held:
        with _lock:
            _held.add(batch)


def holds() -> bool:
    """Whether there is a batch that has begun with the plugin and has not ended."""
    with _lock:
        return any(len(batch) for batch in _held)


def release(batch: Any) -> None:
    """`batch` has ended, whatever follows in it may be upstream's."""
    with _lock:
        _held.discard(batch)
        _settle()


def _models() -> tuple[ModelStatus, ...]:
    if "mlx.core" not in sys.modules:
        return ()
    from . import dead_weights

    return dead_weights.models()


def _target(name: str, module: str) -> Target:
    outcome = _outcomes.get(name)
    if outcome is None:
        is_off = config.active == "off" or module in sys.modules
        return Target("off" if is_off else "not imported yet")
    if outcome.state == "patched" and (reason := _displaced(name)):
        return Target("replaced", reason)
    return outcome


def _displaced(name: str) -> str:
    """What has been put in the place of the patches of a family or a loop, or ""."""
    if name in LOOPS:
        handles = _loop_handles[name]
    elif name in BY_NAME:
        # An alias has the Model of another family, or one that inherits from it.
        model = getattr(sys.modules.get(BY_NAME[name].module), "Model", None)
        patched = next((_patched[c] for c in getattr(model, "__mro__", ()) if c in _patched), None)
        if patched is None:
            return f"{BY_NAME[name].module} has been loaded anew; install() patches it again"
        handles = patched.handles
    else:
        return ""
    for handle in handles:
        if not _in_place(handle):
            current = inspect.getattr_static(handle.owner, handle.attribute, None)
            by = getattr(current, "__module__", None) or type(current).__module__
            return (
                f"{_where(handle)} has been replaced by something of {by}; install() patches that"
            )
    return ""


def _on_import(module: ModuleType) -> None:
    """Runs inside the import, when the module's own code has run."""
    with _lock:
        if config.active != "off":
            _patch(module.__name__, module)


def _patch(name: str, module: ModuleType) -> None:
    """Patch what is to be patched in one imported module. Only a `strict` install raises."""
    if name == LOOPS_MODULE:
        for loop in LOOPS:
            _attempt(loop, module, _patch_loop)
    elif name == LOADING_MODULE:
        _attempt("sharded_load", module, _patch_loading)
    else:
        _attempt(name.rpartition(".")[2], module, _patch_family)


def _attempt(name: str, module: ModuleType, patch: Callable[[str, ModuleType], Target]) -> None:
    if _outcomes.get(name) == Target("patched") and not _displaced(name):
        return
    before = [id(handle) for handle in _handles]
    try:
        outcome = patch(name, module)
    except Exception as error:  # an import of the user's must not fail for it
        outcome = Target("refused", f"{type(error).__name__}: {error}")
    _outcomes[name] = outcome
    if outcome.state != "refused":
        return
    for handle in [handle for handle in _handles if id(handle) not in before]:
        _handles.remove(handle)
        _undo(handle)
    message = f"{name} is left to upstream mlx-lm: {outcome.reason}"
    if _strict:
        raise SkipheadError(message)
    log.warning(message)


def _patch_family(name: str, module: ModuleType) -> Target:
    import mlx.core as mx

    from . import agreement, dead_weights, drift, head

    family = BY_NAME[name]
    if family.same_as:
        base = BY_NAME[family.same_as].module
        _patch(base, sys.modules[base])
        reason = drift.alias_drift(family, module, sys.modules[base])
        return Target("refused", reason) if reason else _outcomes[family.same_as]
    if _is_being_imported(module) and not hasattr(module, "Model"):
        return Target("refused", "it is being imported; call install() again after that")
    if not drift.is_pipelined(module):
        return Target("not pipelined")
    reason = drift.family_drift(family, module)
    if reason:
        return Target("refused", reason)
    stage_class = getattr(module, family.stage_class)
    head_class = getattr(module, family.head_class)
    handles = [
        _wrap(mx.distributed, "all_gather", head.all_gather),
        _wrap(stage_class, "__call__", head.stage_call),
        _wrap(head_class, "__call__", head.model_call(family)),
    ]
    _wrap(mx, "logsumexp", head.logsumexp)
    _wrap(mx, "load", dead_weights.load)
    _wrap(mx.distributed, "all_sum", agreement.all_sum)
    _wrap(stage_class, "pipeline", dead_weights.pipeline)
    _patched[module.Model] = _Patched(family, head_class, handles)
    return Target("patched")


def _patch_loop(name: str, module: ModuleType) -> Target:
    from . import drift, loops

    handles = []
    for path in LOOPS[name]:
        reason = drift.loop_drift(path, module)
        if reason:
            return Target("refused", f"{LOOPS_MODULE}.{path}: {reason}")
        handles.append(_wrap(module, path, loops.WRAPPERS[path]))
    _loop_handles[name] = handles
    return Target("patched")


def _patch_loading(name: str, module: ModuleType) -> Target:
    from . import dead_weights

    _wrap(module, name, dead_weights.sharded_load)
    return Target("patched")


def _wrap(target: Any, path: str, wrapper: Callable[..., Any]) -> _Handle:
    """Wrap ``target.path``, once; what a class inherits is wrapped for that class only."""
    *parents, attribute = path.split(".")
    owner = attrgetter(".".join(parents))(target) if parents else target
    for known in (_handles, _left_behind):
        for handle in known:
            if handle.owner is owner and handle.attribute == attribute:
                if not _in_place(handle):
                    known.remove(handle)
                    break
                if known is _left_behind:  # a second layer of ours would not work
                    known.remove(handle)
                    _handles.append(handle)
                return handle
    handle = _Handle(owner, attribute, wrapt.wrap_function_wrapper(owner, attribute, wrapper))
    _handles.append(handle)
    return handle


def _in_place(handle: _Handle) -> bool:
    current = vars(handle.owner).get(handle.attribute)
    # A wrapper made with functools.wraps has our wrapper as bound to the class below it.
    return current is handle.wrapper or any(
        layer is handle.wrapper or getattr(layer, "_self_parent", None) is handle.wrapper
        for layer in wrapt.wrapper_chain(current)
    )


def _where(handle: _Handle) -> str:
    owner = handle.owner
    name = getattr(owner, "__qualname__", getattr(owner, "__name__", ""))
    return f"{name}.{handle.attribute}"


def _undo(handle: _Handle) -> None:
    with suppress(wrapt.WrapperNotOutermostError):
        wrapt.unwrap_object(handle.owner, handle.attribute, handle.wrapper, missing_ok=True)
    if _in_place(handle):
        _left_behind.append(handle)
        log.warning(
            "%s is wrapped by another package in a way that cannot be taken apart; what is left "
            "of mlx-lm-skiphead there does nothing",
            _where(handle),
        )


def _settle() -> None:
    """Give mlx-lm its functions back, if that was asked for and nothing runs that needs ours."""
    if config.active != "off" or _running or holds():
        return
    while _handles:
        _undo(_handles.pop())
    _outcomes.clear()
    _patched.clear()
    _loop_handles.clear()
    _held.clear()
