"""A worker's share depends on its own sends alone, whatever else its device has to do."""

from __future__ import annotations

from pathlib import Path

import ranks

SCRIPT = Path(__file__).with_name("rank_stream.py")


def test_a_share_does_not_wait_for_other_work_of_a_worker() -> None:
    head_rank, _ = ranks.launch(SCRIPT, ranks=2, timeout=240).results
    assert head_rank == {"generate_step": True, "share_tokens": True}
