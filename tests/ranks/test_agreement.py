"""Ranks that disagree: an error that says so, in seconds, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import tiny_checkpoint

from mlx_lm_skiphead.cli.ranks import free_ports

SCRIPT = Path(__file__).with_name("rank_agreement.py")
FIX = "mlx.launch --env MLX_LM_SKIPHEAD=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint.write("deepseek_v3", folder)
    return str(folder)


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def told(request, folder) -> list[dict[str, str | None]]:
    return ranks.launch(SCRIPT, folder, "each", ranks=request.param).results


def errors(told, name: str) -> list[tuple[int, list[str | None]]]:
    """For each rank as the odd one, the error of each rank."""
    return [(odd, [rank[f"{name} {odd}"] for rank in told]) for odd in range(len(told))]


def test_nothing_differs(told):
    for _, said in errors(told, "nothing"):
        assert said == [None] * len(told)


def test_off_on_one(told):
    count = len(told)
    for odd, said in errors(told, "off"):
        for rank, error in enumerate(said):
            if rank == odd:
                assert error is None  # it knows nothing of the plugin
            else:
                assert f"on in {count - 1} of {count} ranks, rank {rank} among them" in error
                assert "and off in 1" in error and FIX in error


def test_on_on_one(told):
    count = len(told)
    for odd, said in errors(told, "on"):
        for rank, error in enumerate(said):
            if rank == odd:
                assert f"on in 1 of {count} ranks, rank {rank} among them" in error
                assert FIX in error
            else:
                assert error is None


def test_another_mode(told):
    count = len(told)
    for odd, said in errors(told, "hidden"):
        for error in said:
            assert "The ranks differ in MLX_LM_SKIPHEAD: " in error and FIX in error
            assert f"hidden on rank {odd}" in error and error.count("on on rank") == count - 1


def test_another_protocol(told):
    for _, said in errors(told, "protocol"):
        assert all("that do not work together" in error for error in said)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("plugin", "mlx-lm-skiphead", "9.9"),
        ("mlx-lm", "mlx-lm", "0.0.1"),
        ("table", "families known", ""),
        ("refused", "left to upstream", "mistral4"),
    ],
)
def test_another_version(name, setting, value, told):
    for odd, said in errors(told, name):
        for error in said:
            assert f"The ranks differ in {setting}: " in error
            assert f"{value} on rank {odd}" in error if value else f" on rank {odd}" in error
            assert "install the same versions" in error


def test_a_load_that_fails_on_one_fails_on_all(told):
    for odd, said in errors(told, "fails"):
        for rank, error in enumerate(said):
            if rank == odd:
                assert "No such file" in error and "rank" not in error  # mlx-lm's
            else:
                assert f"cannot be loaded by rank {odd} (FileNotFoundError(" in error
    for rank in told:
        assert "No such file" in rank["all fail"] and "rank" not in rank["all fail"]
        assert rank["right"] is None


def test_a_rank_that_loads_nothing(told, folder):
    count = len(told)
    for odd, said in errors(told, "busy"):
        for rank, error in enumerate(said):
            if rank == odd:
                assert error is None
            else:
                assert f"This is rank {rank} of {count}, loading {folder}, and 1 of the" in error
                assert "they may have failed to load it, or lack it" in error and FIX not in error


def test_garbage_is_the_plugins_error(told):
    """And not one of a parser's."""
    for _, said in errors(told, "garbage"):
        assert all("arrived as garbage" in error and "doctor --links" in error for error in said)


@pytest.mark.parametrize("values", ["1/0", "0/1"])
@pytest.mark.parametrize(("count", "odd"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_the_launch_ends(values, count, odd, folder):
    done = ranks.launch(SCRIPT, folder, f"{odd}+{values}", ranks=count, check=False, timeout=30)
    assert done.results == [None] * count
    assert done.seconds < 20
    assert "SkipheadError" in done.stderr and FIX in done.stderr


@pytest.mark.parametrize("odd", [0, 1])
def test_a_server_ends(odd, folder):
    """It loads in a thread, whose end would leave the ranks waiting; with `run` they end."""
    server = ["mlx_lm.server", "--model", folder, "--pipeline", "--port", str(free_ports(1))]
    done = ranks.launch(SCRIPT, folder, f"{odd}+1/0", *server, ranks=2, check=False, timeout=40)
    assert done.seconds < 20
    assert f"on in 1 of 2 ranks, rank {odd} among them" in done.stderr and FIX in done.stderr
