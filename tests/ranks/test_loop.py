"""The wrapped loop on real ranks: what a user may do to it, against one process without it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ranks

SCRIPT = Path(__file__).with_name("rank_loop.py")
ON = {"MLX_LM_SKIPHEAD": "1"}


ALONE = [
    *("short_requests", "in_a_thread", "two_models", "callbacks", "failures", "not_ours"),
    *("speculative", "cancelled", "own_loop"),
]
WITH_PLUGIN = [*ALONE, "uninstalled_midway", "counted"]


@pytest.fixture(scope="module")
def right() -> dict[str, Any]:
    """By scenario, what one process without the plugin says."""
    return ranks.alone(SCRIPT, *ALONE, timeout=240).results[0]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def count(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def told(count) -> dict[str, list[Any]]:
    """By scenario, what each of several ranks with the plugin says."""
    return by_scenario(ranks.launch(SCRIPT, *WITH_PLUGIN, ranks=count, env=ON, timeout=300))


@pytest.fixture(scope="module")
def unpatched(count) -> dict[str, list[Any]]:
    return by_scenario(ranks.launch(SCRIPT, "failures", "guard_alone", ranks=count, timeout=200))


def by_scenario(launch: ranks.Launch) -> dict[str, list[Any]]:
    return {name: [rank[name] for rank in launch.results] for name in launch.results[0]}


def test_the_guard_of_the_pull_request_alone_breaks_generation(unpatched):
    """Every rank samples from its own logits: skipping the head takes sharing the token."""
    told = unpatched["guard_alone"]
    assert all(rank["upstream"] == told[0]["upstream"] for rank in told)
    assert told[0]["guard alone"] != told[0]["upstream"]
    assert told[0]["guard alone"] != told[1]["guard alone"]


@pytest.mark.parametrize("scenario", ["short_requests", "in_a_thread", "not_ours", "cancelled"])
def test_all_is_equal(scenario, told, right):
    """A hundred short requests; generating in a thread; loops that are not wrapped, also when
    hidden; requests of a batch that are cancelled."""
    assert told[scenario] == [right[scenario]] * len(told[scenario])


def test_another_model_in_another_thread(told, right):
    """What it answers is right, and does not change: the runs and calls of a thread are its own."""
    expected = right["two_models"]
    assert len(expected["plain"]) == 1
    for rank in told["two_models"]:
        assert rank["pipelined"] == expected["pipelined"] and rank["plain"] == expected["plain"]
        (numbers,) = rank["direct"]
        assert numbers == pytest.approx(expected["direct"][0], abs=1e-3)


def test_a_callback_may_call_the_model(told, right):
    expected = right["callbacks"]
    for rank in told["callbacks"]:
        assert rank["tokens"] == expected["tokens"]
        for seen, numbers in zip(rank["seen"], expected["seen"], strict=True):
            assert seen == pytest.approx(numbers, abs=1e-3)


def test_what_fails_on_rank_zero_fails_on_all_and_they_go_on(told, unpatched, right):
    """As unpatched: every rank runs samplers and processors, and raises by itself, at that step."""
    calling = right["failures"]["model"]
    expected = dict(unpatched["failures"][0])
    only_rank_0 = expected.pop("only rank 0's")
    for number, rank in enumerate(map(dict, told["failures"])):
        model = rank.pop("model")  # a sampler that calls the model
        assert model["error"] == "none" and model["seen"] == calling["seen"]
        assert model["after"] == rank["shape"]["after"]
        values = rank.pop("only rank 0's")
        assert ("failed on rank 0" if number else "Broken: at values") in values["error"]
        # What only rank 0 knows takes a step to be known.
        assert values["seen"][:-1] == only_rank_0["seen"]
        assert values["after"] == only_rank_0["after"]
        assert rank == expected
    for kind, error in {
        "the worker's": "none",
        "exit": "SystemExit: at call 3",
        "its own": "Stopped: at call 4",
        "a sampler": "Broken: at call 4",
    }.items():
        assert expected[kind]["error"] == error


def test_uninstalling_during_a_generation_is_an_error(told):
    answers = told["uninstalled_midway"]
    for rank, answer in enumerate(answers):
        assert answer["tokens"] == answers[0]["tokens"] and answer["next"] == answers[0]["next"]
        assert answer["restored"]
        running, batch, ended = answer["refused"]
        assert "while a generation is running." in running and running == batch
        assert ended is None
        assert answer["heads, running"] == (6 if rank == 0 else 0)
        assert answer["heads, next"] == 9


def test_speculative_decoding(told, right):
    expected = right["speculative"]
    assert len({str(answer["tokens"]) for answer in expected.values()}) > 3
    for rank, answers in enumerate(told["speculative"]):
        for name, answer in answers.items():
            assert answer["tokens"] == expected[name]["tokens"], f"rank {rank}, {name}"
            assert answer["random"] == expected[name]["random"], f"rank {rank}, {name}"
            assert answer["heads"] == (expected[name]["heads"] if rank == 0 else 0), name
            if rank == 0:
                assert answer["logprobs"] == pytest.approx(expected[name]["logprobs"], abs=1e-3)


def test_no_more_collectives_and_sampling_as_upstream(told):
    for rank, loops in enumerate(told["counted"]):
        for loop, ways in loops.items():
            upstream, ours = ways["uninstall"], ways["install"]
            assert ours["collectives"] == upstream["collectives"], f"{loop}, rank {rank}"
            for what in ("samplers", "processors"):
                assert ours[what] == upstream[what], f"{loop}, rank {rank}, {what}"
        assert loops["one"]["uninstall"]["samplers"] == 11


def test_a_loop_of_the_users_own(told, right):
    expected = right["own_loop"]
    for rank, answer in enumerate(told["own_loop"]):
        assert answer["first"] == expected["first"]
        assert answer["type"] == expected["type"]
        assert answer["not computed"] == (rank != 0)
        assert answer["mixed"] == expected["first"]
        assert answer["shared"] == [[10], [20]]
        assert answer["inside"] == [1, 2] and answer["choice"] == [10**6]
        wide = [[number, [], "mlx.core.int64"] for number in (-5, 2**40, -(2**40))]
        assert answer["wide"] == wide and answer["small"] == [-7, 9]
        assert [error.partition(".")[0] for error in answer["errors"]] == [
            "TypeError: share_tokens() takes an array of token ids, integers, not mlx",
            "TypeError: share_tokens() takes an array of token ids, integers, not list",
        ]


@pytest.mark.parametrize("loop", ["one", "batch"])
@pytest.mark.parametrize("victim", ["0", "2"])
def test_a_lost_rank_ends_the_others_with_an_error(victim, loop):
    lost = ranks.launch(SCRIPT, "killed", victim, loop, ranks=3, env=ON, timeout=60, check=False)
    codes = set(re.findall(r"exited with code (\S+)", lost.stderr))
    # Their own error, or mlx.launch's SIGTERM where it was first; never a crash.
    assert codes <= {"-9", "1", "-15"}, lost.stderr
    assert "-9" in codes
