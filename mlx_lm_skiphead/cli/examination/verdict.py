"""The verdict: which of what was found is a warning, and which a problem."""

from __future__ import annotations

from typing import Any

from ... import config
from . import packages
from .targets import NOT_THERE

HARMLESS = {"variable", "mlx", "wrapt", "fast synch"}
"""Facts in which ranks may differ. Where the variable means something else, so does the mode."""
SLOW_MS = 5.0
"""A latency of a link that no wired network has."""
UNEVEN = 5.0
"""How many times slower than the best one a link may be."""


def judge(report: dict[str, Any]) -> None:
    """Fill in warnings, problems and the exit code."""
    problems, warnings = report["problems"], report["warnings"]
    # With the plugin off, nothing has been asked for that could fail.
    wanted = warnings if report["mode"] == "off" else problems
    for name, package in report["packages"].items():
        if package["problem"]:
            version = f" {package['version']}" if package["version"] else ""
            wanted.append(f"{name}{version}: {package['problem']}.")
    families, loops = (
        {f"{name} ({target['state']})": target["state"] for name, target in report[kind].items()}
        for kind in ("families", "loops")
    )
    left = [name for name, state in families.items() if state not in ("patched", *NOT_THERE)]
    left += [name for name, state in loops.items() if state != "patched"]
    if left:
        names = ", ".join(sorted(left))
        wanted.append(f"Left to upstream mlx-lm, where all ranks run the head: {names}.")
    if report["patches"]:
        by = ", ".join(sorted({patch["by"] for patch in report["patches"]}))
        warnings.append(f"Other packages have patched the same functions: {by}.")
    model = report["model"]
    if model and not model["supported"]:
        problems.append(f"The model {model['name']} is not supported: {model['reason']}.")
    _judge_mlx(report)
    _judge_ranks(report)
    if report["links"]:
        _judge_links(report)
    if report["wrong_argument"] and report["differences"]:  # it is not wrong on all ranks
        problems.append(report["wrong_argument"])
    report["exit_code"] = 1 if problems else 2 if report["wrong_argument"] else 0


def _judge_mlx(report: dict[str, Any]) -> None:
    version = report["packages"].get("mlx", {}).get("version")
    for line, is_fatal in packages.known_faults(version) if version else ():
        report["problems" if is_fatal else "warnings"].append(line)
    if packages.has_fast_synch() or any(r["fast synch"] == "on" for r in report["ranks"] or ()):
        report["warnings"].append(
            f"{packages.FAST_SYNCH} is set: with it ranks sometimes stand still (mlx #3142, "
            "#3830). Leave it unset."
        )


def _judge_ranks(report: dict[str, Any]) -> None:
    differing = report["differences"].keys()
    line = f"The ranks differ in: {', '.join(differing)}."
    if differing - HARMLESS:
        if "mode" in differing:
            line += f" Give all of them the variable: mlx.launch --env {config.VARIABLE}=1 ..."
        if differing & {"plugin", "mlx-lm", "table"}:
            line += " Install the same versions for all of them."
        report["problems"].append(line)
    elif differing - {"variable"}:
        report["warnings"].append(line)


def _judge_links(report: dict[str, Any]) -> None:
    found = report["links"]
    if found["garbled"]:
        report["problems"].append(f"The links are broken: {found['garbled']}.")
    best = min(link["latency_ms"] for link in found["links"])
    # The faster way of each link: a machine with other work to do makes one of them look slow.
    speeds = [max(link["there_mb_s"], link["back_mb_s"]) for link in found["links"]]
    for link, speed in zip(found["links"], speeds, strict=True):
        name = "The link between ranks {} and {}".format(*link["between"])
        latency = link["latency_ms"]
        if latency > SLOW_MS or latency > max(UNEVEN * best, 1.0):
            report["warnings"].append(
                f"{name} has a latency of {latency:.1f} ms, and each token waits for it; the best "
                f"link here has {best:.1f}."
            )
        if speed < max(speeds) / UNEVEN:
            report["warnings"].append(
                f"{name} carries {speed:.0f} MB/s, and prompts wait for it; the best link here "
                f"carries {max(speeds):.0f}."
            )
