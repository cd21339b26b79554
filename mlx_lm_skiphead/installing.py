"""Installing and uninstalling: the one table of patches, and what became of each.

Nothing here imports mlx or mlx-lm before a program does. A hook patches a module of mlx-lm when it
is imported, or at once where it already has been. wrapt has no way to take a hook back, so hooks
are registered once per process and look at whether the plugin is installed.
"""

from __future__ import annotations

import functools
import gc
import importlib
import inspect
import logging
import sys
from types import ModuleType
from typing import Any, NamedTuple

import wrapt

from . import config
from .families import BY_NAME, FAMILIES, LOADING_MODULE, LOOPS_MODULE, MODELS_PACKAGE
from .patching import drift, registry
from .patching.handles import Handle, Patch
from .patching.registry import Outcome, SkipheadError, Target, lock, outcomes
from .ranks import watch

log = logging.getLogger("mlx_lm_skiphead")

LOOPS = ("generate_step", "speculative_generate_step", "GenerationBatch")
PARTS = ("hidden broadcast", "comparison of ranks", "weights", "downloads", "prompt caches")
MODULES = {
    **dict.fromkeys(PARTS, LOADING_MODULE),
    "prompt caches": f"{MODELS_PACKAGE}.cache",
    **dict.fromkeys(LOOPS, LOOPS_MODULE),
    **{family.name: family.module for family in FAMILIES},
}
"""By group of patches, the module whose import it waits for."""


class Status(NamedTuple):
    """The state of the plugin in this process, as `status` returns it; printed, a line for each
    patch, model and step."""

    mode: config.Mode
    """``"off"``, ``"on"`` or ``"hidden"``."""
    families: dict[str, Target]
    """By module of ``mlx_lm.models``."""
    loops: dict[str, Target]
    """By function or class of ``mlx_lm.generate``."""
    models: tuple[Any, ...]
    """The models that are alive, a `ModelStatus` of weights/on_disk.py each."""
    parts: dict[str, Target]
    """The rest by name: without the "hidden broadcast" no head is skipped; without another one only
    what its name says is lost."""
    steps: list[str]
    """What is under way, and what this rank waits for."""

    def __str__(self) -> str:
        lines = [f"mlx-lm-skiphead is {self.mode}"]
        named = {"parts": self.parts, "loops": self.loops, "families": self.families}
        for title, targets in named.items():
            lines += [f"{title}:", *(f"  {name:<26}{target}" for name, target in targets.items())]
        if self.models:
            lines += ["models:", *(f"  {model}" for model in self.models)]
        if self.steps:
            lines += ["steps:", *(f"  {step}" for step in self.steps)]
        return "\n".join(lines)


_hooked: set[str] = set()
_strict = False


