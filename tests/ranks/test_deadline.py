"""A rank that stands still, on real ranks with a deadline: all of them end, and say why."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import ranks
import tiny_checkpoint
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


@pytest.mark.parametrize(
    ("stops", "where"),
    [*((rank, where) for where in ("prompt", "decode") for rank in range(3)), (1, "load")],
)
def test_a_rank_that_is_stopped(stops: int, where: str, tmp_path: Path) -> None:
    tiny_checkpoint.write("qwen2-tied", tmp_path)
    arguments = (str(stops), str(AWAKE), where, str(tmp_path))
    done = ranks.launch(SCRIPT, *arguments, ranks=3, env=ON, timeout=60, check=False)
    (stopped,) = re.findall(r"== ([\d.]+) stops", done.stderr)
    assert time.time() - float(stopped) < 15
    line = r"mlx-lm-skiphead: rank (\d) of 3, (.*?): [6-9] s for (.*); (.*)"
    said = re.findall(line, done.stderr)
    # The other one may have been ended by mlx.launch by then, or by a lost connection.
    assert said and str(stops) not in [rank for rank, *_ in said], done.stderr
    for rank, step, what, end in said:
        steps = {
            "prompt": r"prompt, chunk \d+ of 10|step 2, batch 1",
            "load": f"loading {tmp_path}",
        }
        assert re.fullmatch(steps.get(where, r"step \d+, batch 1"), step)
        waits_for = ["rank 0's token"] * (rank > "0") + [f"hidden states of rank {int(rank) + 1}"]
        assert any(other in what for other in [*waits_for, "all ranks to have loaded"])
        assert end == "MLX_LM_SKIPHEAD_DEADLINE=6 is over, exit code 75"
    ended = dict(re.findall(r"rank (\d) (?:exited with code|was) (\S+)", done.stderr))
    assert "75" in ended.values()
    assert all(code in ("75", "1", "killed", "-15") for code in ended.values()), ended
    assert ended[str(stops)] not in ("75", "1")  # the SIGTERM of mlx.launch was waiting for it
