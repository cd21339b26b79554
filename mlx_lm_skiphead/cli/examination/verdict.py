"""The verdict: which of what was found is a warning, and which a problem."""

from __future__ import annotations

from collections.abc import Iterable

from ... import config
from . import packages
from .report import Report

FINE = ("patched", "not pipelined", "not in this mlx-lm")
"""States of a family in which nothing is wrong."""
HARMLESS = {"variable", "mlx", "wrapt", "fast synch"}
"""Facts in which ranks may differ; where a spelling of the variable has another meaning, so has
the mode."""
SLOW_MS = 5.0
"""A latency of a link that no wired network has."""
UNEVEN = 5.0
"""How many times slower than the best one a link may be."""


def judge(report: Report) -> None:
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
    _judge_mlx(report)
    _judge_ranks(report)
    if report["links"]:
        _judge_links(report)
    if report["wrong_argument"] and report["differences"]:  # it is not wrong on all ranks
        problems.append(report["wrong_argument"])
    report["exit_code"] = 1 if problems else 2 if report["wrong_argument"] else 0


def _judge_mlx(report: Report) -> None:
    version = report["packages"].get("mlx", {}).get("version")
    for line, is_fatal in packages.known_faults(version) if version else ():
        report["problems" if is_fatal else "warnings"].append(line)
    settings = {rank["fast synch"] for rank in report["ranks"] or ()}
    if packages.has_fast_synch() or "on" in settings:
        report["warnings"].append(
            f"{packages.FAST_SYNCH} is set: with it ranks stand still now and then (mlx #3142, "
            "#3830). Leave it unset."
        )


def _judge_links(report: Report) -> None:
    links = report["links"]
    if links["garbled"]:
        report["problems"].append(f"The links are broken: {links['garbled']}.")
    best = min(link["latency_ms"] for link in links["links"])
    # A link's better way: a machine with other work to do makes one of them look slow.
    speeds = [max(link["there_mb_s"], link["back_mb_s"]) for link in links["links"]]
    for link, speed in zip(links["links"], speeds, strict=True):
        one, other = link["between"]
        latency = link["latency_ms"]
        if latency > SLOW_MS or latency > max(UNEVEN * best, 1.0):
            report["warnings"].append(
                f"The link between ranks {one} and {other} has a latency of {latency:.1f} ms, and "
                f"each token waits for it; the best link here has {best:.1f}."
            )
        if speed < max(speeds) / UNEVEN:
            report["warnings"].append(
                f"The link between ranks {one} and {other} carries {speed:.0f} MB/s, and prompts "
                f"wait for it; the best link here carries {max(speeds):.0f}."
            )


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
