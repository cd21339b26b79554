"""What `doctor` finds out: packages, families and loops, patches of others, a model, the ranks.

Patches its own process as a program's would be, and looks at what became of each target. It loads
no weights and never uses the network: of a model it reads config.json.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import operator
import os
import pkgutil
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__, config
from ..families import BY_NAME, FAMILIES

BACKENDS = ("ring", "jaccl", "mpi", "nccl")
FINE = ("patched", "not pipelined", "not in this mlx-lm")
"""States of a family in which nothing is wrong."""

FACTS_BYTES = 4096
"""What each rank gives to the others."""
HARMLESS = {"variable", "mlx", "wrapt"}
"""Facts in which ranks may differ; where a spelling of the variable has another meaning, so has
the mode."""

Report = dict[str, Any]


class _WrongArgument(ValueError):
    """Of the command line; the message says what is wrong."""


def examine(model: str | None = None, modules: Sequence[str] = ()) -> Report:
    """All that doctor finds out, as ``--json`` prints it.

    Keys:

    - ``plugin``, ``python``, ``platform``: versions.
    - ``packages``: by name ``{"version", "needs", "problem"}``. The version is null if it is not
      installed, `needs` what the plugin requires, `problem` "" if all is well.
    - ``backends``: by name of a distributed backend, whether this mlx has it.
    - ``variable``: the value of MLX_LM_SKIPHEAD, or null; ``mode``: "off", "on" or "hidden", or
      "invalid".
    - ``families``, ``loops``: by name ``{"state", "reason"}``. The states are those of
      `registry.Target`, and "not in this mlx-lm". What is patched is so in this process, whatever
      the mode; empty if a package cannot be imported.
    - ``unknown``: by name of a module that mlx-lm pipelines and the table lacks, what comes of it.
    - ``patches``: other packages' ``{"target", "by", "how", "where"}``: the function, the module
      that patches it, "wraps" or "replaces", and "above the plugin", "below the plugin" or "".
    - ``model``: ``{"name", "model_type", "family", "head", "supported", "reason"}``, or null. The
      head is "tied", "own" or "unknown".
    - ``rank``: this rank; ``ranks``: what each rank has, a list by rank, or null if there is one
      only; ``differences``: by name of what differs, a list of its values by rank.
    - ``warnings``, ``problems``: lines; ``wrong_argument``: a line or "".
    - ``exit_code``: of the command. The document is not printed if it is 2.

    Args:
        model: a folder, or a repository in the hub's cache.
        modules: imported before anything is patched.
    """
    report: Report = {
        "plugin": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(),
        "backends": {},
        "variable": os.environ.get(config.VARIABLE),
        "mode": "invalid",
        "families": {},
        "loops": {},
        "unknown": {},
        "patches": [],
        "model": None,
        "rank": 0,
        "ranks": None,
        "differences": {},
        "warnings": [],
        "problems": [],
        "wrong_argument": "",
        "exit_code": 0,
    }
    try:
        report["mode"] = config.requested_mode()
    except ValueError as error:
        report["problems"].append(str(error))
    unusable = [name for name, package in report["packages"].items() if _is_unusable(package)]
    try:
        folder = _folder(model) if model else None
        if not unusable:
            _examine_targets(report, modules)
        if model:
            report["model"] = _model(model, folder, report, unusable)
    except _WrongArgument as error:
        report["wrong_argument"] = str(error)
    if "mlx" not in unusable:
        import mlx.core as mx

        report["backends"] = {b: mx.distributed.is_available(backend=b) for b in BACKENDS}
        _compare_ranks(report)
    _judge(report)
    return report


# Packages


def _packages() -> dict[str, dict[str, Any]]:
    found = {}
    for name, needs in _requirements().items():
        version, problem = None, ""
        try:
            version = metadata.version(name)
            if not _satisfies(version, needs):
                problem = f"{needs} is needed"
            importlib.import_module("mlx.core" if name == "mlx" else name.replace("-", "_"))
        except metadata.PackageNotFoundError:
            problem = "not installed"
        except Exception as error:
            problem = f"cannot be imported: {_line(error)}"
            if name == "mlx" and sys.platform == "linux":
                problem += " (on Linux it needs one of the extras cpu, cuda12 and cuda13)"
        found[name] = {"version": version, "needs": needs, "problem": problem}
    return found


def _is_unusable(package: dict[str, Any]) -> bool:
    problem: str = package["problem"]
    return problem.startswith(("not installed", "cannot be imported"))


def _requirements() -> dict[str, str]:
    """By name of a package, the versions that the plugin needs: ``">=2.4,<3"``."""
    try:
        lines = metadata.requires("mlx-lm-skiphead") or []
    except metadata.PackageNotFoundError:  # it runs from a folder
        lines = ["mlx", "mlx-lm", "rich", "wrapt"]
    found = {}
    for line in lines:
        match = re.fullmatch(r"([\w.-]+?)\s*([<>=!].*)?", line)
        if match and "extra ==" not in line:
            found[match[1]] = ",".join(sorted((match[2] or "").split(","), reverse=True))
    return dict(sorted(found.items()))


_COMPARISONS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def _satisfies(version: str, needs: str) -> bool:
    """By the numbers of the release only: to the plugin 2.4.0rc1 is 2.4."""
    clauses = re.findall(r"([<>=!]+)\s*([\d.]+)", needs)
    return all(_COMPARISONS[how](_release(version), _release(than)) for how, than in clauses)


def _release(version: str) -> list[int]:
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(n) for n in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()  # 2.4.0 is 2.4
    return numbers


# Families and loops


def _examine_targets(report: Report, modules: Sequence[str]) -> None:
    """Patch as a program that imports the plugin last, look at it, and undo that."""
    from .. import installing, registry

    before = config.active
    installing.uninstall()
    try:
        _import_first(modules)
        installing.install("hidden" if report["mode"] == "hidden" else "on")
        for group in (*installing.LOOPS, registry.MLX):
            importlib.import_module(installing.MODULES[group])
        missing = {f.name: found for f in FAMILIES if (found := _import_family(f.module))}
        status = installing.status()
        for name, target in status.families.items():
            state, reason = missing.get(name, target)
            report["families"][name] = {"state": state, "reason": reason}
        for name, (state, reason) in status.loops.items():
            report["loops"][name] = {"state": state, "reason": reason}
        report["unknown"] = _unknown()
        report["patches"] = _foreign_patches(report["families"])
    finally:
        if before == "off":
            installing.uninstall()
        else:
            installing.install(before)


def _import_first(modules: Sequence[str]) -> None:
    if modules and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for python -m
    for name in modules:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise _WrongArgument(f"--import {name}: {_line(error)}") from error


def _import_family(module: str) -> tuple[str, str] | None:
    """State and reason if it cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return "not in this mlx-lm", ""
        return "refused", f"it cannot be imported: {_line(error)}"
    return None


