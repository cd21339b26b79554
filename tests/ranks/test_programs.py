"""Programs that people run, on real ranks: with the plugin each sees what it sees without it."""

from __future__ import annotations

import pytest
from programs.judging import both_ways, problems
from programs.registry import ALONE


@pytest.mark.parametrize("count", [2, 3])
def test_programs(count):
    unpatched, plugin = both_ways(count, timeout=200)
    wrong = []
    for name, judged in plugin[0]["judged"].items():
        wrong += [f"{name}, {problem}" for problem in problems(name, unpatched, plugin)]
        for rank in (*unpatched, *plugin):
            assert rank["judged"][name] == judged
            has_run = rank in plugin or judged != ALONE
            assert (name in rank["programs"]) == has_run, name
    assert not wrong, "\n".join(wrong)
