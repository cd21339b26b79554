"""A real model through mlx-lm's own front doors, on 1, 2 and 3 ranks with the plugin."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_models

SCRIPT = Path(__file__).with_name("rank_real.py")
pytestmark = pytest.mark.skipif(
    tiny_models.EVENLY, reason="mlx-lm before 0.32 cannot pipeline qwen2, as which this model loads"
)
ON = {"MLX_LM_SKIPHEAD": "1"}


@pytest.fixture(scope="module")
def right(real_model: Path) -> dict[str, Any]:
    """What one process without the plugin says."""
    return ranks.alone(SCRIPT, str(real_model), timeout=300).results[0]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])
def test_real_model(count: int, right: dict[str, Any], real_model: Path) -> None:
    told = ranks.launch(SCRIPT, str(real_model), ranks=count, env=ON, timeout=600).results
    assert right["mode"] == "off"
    assert right["stop"]["text"] == "The capital of France is Paris."
    assert right["stop"]["finish"][-1] == "stop" and right["length"]["finish"][-1] == "length"
    assert len(right["first token"]["tokens"]) == 1
    assert right["stop at once"]["finish"] == ["stop"] and not right["stop at once"]["text"]
    for rank, answers in enumerate(told):
        assert answers["mode"] == "on"
        for name in ("stop", "length", "first token", "seeded", "stop at once"):
            for part in ("tokens", "text", "finish"):
                assert answers[name][part] == right[name][part], f"rank {rank}, {name}, {part}"
            if rank == 0:
                logprobs = pytest.approx(right[name]["logprobs"], abs=1e-3)
                assert answers[name]["logprobs"] == logprobs, name
        assert answers["generate"] == right["generate"]
    # Only speeds may differ.
    assert _without_numbers(told[0]["chat"]) == _without_numbers(right["chat"])
    assert "Averages: " in told[0]["benchmark"]


def test_one_rank(right: dict[str, Any], real_model: Path) -> None:
    parts = ("stop", "seeded")
    (told,) = ranks.alone(SCRIPT, str(real_model), *parts, env=ON, timeout=300).results
    assert told["mode"] == "on"
    for name in parts:
        assert told[name] == {**right[name], "logprobs": pytest.approx(right[name]["logprobs"])}


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+\.\d+", "#", text)
