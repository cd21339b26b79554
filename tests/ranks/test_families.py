"""Every family on real ranks with the plugin, against one process without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_models

from mlx_lm_skiphead.families import FAMILIES

SCRIPT = Path(__file__).with_name("rank_families.py")
ALL = [
    # A tieable family's usual head is one of the two kinds that have cases of their own.
    *(case for case in tiny_models.CONFIGS if case not in tiny_models.TIEABLE),
    "deepseek_v3+quantized",
    "qwen2-tied+quantized",
]
CASES = [case for case in ALL if tiny_models.is_pipelined(case.partition("+")[0])]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def count(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def right_alone() -> dict[str, Any]:
    """What one process without the plugin answers."""
    return ranks.alone(SCRIPT, *CASES, timeout=300).results[0]


@pytest.fixture(scope="module")
def right(right_alone, count) -> dict[str, Any]:
    """What unpatched mlx-lm answers: one process, or rank 0 of as many where they differ."""
    if not tiny_models.EVENLY:
        return right_alone
    return ranks.launch(SCRIPT, *CASES, ranks=count, timeout=300).results[0]


@pytest.fixture(scope="module")
def told(count) -> list[dict[str, Any]]:
    """What each of several ranks with the plugin answers."""
    return ranks.launch(
        SCRIPT, *CASES, ranks=count, env={"MLX_LM_SKIPHEAD": "1"}, timeout=600
    ).results


def test_the_cases_cover_the_table():
    names = {case.partition("-")[0].partition("+")[0] for case in ALL}
    assert names == {family.name for family in FAMILIES}


def test_answers_vary(right_alone):
    """Or agreeing would mean little."""
    for case in CASES:
        tokens = [tuple(answer["tokens"]) for answer in right_alone[case]["requests"].values()]
        assert len(set(tokens)) == len(tokens), case
        assert sum(len(set(t)) for t in tokens) > 12, case


def tokens_of(told: list[Any]) -> list[Any]:
    """Of each response its request and its token or finish reason, without the logprob."""
    return [response[:2] for response in told]


@pytest.mark.parametrize("case", CASES)
def test_family(case, right, told):
    answers = right[case]["requests"]
    for rank, answered in enumerate(t[case] for t in told):
        for kind in ("requests", "requests, hidden"):
            for name, answer in answered[kind].items():
                where = f"{case}, {name}, rank {rank}, {kind}"
                assert answer["tokens"] == answers[name]["tokens"], where
                assert answer["random"] == answers[name]["random"], where
                if rank == 0:
                    expected = pytest.approx(answers[name]["logprobs"], abs=1e-3)
                    assert answer["logprobs"] == expected, where
                else:
                    assert all(p != p for p in answer["logprobs"]), f"{where}: not NaN"
        assert answered["heads per token"] == (1 if rank == 0 else 0), case

        batch, expected = answered["batch"], right[case]["batch"]
        if isinstance(expected, dict):
            assert tokens_of(batch["told"]) == tokens_of(expected["told"]), case
            assert batch["random"] == expected["random"], case
            assert batch["heads"] == (expected["heads"] if rank == 0 else 0), case
            assert batch["batch_generate"] == expected["batch_generate"], case
            if rank == 0:
                assert batch["told"] == [pytest.approx(r, abs=1e-3) for r in expected["told"]]
        else:
            assert batch == expected

        # What a rank never uses in a loop is on disk, until a direct call uses it.
        head, embedding = right[case]["sizes"]
        name = "word_embeddings" if case.startswith("bailing") else "embed_tokens"
        unused = {} if head is None or rank == 0 else {"lm_head": head}
        if rank != len(told) - 1 and not (head is None and rank == 0):
            unused[name] = embedding
        assert answered["on disk"] == unused, case
        assert answered["attributes"] == right[case]["sizes"], case
        unused = {} if head is None or name not in unused else {name: embedding}
        assert answered["on disk, after a direct call"] == unused, case

        # Outside the loops every rank gets logits, as from upstream.
        logits = right[case]["direct"]
        near = pytest.approx(logits["numbers"], abs=1e-2)
        assert answered["direct"] == {"shape": logits["shape"], "numbers": near}, case
        if rank == 0:
            assert answered["direct, hidden"] == {"shape": logits["shape"], "numbers": near}, case
        else:
            hidden = answered["direct, hidden"]
            assert hidden["shape"] == [*logits["shape"][:2], tiny_models.HIDDEN], case
            if case != "muse_spark":  # which scales and caps what its head gives
                assert hidden["through the head"] == near, case
