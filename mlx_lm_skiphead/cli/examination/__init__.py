"""What `doctor` finds out, a module a subject: packages, families and loops, patches of others, a
model, the ranks, their links.

Patches its own process as a program's would be, and looks at what became of each target. It loads
no weights and never uses the network: of a model it reads config.json.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from ... import __version__, config
from . import model as models
from . import packages, ranks, targets
from .report import Report, WrongArgument, line
from .verdict import judge

BACKENDS = ("ring", "jaccl", "mpi", "nccl")


def examine(
    model: str | None = None, modules: Sequence[str] = (), *, measures_links: bool = False
) -> Report:
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
    - ``links``: null if they are not measured, else ``steps``: how many steps of a pipeline the
      ranks took without a model; ``step_ms``, ``highest_step_ms``: what one took, median and
      highest but for the first; ``garbled``: the first data that did not arrive as sent, a line or
      ""; and ``links``, a list of ``{"between", "latency_ms", "highest_ms", "there_mb_s",
      "back_mb_s"}``: the two ranks, half the time of a round trip, MB per second each way.
    - ``warnings``, ``problems``: lines; ``wrong_argument``: a line or "".
    - ``exit_code``: of the command. The document is not printed if it is 2.

    Args:
        model: a folder, or a repository in the hub's cache.
        modules: imported before anything is patched.
        measures_links: on all ranks or none; see `links.measure`.
    """
    report: Report = {
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
        "exit_code": 0,
    }
    try:
        report["mode"] = config.requested_mode()
    except ValueError as error:
        report["problems"].append(str(error))
    unusable = [
        name for name, package in report["packages"].items() if packages.is_unusable(package)
    ]
    try:
        folder = models.locate(model) if model else None
        if not unusable:
            targets.examine(report, modules)
        if model:
            report["model"] = models.examine(model, folder, report, unusable)
    except WrongArgument as error:
        report["wrong_argument"] = str(error)
    if "mlx" not in unusable:
        import mlx.core as mx

        report["backends"] = {b: mx.distributed.is_available(backend=b) for b in BACKENDS}
        group = ranks.compare(report)
        if measures_links:
            _measure_links(report, group)
    judge(report)
    return report


def _measure_links(report: Report, group: Any) -> None:
    from . import links

    report["links"] = None
    if group is None and not report["problems"]:
        report["wrong_argument"] = report["wrong_argument"] or (
            "--links needs ranks, as in mlx.launch -n 2 ... -- mlx-lm-skiphead doctor --links"
        )
    if group is None or report["differences"].keys() & {"plugin", "links"}:
        return
    try:
        report["links"] = links.measure(group)
    except RuntimeError as error:
        report["problems"].append(f"The links failed: {line(error)}")