@functools.cache
def table() -> tuple[Patch, ...]:
    """Every patch, one row each."""
    from .ranks import agreement
    from .skipping import head, loops, speculation
    from .weights import fetching, on_disk, splitting

    parts = (head, agreement, on_disk, fetching, splitting, loops, speculation)
    rows = [row for part in parts for row in part.PATCHES]
    for family in FAMILIES:
        if not family.is_alias:
            rows += [*head.patches(family), *splitting.patches(family), *on_disk.patches(family)]
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
        ValueError: for another `mode`, or another variable of ours that is not understood.
        SkipheadError: if `strict`, and something that is imported already had to be refused. The
            rest is installed.
    """
    global _strict
    if mode not in ("on", "hidden"):
        raise ValueError(f"mode={mode!r} is not understood. Accepted: 'on', 'hidden'.")
    config.watch, config.download_all = config.watch_seconds(), config.fetches_all()
    config.deadline, config.split = config.deadline_seconds(), config.layers_by_rank()
    modules = dict.fromkeys(MODULES.values())
    # Not under the lock: a hook that runs in another thread waits for it, inside an import.
    for name in modules:
        if name in sys.modules:
            importlib.import_module(name)  # waits for another thread that imports it
        elif name not in _hooked:
            _hooked.add(name)
            wrapt.register_post_import_hook(_on_import, name)
    with lock:
        config.active, _strict = mode, strict  # type: ignore[assignment]
        refused = []
        for name in modules:
            try:
                if name in sys.modules:
                    _patch_module(sys.modules[name])
            except SkipheadError as error:
                refused.append(str(error))
        if refused:
            raise SkipheadError("\n".join(refused))


def uninstall() -> None:
    """Give mlx-lm its own functions back; also safe when nothing is installed.

    A patch that lies under another package's wrapper may have to stay; it then only calls the
    function below it. All ranks must do the same.

    Raises:
        SkipheadError: while a generation is running.
    """
    with lock:
        if registry.generations():
            gc.collect()  # what failed is kept alive by the traceback of its error
        if count := registry.generations():
            running = "a generation is" if count == 1 else f"{count} generations are"
            raise SkipheadError(
                f"mlx-lm-skiphead cannot be uninstalled while {running} running. Let each end "
                "first, or end it: close() of a generator, remove() of all requests of a batch."
            )
        config.active = "off"
        for outcome in reversed(outcomes.values()):
            _take_out(outcome.handles)
        outcomes.clear()


def status() -> Status:
    """Tell the state of the plugin in this process. It looks, and changes nothing.

    Returns:
        A `Status`: which families and loops are patched, wait for their import or were refused and
        why; bytes of each model's weights left on disk; the steps under way. `print` it.
    """
    with lock:
        on_disk = sys.modules.get(f"{__package__}.weights.on_disk")
        models = tuple(model.status() for model in on_disk.models()) if on_disk else ()
        found = {group: _target(group) for group in MODULES}
        parts, loops, families = ({n: found[n] for n in names} for names in (PARTS, LOOPS, BY_NAME))
        return Status(config.active, families, loops, models, parts, watch.under_way())


def _target(group: str) -> Target:
    if group not in outcomes and config.active != "off" and MODULES[group] not in sys.modules:
        return Target("not imported yet")
    return registry.target(group)


def _on_import(module: ModuleType) -> None:
    """Runs inside the import, when the module's own code has run."""
    with lock:
        if config.active != "off":
            _patch_module(module)


def _patch_module(module: ModuleType) -> None:
    """Patch what waits for one imported module. Only a `strict` install raises."""
    for group, name in MODULES.items():
        if name != module.__name__ or registry.target(group).state == "patched":
            continue
        _take_out(outcomes.get(group, Outcome(Target("off"))).handles)
        try:
            outcomes[group] = _patch(group, module)
        except Exception as error:  # an import of the user's must not fail for it
            outcomes[group] = Outcome(Target("refused", f"{type(error).__name__}: {error}"))
        if outcomes[group].target.state == "refused":
            message = f"{group} is left to upstream mlx-lm: {outcomes[group].target.reason}"
            if _strict:
                raise SkipheadError(message)
            log.warning(message)


def _patch(group: str, module: ModuleType) -> Outcome:
    family = BY_NAME.get(group)
    if family is not None:
        if not inspect.isclass(getattr(module, "Model", None)):
            reason = f"expected a class Model in {module.__name__}, found none; if it is being"
            return Outcome(Target("refused", f"{reason} imported, call install() after that"))
        if family.is_alias:
            base = sys.modules[BY_NAME[family.base].module]
            calls = {inspect.getattr_static(m.Model, "__call__", None) for m in (module, base)}
            reason = f"expected a Model with {base.__name__}.Model.__call__, found {module.Model!r}"
            state = Target("patched") if len(calls) == 1 else Target("refused", reason)
            return Outcome(state, bases=(family.base,))
        if not drift.is_pipelined(module):
            return Outcome(Target("not pipelined"))
    rows = [row for row in table() if row.group == group]
    for row in rows:
        if reason := row.refusal():
            return Outcome(Target("refused", reason))
    bases = tuple({row.base for row in rows} - {""})
    return Outcome(Target("patched"), tuple(map(Handle, rows)), bases)


def _take_out(handles: tuple[Handle, ...]) -> None:
    for handle in reversed(handles):
        if not handle.undo():
            log.warning(
                "%s is wrapped by another package in a way that cannot be taken apart; what is "
                "left of mlx-lm-skiphead there does nothing",
                handle,
            )
