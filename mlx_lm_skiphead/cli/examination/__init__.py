"""What `doctor` finds out, one module for each subject.

It patches its own process as a program's would be, and looks at the state of each target. It loads
no weights and does not use the network: of a model it reads config.json.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from ... import __version__, config
from ..arguments import Unusable
from . import packages, ranks, targets
from .verdict import judge

BACKENDS = ("ring", "jaccl", "mpi", "nccl")


def examine(
    model: str | None = None, modules: Sequence[str] = (), *, measures_links: bool = False
) -> dict[str, Any]:
    """All that doctor finds out, as ``--json`` prints it.

    Keys:

    - ``plugin``, ``python``, ``platform``: versions.
    - ``packages``: by name ``{"version", "needs", "problem"}``. The version is null if it is not
      installed, `needs` is what the plugin requires, `problem` is "" if there is none.
    - ``backends``: by name of a distributed backend, whether this mlx has it.
    - ``variable``: the value of MLX_LM_SKIPHEAD, or null; ``mode``: "off", "on" or "hidden", or
      "invalid".
    - ``families``, ``loops``: by name ``{"state", "reason"}``. The states are those of
      `registry.Target`, and "not in this mlx-lm". They are of this process, which is patched
      whatever the mode. Empty if a package cannot be imported.
    - ``unknown``: by name of a module that mlx-lm pipelines and the table lacks, how it is treated.
    - ``patches``: other packages' ``{"target", "by", "how", "where"}``: the function, the module
      that patches it, "wraps" or "replaces", and "above the plugin", "below the plugin" or "".
    - ``model``: ``{"name", "model_type", "family", "head", "supported", "reason"}``, or null. The
      head is "tied", "own" or "unknown".
    - ``rank``: this rank; ``ranks``: the facts of each rank, a list by rank, or null if there is
      only one; ``differences``: by name of a fact that differs, a list of its values by rank.
    - ``links``: null if they are not measured, else what `links.measure` returns.
    - ``warnings``, ``problems``: lines; ``wrong_argument``: a line or "".
    - ``exit_code``: of the command. The document is not printed if it is 2.

    Args:
        model: a folder, or a repository in the hub's cache.
        modules: imported before anything is patched.
        measures_links: on all ranks or none; see `links.measure`.
    """
    report: dict[str, Any] = {
        "plugin": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages.examine(),
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
        "links": {} if measures_links else None,
        "warnings": [],
        "problems": [],
        "wrong_argument": "",
    }
    try:
        report["mode"] = config.requested_mode()
    except ValueError as error:
        report["problems"].append(str(error))
    unusable = [n for n, p in report["packages"].items() if packages.is_unusable(p)]
    try:
        if not unusable:
            targets.examine(report, modules)
        if model:
            report["model"] = targets.examine_model(model, report, unusable)
    except Unusable as error:
        report["wrong_argument"] = str(error)
    if "mlx" not in unusable:
        import mlx.core as mx

        report["backends"] = {b: mx.distributed.is_available(backend=b) for b in BACKENDS}
        ranks.examine(report)
    judge(report)
    return report
