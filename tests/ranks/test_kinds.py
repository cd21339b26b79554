"""Kinds of programs that do more while they sample, on real ranks: what they see is unpatched's."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ranks

SCRIPT = Path(__file__).with_name("rank_kinds.py")
ON = {"MLX_LM_SKIPHEAD": "1"}


def launch(count, env):
    return ranks.launch(SCRIPT, ranks=count, env=env, timeout=150).results


@pytest.mark.parametrize("count", [2, 3])
def test_kinds(count):
    # Side by side: ranks mostly wait for each other.
    with ThreadPoolExecutor(2) as pool:
        launches = [pool.submit(launch, count, env) for env in ({}, ON)]
        right, told = (launched.result() for launched in launches)
    wrong = []
    for rank, (unpatched, plugin) in enumerate(zip(right, told, strict=True)):
        # Whatever unpatched cannot do has no place here.
        assert not [seen for seen in unpatched["programs"].values() if isinstance(seen, str)]
        assert plugin["programs"].keys() == unpatched["programs"].keys() | set(plugin["alone"])
        for name, seen in plugin["programs"].items():
            if name in plugin["alone"]:
                is_right = not isinstance(seen, str) and seen[0] == seen[1]
            elif name in plugin["by value"]:
                is_right = seen == told[0]["programs"][name]
            else:
                is_right = seen == unpatched["programs"][name]
            if not is_right:
                wrong.append(f"{name}, rank {rank}: {seen}, {unpatched['programs'].get(name)}")
        wrong += [f"rank {rank}, {problem}" for problem in wrong_warnings(plugin, count)]
        wrong += [
            f"{name}, rank {rank}: the final norm saw NaN: {seen}"
            for name, seen in plugin["norm saw NaN"].items()
            if seen != [rank != 0]
        ]
        assert not any(unpatched["warnings"].values())
        assert {True} not in map(set, unpatched["norm saw NaN"].values())
    assert not wrong, "\n".join(wrong)


def wrong_warnings(plugin, count):
    """Problems with what a rank has logged of prompts: one warning a generation that needs it."""
    for name, warnings in plugin["warnings"].items():
        of_prompts = [text for text in warnings if text.startswith("Another prompt")]
        different = plugin["different"].get(name, {"ranks": [], "generations": 0})
        if name in plugin["by value"]:
            last_alone = name.startswith("another prompt")
            right = [count - 1] if last_alone else [*range(1, count)]
            assert different["ranks"] == right, f"{name} tests nothing: {different}"
        if len(of_prompts) != different["generations"]:
            yield f"{name}: {different['generations']} warnings expected, not {of_prompts}"
        for text in of_prompts:
            named = set(map(int, re.findall(r"\b\d+\b", text)))
            if not set(different["ranks"]) <= named:
                yield f"{name}: does not name ranks {different['ranks']}: {text}"
