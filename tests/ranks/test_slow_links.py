"""A token costs one latency of a link a rank, as unpatched: nothing of ours adds one."""

from __future__ import annotations

from pathlib import Path

import pytest
import slow_links
import warm


@pytest.mark.long
def test_a_token_costs_one_latency_a_rank(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(warm.JOIN, "1")
    model = slow_links.write_model(tmp_path)
    for count, slopes in (
        (3, slow_links.decoding(model, 3, tokens=12, rounds=2)),
        (2, slow_links.serving(model, 2, tokens=16, requests=3, ways=["plugin"])),
    ):
        for name, latencies in slopes.items():
            if name.startswith("a token"):
                # The first of so few tokens are not yet in step, in both ways.
                assert count - 0.5 < latencies["plugin"] < count + 0.9, (name, latencies)