def _unknown() -> dict[str, str]:
    """Modules of mlx-lm that `sharded_load` would pipeline and the table lacks."""
    from .. import registry

    package = importlib.import_module("mlx_lm.models")
    sources = {}
    for _, name, _ in pkgutil.iter_modules(package.__path__):
        spec = importlib.util.find_spec(f"mlx_lm.models.{name}")
        if name not in BY_NAME and name != "pipeline" and spec and spec.origin:
            sources[name] = Path(spec.origin).read_bytes().decode(errors="replace")
    found: dict[str, str] = {}
    # Importing all of them would take seconds. One that builds on an unknown one is unknown too.
    while True:
        mention = re.compile(rf"pipeline|\b({'|'.join([*BY_NAME, *found])})\b")
        candidates = [name for name, source in sources.items() if mention.search(source)]
        if not candidates:
            return dict(sorted(found.items()))
        for name in candidates:
            del sources[name]
            if _import_family(f"mlx_lm.models.{name}"):
                continue
            model = getattr(sys.modules[f"mlx_lm.models.{name}"], "Model", None)
            if inspect.isclass(model) and _can_be_pipelined(model):
                found[name] = "works as upstream"
                for base, outcome in registry.outcomes.items():
                    if outcome.model is not None and issubclass(model, outcome.model):
                        found[name] = f"treated as {base}, whose Model it builds on"


