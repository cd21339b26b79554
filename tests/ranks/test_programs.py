"""Programs that people run, on real ranks: with the plugin each sees what it sees without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import tiny_checkpoint

SCRIPT = Path(__file__).with_name("rank_programs.py")

BY_VALUE = "speculation by value"
"""Not right by design, and so an error on all ranks: the drafts depend on what workers lack."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = []
    for case in ("qwen2-untied", "ministral3-tied", "qwen3_next-untied"):
        made.append(tmp_path_factory.mktemp("model"))
        tiny_checkpoint.write(case, made[-1])
    return [str(folder) for folder in made]


@pytest.mark.parametrize("count", [2, 3])
def test_programs(folders, count):
    right = ranks.launch(SCRIPT, *folders, ranks=count, timeout=200).results
    told = ranks.launch(
        SCRIPT, *folders, ranks=count, env={"MLX_LM_SKIPHEAD": "1"}, timeout=200
    ).results
    for rank, programs in enumerate(told):
        by_value = programs.pop(BY_VALUE)
        assert by_value == told[0].get(BY_VALUE, by_value)
        assert by_value.startswith("RuntimeError: The ranks differ in what the draft model")
        assert isinstance(right[rank].pop(BY_VALUE), list)
        for name, seen in programs.items():
            assert not isinstance(right[rank][name], str), right[rank][name]
            assert seen == right[rank][name], f"{name}, rank {rank}"
        assert programs.keys() == right[rank].keys()
