"""The wrapped loop on real ranks: what a user may do to it, against one process without it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ranks

SCRIPT = Path(__file__).with_name("rank_loop.py")
ON = {"MLX_LM_SKIPHEAD": "1"}


def alone(*scenario: str) -> Any:
    return ranks.alone(SCRIPT, *scenario).results[0]


def on_ranks(*scenario: str, count: int = 2, plugin: bool = True, check: bool = True) -> list[Any]:
    env = ON if plugin else {}
    return ranks.launch(SCRIPT, *scenario, ranks=count, env=env, check=check).results


def test_the_guard_of_the_pull_request_alone_breaks_generation():
    """Every rank samples from its own logits: skipping the head takes sharing the token."""
    told = on_ranks("guard_alone", plugin=False)
    assert told[0]["upstream"] == told[1]["upstream"]
    assert told[0]["guard alone"] != told[0]["upstream"]
    assert told[0]["guard alone"] != told[1]["guard alone"]


@pytest.mark.parametrize("count", [2, 3])
def test_a_hundred_short_requests(count):
    right = alone("short_requests")
    assert on_ranks("short_requests", count=count) == [right] * count


def test_generation_in_a_thread():
    assert on_ranks("in_a_thread") == [alone("in_a_thread")] * 2


def test_another_model_in_another_thread():
    """What it answers is right, and does not change: the runs and calls of a thread are its own."""
    right = alone("two_models")
    assert len(right["plain"]) == 1
    for told in on_ranks("two_models"):
        assert told["pipelined"] == right["pipelined"] and told["plain"] == right["plain"]
        (numbers,) = told["direct"]
        assert numbers == pytest.approx(right["direct"][0], abs=1e-3)


def test_a_callback_may_call_the_model():
    right = alone("callbacks")
    for told in on_ranks("callbacks"):
        assert told["tokens"] == right["tokens"]
        for seen, expected in zip(told["seen"], right["seen"], strict=True):
            assert seen == pytest.approx(expected, abs=1e-3)


def test_what_fails_on_rank_zero_fails_on_all_and_they_go_on():
    """As unpatched: every rank runs samplers and processors, and raises by itself, at that step."""
    calling = alone("failures")["model"]
    for count in (2, 3):
        told = on_ranks("failures", count=count)
        unpatched = on_ranks("failures", count=count, plugin=False)[0]
        only_rank_0 = unpatched.pop("only rank 0's")
        for rank in told:
            model = rank.pop("model")  # a sampler that calls the model
            assert model["error"] == "none" and model["seen"] == calling["seen"]
            assert model["after"] == rank["shape"]["after"]
            values = rank.pop("only rank 0's")
            expected = "failed on rank 0" if rank is not told[0] else "Broken: at values"
            assert expected in values["error"]
            # What only rank 0 knows takes a step to be known.
            assert values["seen"][:-1] == only_rank_0["seen"]
            assert values["after"] == only_rank_0["after"]
            assert rank == unpatched
        for kind, error in {
            "the worker's": "none",
            "exit": "SystemExit: at call 3",
            "its own": "Stopped: at call 4",
            "a sampler": "Broken: at call 4",
        }.items():
            assert unpatched[kind]["error"] == error


@pytest.mark.parametrize("count", [2, 3])
def test_uninstalling_during_a_generation_is_an_error(count):
    told = on_ranks("uninstalled_midway", count=count)
    for rank, answer in enumerate(told):
        assert answer["tokens"] == told[0]["tokens"] and answer["next"] == told[0]["next"]
        assert answer["restored"]
        running, batch, ended = answer["refused"]
        assert "generation is running, and here run 1." in running and running == batch
        assert ended is None
        assert answer["heads, running"] == (6 if rank == 0 else 0)
        assert answer["heads, next"] == 9


def test_what_is_not_wrapped_is_upstreams_also_when_hidden():
    assert on_ranks("not_ours") == [alone("not_ours")] * 2


@pytest.mark.parametrize("count", [2, 3])
def test_speculative_decoding(count):
    right = alone("speculative")
    assert len({str(answer["tokens"]) for answer in right.values()}) > 3
    for rank, told in enumerate(on_ranks("speculative", count=count)):
        for name, answer in told.items():
            assert answer["tokens"] == right[name]["tokens"], f"rank {rank}, {name}"
            assert answer["random"] == right[name]["random"], f"rank {rank}, {name}"
            assert answer["heads"] == (right[name]["heads"] if rank == 0 else 0), name
            if rank == 0:
                assert answer["logprobs"] == pytest.approx(right[name]["logprobs"], abs=1e-3)


@pytest.mark.parametrize("count", [2, 3])
def test_no_more_collectives_and_sampling_as_upstream(count):
    for rank, told in enumerate(on_ranks("counted", count=count)):
        for loop, ways in told.items():
            upstream, ours = ways["uninstall"], ways["install"]
            assert ours["collectives"] == upstream["collectives"], f"{loop}, rank {rank}"
            for what in ("samplers", "processors"):
                assert ours[what] == upstream[what], f"{loop}, rank {rank}, {what}"
        assert told["one"]["uninstall"]["samplers"] == 11


def test_cancelling_in_a_batch():
    right = alone("cancelled")
    for told in on_ranks("cancelled"):
        assert told["told"] == right["told"]
        assert told["random"] == right["random"]


@pytest.mark.parametrize("count", [2, 3])
def test_a_loop_of_the_users_own(count):
    right = alone("own_loop")
    for rank, told in enumerate(on_ranks("own_loop", count=count)):
        assert told["first"] == right["first"]
        assert told["type"] == right["type"]
        assert told["not computed"] == (rank != 0)
        assert told["shared"] == [[10], [20]]
        assert [error.partition(".")[0] for error in told["errors"]] == [
            "RuntimeError: share_tokens() was called inside a rank_zero_head() block or a loop of "
            "mlx-lm",
            "TypeError: share_tokens() takes an array of token ids, integers, not mlx",
            "TypeError: share_tokens() takes an array of token ids, integers, not list",
            "ValueError: share_tokens() got tokens of shape (1,) after a model call with a batch "
            "of 2",
        ]


@pytest.mark.parametrize("loop", ["one", "batch"])
@pytest.mark.parametrize("victim", ["0", "2"])
def test_a_lost_rank_ends_the_others_with_an_error(victim, loop):
    lost = ranks.launch(SCRIPT, "killed", victim, loop, ranks=3, env=ON, timeout=60, check=False)
    codes = set(re.findall(r"exited with code (\S+)", lost.stderr))
    # Their own error, or mlx.launch's SIGTERM where it was first; never a crash.
    assert codes <= {"-9", "1", "-15"}, lost.stderr
    assert "-9" in codes
