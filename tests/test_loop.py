"""The wrapped loop on real ranks: what a user may do to it, against one process without it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ranks

from mlx_lm_skiphead import rest

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


def test_workers_rest_while_they_wait_for_a_slow_rank_zero():
    right = alone("resting")
    assert right.pop("slept") == []
    told = on_ranks("resting", count=3)
    for number, rank in enumerate(told):
        slept = rank.pop("slept")
        assert bool(slept) == (number > 0)
        assert all(0.005 < seconds < 1 for seconds in slept)
        assert rank == right


@pytest.mark.parametrize(
    "hosts, crowded",
    [
        (["10.0.0.1:5000", "10.0.0.1:5001", "10.0.0.1:5002"], True),
        (["10.0.0.1:5000", "10.0.0.1:5001"], False),
        (["10.0.0.1:5000", "10.0.0.1:5001", "10.0.0.2:5000"], False),
        ({"hosts": 3}, False),
        (None, False),
    ],
)
def test_ranks_are_crowded_on_one_machine_with_fewer_cores(hosts, crowded, tmp_path, monkeypatch):
    file = tmp_path / "hosts.json"
    if hosts is not None:
        ring = [[address] for address in hosts] if isinstance(hosts, list) else hosts
        file.write_text(json.dumps(ring))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setenv("MLX_HOSTFILE", str(file))
    assert rest.crowded.__wrapped__() is crowded
    monkeypatch.delenv("MLX_HOSTFILE")
    assert rest.crowded.__wrapped__() is False


def test_what_fails_on_rank_zero_fails_on_all_and_they_go_on():
    """As unpatched: there every rank runs samplers and processors, and raises by itself."""
    for count in (2, 3):
        told = on_ranks("failures", count=count)
        unpatched = on_ranks("failures", count=count, plugin=False)[0]
        for kind, right in unpatched.items():
            assert right["error"].startswith("Broken: "), kind
            assert told[0][kind]["error"] == right["error"], kind
            for rank in told:
                # Upstream has one token more in flight, which it drops.
                seen = rank[kind]["seen"]
                assert seen[: len(right["seen"])] == right["seen"], kind
                assert len(seen) - len(right["seen"]) <= 3, kind
                assert rank[kind]["after"] == right["after"], kind
        for kind, message in {
            "shape": "ValueError: The sampler returned an array of shape () where mlx-lm-skiphead",
            "model": "RuntimeError: a sampler called a pipelined model. With mlx-lm-skiphead,",
        }.items():
            assert told[0][kind]["error"].startswith(message)
        for worker in told[1:]:
            for kind, outcome in worker.items():
                assert "failed on rank 0" in outcome["error"], kind
                assert outcome["seen"] == told[0][kind]["seen"], kind


@pytest.mark.parametrize("count", [2, 3])
def test_uninstall_during_a_generation(count):
    told = on_ranks("uninstalled_midway", count=count)
    for rank, answer in enumerate(told):
        assert answer["tokens"] == told[0]["tokens"] and answer["next"] == told[0]["next"]
        assert answer["restored"]
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
def test_no_more_collectives_and_no_sampling_on_workers(count):
    for rank, told in enumerate(on_ranks("counted", count=count)):
        for loop, ways in told.items():
            upstream, ours = ways["uninstall"], ways["install"]
            assert ours["collectives"] == upstream["collectives"], f"{loop}, rank {rank}"
            for what in ("samplers", "processors"):
                expected = upstream[what] if rank == 0 else 0
                assert ours[what] == expected, f"{loop}, rank {rank}, {what}"
        assert told["one"]["uninstall"]["samplers"] == 11


def test_cancelling_and_uninstalling_in_a_batch():
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
