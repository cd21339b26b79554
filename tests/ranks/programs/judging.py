"""Programs run both ways on real ranks, and compared. What needs mlx runs in the ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ranks

from programs.registry import ALONE, OTHER_PROMPTS, REFUSED

SCRIPT = Path(__file__).parents[1] / "rank_programs.py"
WAYS = {"unpatched": {}, "plugin": {"MLX_LM_SKIPHEAD": "1"}}
DRAFTS_DIFFER = "RuntimeError: The ranks differ in what the draft model"
Reports = list[Any]
"""What each rank has reported."""


def both_ways(count: int, *names: str, timeout: float) -> tuple[Reports, Reports]:
    """Reports unpatched and with the plugin of all programs, or those with one of `names` in
    theirs."""

    def launch(env: dict[str, str]) -> Reports:
        return ranks.launch(SCRIPT, *names, ranks=count, env=env, timeout=timeout).results

    # Side by side: ranks mostly wait for each other.
    with ThreadPoolExecutor(2) as pool:
        unpatched, plugin = pool.map(launch, WAYS.values())
    return unpatched, plugin


def problems(name: str, unpatched: Reports, plugin: Reports) -> Iterator[str]:
    """What is wrong with a program, by what all ranks report of it both ways."""
    judged = plugin[0]["judged"][name]
    first = plugin[0]["programs"].get(name)
    for rank, (without, with_it) in enumerate(zip(unpatched, plugin, strict=True)):
        right, seen = (report["programs"].get(name) for report in (without, with_it))
        # Whatever unpatched cannot do has no place here.
        if failed(right) and judged != ALONE:
            yield f"rank {rank}, unpatched: {right}"
        if judged == ALONE:
            is_right = not failed(seen) and seen[0] == seen[1]
        elif judged == REFUSED:
            is_right = seen == first and failed(seen) and seen.startswith(DRAFTS_DIFFER)
        elif judged == OTHER_PROMPTS:
            is_right = seen == first and not failed(seen)
        else:
            is_right = seen == right
        if not is_right:
            yield f"rank {rank}: {seen}, unpatched {right}"
        if without["warnings"].get(name):
            yield f"rank {rank}, unpatched: {without['warnings'][name]}"
        yield from (f"rank {rank}: {it}" for it in wrong_warnings(name, with_it, len(plugin)))
        for report, is_nan in ((without, False), (with_it, rank != 0)):
            of_norm = report["notes"].get(name, {}).get("norm saw NaN", [is_nan])
            if of_norm != [is_nan]:
                yield f"rank {rank}: the final norm saw NaN: {of_norm}, expected {[is_nan]}"


def failed(seen: Any) -> bool:
    """Whether a program has raised, which is reported as a string, or has not run."""
    return seen is None or isinstance(seen, str)


def wrong_warnings(name: str, plugin: Any, count: int) -> Iterator[str]:
    """Problems with what a rank has logged of prompts: one warning a generation that needs it."""
    of_prompts = [text for text in plugin["warnings"][name] if text.startswith("Another prompt")]
    different = plugin["notes"].get(name, {}).get("other prompts", {"ranks": [], "generations": 0})
    if plugin["judged"][name] == OTHER_PROMPTS:
        last_alone = name.startswith("another prompt")
        expected = [count - 1] if last_alone else [*range(1, count)]
        if different["ranks"] != expected:
            yield f"tests nothing: ranks {different['ranks']} had other prompts, not {expected}"
    if len(of_prompts) != different["generations"]:
        yield f"{different['generations']} warnings expected, not {of_prompts}"
    for text in of_prompts:
        named = set(map(int, re.findall(r"\b\d+\b", text)))
        if not set(different["ranks"]) <= named:
            yield f"does not name ranks {different['ranks']}: {text}"
