"""A rank that stands still, on real ranks with a deadline: all of them end, and say why."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import ranks
import tiny_models

SCRIPT = Path(__file__).with_name("rank_deadline.py")
ON = {
    "MLX_LM_SKIPHEAD": "1",
    "MLX_LM_SKIPHEAD_WATCH": "0",
    "MLX_LM_SKIPHEAD_DEADLINE": "6",
}
AWAKE = 9
"""After how many seconds a rank that was stopped runs again. A process that is stopped cannot end,
and mlx.launch waits for it."""
pytestmark = pytest.mark.skipif(tiny_models.EVENLY, reason="mlx-lm before 0.32 has no qwen2")


@pytest.mark.parametrize("where", ["prompt", "decode"])
@pytest.mark.parametrize("stops", [0, 1, 2])
def test_a_rank_that_is_stopped(stops: int, where: str) -> None:
    arguments = (str(stops), str(AWAKE), where)
    done = ranks.launch(SCRIPT, *arguments, ranks=3, env=ON, timeout=60, check=False)
    (stopped,) = re.findall(r"== ([\d.]+) stops", done.stderr)
    assert time.time() - float(stopped) < 15
    said = re.findall(r"mlx-lm-skiphead: (rank (\d) of 3, (.*?): [67] s for (.*); .*)", done.stderr)
    lines = {int(rank): (step, what) for _, rank, step, what in said}
    # The other one may have been ended by mlx.launch by then, or by a lost connection.
    assert lines and stops not in lines, done.stderr
    for rank, (step, what) in lines.items():
        assert re.fullmatch(r"prompt, chunk \d+ of 10|step \d+, batch 1", step)
        assert where == "prompt" or step.startswith("step")
        waits_for = ["rank 0's token"] * (rank > 0) + [f"hidden states of rank {rank + 1}"]
        assert any(other in what for other in waits_for)
    assert all("MLX_LM_SKIPHEAD_DEADLINE=6 is over" in line for line, *_ in said)
    ended = dict(re.findall(r"rank (\d) (?:exited with code|was) (\S+)", done.stderr))
    assert "75" in ended.values()
    assert all(code in ("75", "1", "killed", "-15") for code in ended.values()), ended
    assert ended[str(stops)] not in ("75", "1")  # the SIGTERM of mlx.launch was waiting for it
