"""A worker's share depends on its own sends alone, whatever else its device has to do."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx
import ranks

from mlx_lm_skiphead.skipping.sharing import FINE, Note, Share, Step

SCRIPT = Path(__file__).with_name("rank_stream.py")


def test_a_share_does_not_wait_for_other_work_of_a_worker() -> None:
    head_rank, _ = ranks.launch(SCRIPT, ranks=2, timeout=240).results
    assert head_rank == {"generate_step": True, "share_tokens": True}


def test_to_look_at_a_share_does_not_wait_for_the_next_step() -> None:
    everyone = mx.array([7, FINE, 5, 0, FINE, 5], mx.uint32)
    numbers = mx.random.normal((1 << 22,))
    mx.eval(everyone, numbers)
    with mx.stream(mx.new_stream(mx.cpu)):
        step = mx.sort(numbers)
        mx.async_eval(step)
        began = time.perf_counter()
        assert Share(everyone, 1, 3, Step()).notes() == [Note(FINE, 5, []), Note(FINE, 5, [])]
        looked = time.perf_counter() - began
        mx.eval(step)
        assert looked < (time.perf_counter() - began) / 4