def _can_be_pipelined(model: type) -> bool:
    """Whether `sharded_load` would find a ``model.model.pipeline`` in an instance.

    As far as classes show it: `Model` has or assigns ``model``, and its module has a pipelined
    class, or imports a module of mlx-lm that has one.
    """
    from .. import drift

    initializers = (vars(cls).get("__init__") for cls in model.__mro__)
    if not hasattr(model, "model") and not any(
        drift.mentions(init, "model", ("STORE_ATTR",))
        for init in initializers
        if inspect.isfunction(init)
    ):
        return False
    own = [sys.modules[c.__module__] for c in model.__mro__ if c.__module__.startswith("mlx_lm.")]
    imported = [m for module in own for m in vars(module).values() if inspect.ismodule(m)]
    return any(drift.is_pipelined(m) for m in (*own, *imported) if m.__name__.startswith("mlx_lm."))


# Patches of other packages


def _foreign_patches(families: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """What is at, over or under our targets and is neither ours nor upstream's."""
    from ..handles import layers as layers_of
    from ..handles import written_in

    found = []
    for owner, attribute in dict.fromkeys(_targets(families)):
        layers = list(layers_of(inspect.getattr_static(owner, attribute, None)))
        origins = [written_in(layer) for layer in layers]
        packages = [origin.partition(".")[0] for origin in origins]
        ours = packages.index("mlx_lm_skiphead") if "mlx_lm_skiphead" in packages else None
        for depth, package in enumerate(packages):
            if layers[depth] is None or package in ("mlx", "mlx_lm", "mlx_lm_skiphead"):
                continue
            where = (
                "" if ours is None else "above the plugin" if depth < ours else "below the plugin"
            )
            found.append(
                {
                    "target": _name(owner, attribute),
                    "by": origins[depth],
                    "how": "wraps" if depth < len(layers) - 1 else "replaces",
                    "where": where,
                }
            )
    return found


def _targets(families: dict[str, dict[str, str]]) -> Iterator[tuple[Any, str]]:
    """All that the plugin patches, and the call of each `Model`, as an object and an attribute."""
    from .. import installing

    left_out = ("not pipelined", "not in this mlx-lm")
    for row in installing.table():
        if families.get(row.group, {}).get("state") not in left_out:
            with suppress(AttributeError, KeyError):
                yield row.locate()
    for family in FAMILIES:
        model = getattr(sys.modules.get(family.module), "Model", None)
        if families[family.name]["state"] not in left_out and inspect.isclass(model):
            yield model, "__call__"


def _name(owner: Any, attribute: str) -> str:
    if inspect.isclass(owner):
        return f"{owner.__module__}.{owner.__qualname__}.{attribute}"
    return f"{owner.__name__}.{attribute}"


# A model


def _folder(model: str) -> Path | None:
    """Where its config.json would be; None if the hub's cache has no such repository."""
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists():
        raise _WrongArgument(f"--model {model} is not a folder")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise _WrongArgument(f"--model {model}: there is no such folder")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True, allow_patterns=["*.json"]))
    except (ImportError, OSError, ValueError):
        return None


def _model(
    name: str, folder: Path | None, report: Report, unusable: Sequence[str]
) -> dict[str, Any]:
    """What becomes of a model: see ``model`` in `examine`."""
    found: dict[str, Any] = {
        "name": name,
        "model_type": "",
        "family": "",
        "head": "unknown",
        "supported": False,
        "reason": "",
    }
    if folder is None:
        return found | {"reason": "no such folder, and not in the hub's cache on this machine"}
    try:
        written = json.loads((folder / "config.json").read_bytes())
        found["model_type"] = written["model_type"]
    except FileNotFoundError:
        return found | {"reason": "it has no config.json"}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return found | {"reason": f"its config.json cannot be used: {_line(error)}"}
    text = written.get("text_config")
    tied = {**written, **(text if isinstance(text, dict) else {})}.get("tie_word_embeddings")
    if tied is not None:
        found["head"] = "tied" if tied else "own"
    if written.get("model_file"):
        return found | {"reason": "not covered: it brings a model_file of its own"}
    if unusable:
        return found | {"reason": f"{', '.join(unusable)} cannot be used"}
    family, reason = _family_of(written, report)
    return found | {"family": family, "supported": not reason, "reason": reason}


