"""Long runs and faults: ranks that are killed, stopped, late. With the plugin as without it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ranks

SOAK = Path(__file__).with_name("rank_soak.py")
FAULTS = Path(__file__).with_name("rank_faults.py")
ON = {"MLX_LM_SKIPHEAD": "1"}


@pytest.mark.long
@pytest.mark.parametrize(("count", "steps"), [(2, 10_000), (4, 3_000)])
def test_soak(count: int, steps: int) -> None:
    right = ranks.launch(SOAK, "1", "1", ranks=count, timeout=100).results
    told = ranks.launch(SOAK, str(steps), "1000", ranks=count, env=ON, timeout=900).results
    for rank, result in enumerate(told):
        assert result["steps"] >= steps
        assert result["tokens"] == right[0]["tokens"], rank
        first, last = result["memory"]
        assert math.isclose(first, last, rel_tol=0.01), rank


def faults(what: str, rank: int, *, plugin: bool, **options: Any) -> ranks.Launch:
    env = ON if plugin else {}
    return ranks.launch(FAULTS, what, str(rank), ranks=2, env=env, timeout=60, **options)


@pytest.mark.parametrize("plugin", [False, True], ids=["unpatched", "plugin"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["prefill", "decode", "between"])
def test_a_killed_rank_ends_the_launch(when: str, rank: int, plugin: bool) -> None:
    done = faults(f"killed in {when}", rank, plugin=plugin, check=False)
    assert done.results == [None, None]
    assert done.seconds < 30


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["stopped for five seconds", "ten seconds late"])
def test_a_rank_that_lags_changes_nothing(what: str, rank: int) -> None:
    right = ranks.alone(FAULTS, "nothing", "0").results[0]
    assert faults(what, rank, plugin=True).results == [right, right]


@pytest.mark.parametrize("plugin", [False, True], ids=["unpatched", "plugin"])
@pytest.mark.parametrize("what", ["sampler", "processor"])
def test_an_error_of_rank_zero_ends_the_launch(what: str, plugin: bool) -> None:
    done = faults(f"{what} raises", 0, plugin=plugin, check=False)
    assert done.results == [None, None]
    assert done.seconds < 30
    assert f"ZeroDivisionError: in a {what}" in done.stderr