def _family_of(written: dict[str, Any], report: Report) -> tuple[str, str]:
    """The family of a config, or ""; and why it is not supported, or ""."""
    from mlx_lm.utils import _get_classes

    try:
        model, arguments = _get_classes(config=written)
    except Exception as error:
        return "", f"mlx-lm does not load it: {_line(error)}"
    # solar_open's Model is another family's, its ModelArgs are its own.
    for cls in (arguments, model):
        name = cls.__module__.rpartition(".")[2]
        if name in BY_NAME and getattr(sys.modules[cls.__module__], "Model", None) is model:
            state, reason = report["families"][name].values()
            return name, "" if state == "patched" else f"{name} is {state}: {reason}".strip(": ")
    if _can_be_pipelined(model):
        return "", "mlx-lm pipelines it, but the plugin does not know it: it works as upstream"
    return "", "mlx-lm cannot pipeline it"


# Ranks


def _compare_ranks(report: Report) -> None:
    """Under mlx.launch, give all ranks what this one has, and see in what they differ."""
    import mlx.core as mx

    if "MLX_RANK" not in os.environ:
        return
    try:
        group = mx.distributed.init()
        if group.size() == 1:
            return
        report["rank"] = group.rank()
        data = json.dumps(_facts(report)).encode().ljust(FACTS_BYTES, b"\0")
        gather = inspect.unwrap(mx.distributed.all_gather)  # whatever wraps it
        everything = bytes(gather(mx.array(list(data), mx.uint8)).tolist())
    except RuntimeError as error:
        report["problems"].append(f"The ranks cannot be connected: {_line(error)}")
        return
    parts = [everything[i : i + FACTS_BYTES] for i in range(0, len(everything), FACTS_BYTES)]
    ranks = report["ranks"] = [json.loads(part.rstrip(b"\0")) for part in parts]
    values = {name: [rank.get(name) for rank in ranks] for name in ranks[0]}
    report["differences"] = {n: v for n, v in values.items() if any(x != v[0] for x in v)}


def _facts(report: Report) -> dict[str, str]:
    """What ranks should agree in; it must fit into `FACTS_BYTES`."""
    targets = report["families"] | report["loops"]
    model = report["model"] or {}
    return {
        "mode": report["mode"],
        "variable": "not set" if report["variable"] is None else repr(report["variable"][:40]),
        "plugin": report["plugin"],
        **{name: report["packages"][name]["version"] for name in ("mlx-lm", "mlx", "wrapt")},
        "table": hashlib.sha256(repr(FAMILIES).encode()).hexdigest()[:12],
        "not patched": ", ".join(n for n, t in targets.items() if t["state"] != "patched"),
        "model": "" if not model else "supported" if model["supported"] else "not supported",
        "arguments": report["wrong_argument"][:200],
    }


# Verdict


def _judge(report: Report) -> None:
    """Fill in warnings, problems and the exit code."""
    problems, warnings = report["problems"], report["warnings"]
    # With the plugin off, nothing has been asked for that could fail.
    wanted = warnings if report["mode"] == "off" else problems
    for name, package in report["packages"].items():
        if package["problem"]:
            version = f" {package['version']}" if package["version"] else ""
            wanted.append(f"{name}{version}: {package['problem']}.")
    left = {
        f"{name} ({target['state']})"
        for name, target in (report["families"] | report["loops"]).items()
        if target["state"] not in FINE or (name in report["loops"] and target["state"] != "patched")
    }
    if left:
        wanted.append(f"Left to upstream mlx-lm, where all ranks run the head: {_listed(left)}.")
    if report["patches"]:
        by = _listed({patch["by"] for patch in report["patches"]})
        warnings.append(f"Other packages have patched the same functions: {by}.")
    model = report["model"]
    if model and not model["supported"]:
        problems.append(f"The model {model['name']} is not supported: {model['reason']}.")
    _judge_ranks(report)
    if report["wrong_argument"] and report["differences"]:  # it is not wrong on all ranks
        problems.append(report["wrong_argument"])
    report["exit_code"] = 1 if problems else 2 if report["wrong_argument"] else 0


def _judge_ranks(report: Report) -> None:
    differing = report["differences"].keys()
    if differing - HARMLESS:
        line = f"The ranks differ in: {', '.join(differing)}."
        if "mode" in differing:
            line += f" Give all of them the variable: mlx.launch --env {config.VARIABLE}=1 ..."
        if differing & {"plugin", "mlx-lm", "table"}:
            line += " Install the same versions for all of them."
        report["problems"].append(line)
    elif differing - {"variable"}:
        report["warnings"].append(f"The ranks differ in: {', '.join(differing)}.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
