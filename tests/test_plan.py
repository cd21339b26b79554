"""The plan against what real ranks load, for every family; and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_checkpoint
import tiny_models

from mlx_lm_skiphead.cli import main, plan

SCRIPT = Path(__file__).with_name("rank_plan.py")
RANKS = 3
CASES = [case for case in tiny_models.CONFIGS if tiny_models.is_pipelined(case)]
MIXED = [case for case in ("deepseek_v3", "ministral3-tied") if case in CASES]
# Rotation tables and the like are in memory too, and are no weights.
NO_WEIGHTS = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of each case."""
    folder = tmp_path_factory.mktemp("models")
    for case in CASES:
        (folder / case).mkdir()
        tiny_checkpoint.write(case, folder / case)
    for case in MIXED:
        (folder / f"{case} mixed").mkdir()
        tiny_checkpoint.write(case, folder / f"{case} mixed", mixed=True)
    return folder


@pytest.fixture(scope="module")
def loaded(folder) -> dict[str, list[dict[str, Any]]]:
    """What each of the ranks, unpatched and with the plugin, has loaded of each."""
    return {
        mode: ranks.launch(
            SCRIPT, str(folder), ranks=RANKS, env={"MLX_LM_SKIPHEAD": mode}, timeout=200
        ).results
        for mode in ("0", "1")
    }


@pytest.mark.parametrize("case", [*CASES, *(f"{case} mixed" for case in MIXED)])
def test_plan_is_what_ranks_load(case, folder, loaded):
    family, planned = plan.plan(folder / case, RANKS)
    for rank in planned:
        unpatched, skip = (loaded[mode][rank.rank][case] for mode in ("0", "1"))
        assert 0 <= unpatched["loaded"] - rank.unpatched < NO_WEIGHTS
        assert 0 <= skip["loaded"] - rank.skip < NO_WEIGHTS
        assert skip["on disk"] == rank.on_disk
        # In the place of each array on disk there is one number, of eight bytes at most.
        less = sum(rank.on_disk.values()) - (unpatched["loaded"] - skip["loaded"])
        assert 0 <= less <= 8 * 6
    assert case.startswith(family) or family in ("deepseek_v32", "glm4_moe", "qwen3_5")


def test_reads_are_of_some_experts(folder):
    config = tiny_models.CONFIGS["deepseek_v3"]
    used = config["num_experts_per_tok"] / config["n_routed_experts"]
    _, planned = plan.plan(folder / "deepseek_v3", 2)
    for rank in planned:
        assert used * rank.unpatched < rank.reads + 2 * rank.head < rank.unpatched + rank.head


def planned(heads: list[float], layers: float = 10.0) -> list[plan.Rank]:
    """Ranks whose heads take so many ms, and their layers as long as `layers`."""
    return [
        plan.Rank(rank, "", (0, 1), 0, {}, int(layers / ms * 1e6), int(1e6), 1 / ms)
        for rank, ms in enumerate(heads)
    ]


@pytest.mark.parametrize(
    ("heads", "saves"),
    [
        ([1, 1, 1], 0),
        ([1, 1, 4], 3),  # the last rank starts each token when its own head is done
        ([4, 1, 1], -3),
        ([1, 4, 1], 0),  # that head is done before the hidden states come
    ],
)
def test_saved(heads, saves):
    assert plan.saved(planned(heads)) == pytest.approx(saves, abs=1e-3)


def test_a_slow_head_shows_where_layers_are_fast():
    assert plan.saved(planned([1, 4, 1], layers=1.0)) == pytest.approx(2, abs=1e-3)


@pytest.fixture
def model(folder) -> str:
    return str(folder / "deepseek_v3")


def test_text(model, capfd):
    assert main(["plan", model, "-n", "3", "--split", "2,4,1"]) == 0
    said = capfd.readouterr().out
    assert "deepseek_v3, a head of 0.1 MB" in said
    assert "│ middle      │    1-4 │" in said
    assert "nothing but memory is to be gained" in said.replace("\n", " ")


@pytest.mark.parametrize(
    ("bandwidth", "verdict"),
    [
        ("800,400,120", "less per token: unpatched, it waits for rank 2's head"),
        ("120,400,800", "Make the machine of rank 2 rank 0"),
        ("800,800,800", "Nothing but memory is to be gained"),
    ],
)
def test_bandwidth(bandwidth, verdict, model, capfd, monkeypatch):
    monkeypatch.setattr(plan, "period", lambda p, skip: 1e4 * period(p, skip=skip))
    assert main(["plan", model, "-n", "3", "--bandwidth", bandwidth]) == 0
    assert verdict in capfd.readouterr().out.replace("\n", " ")


period = plan.period


def test_json(model, capfd):
    arguments = ["plan", model, "-n", "2", "--bandwidth", "2,1", "--json"]
    assert main(arguments) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["family"] == "deepseek_v3" and told["fastest_rank"] == 0
    head = told["head_bytes"]
    assert told["saved_ms_per_token"] == pytest.approx(head / 2e6, rel=1e-6)
    first = told["ranks"][1]
    assert first["role"] == "first stage" and first["on_disk"] == {"lm_head": head}
    assert first["memory_bytes"]["unpatched"] - first["memory_bytes"]["skip"] == head


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere/at all", "-n", "2"], "there is no folder nowhere/at all"),
        (["nobody/nothing", "-n", "2"], "no copy of such a hub repository"),
        (["{empty}", "-n", "2"], "it has no config.json"),
        (["{llama}", "-n", "2"], "does not support mlx_lm.models.llama"),
        (["{model}", "-n", "9"], "9 ranks need 9 layers, and this model has 7"),
        (["{model}", "-n", "2", "--split", "4,4"], "8 layers over 2 ranks, the model has 7"),
        (["{model}", "-n", "2", "--bandwidth", "1"], "--bandwidth has 1 values for 2 ranks"),
        (["{headless}", "-n", "2"], "files of the model are missing"),
    ],
)
def test_what_cannot_be(arguments, said, model, capfd, tmp_path):
    for name in ("empty", "llama", "headless"):
        (tmp_path / name).mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "llama" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    tiny_checkpoint.write("deepseek_v3", tmp_path / "headless")
    (tmp_path / "headless" / tiny_checkpoint.HEAD_FILE).unlink()
    names = {name: str(tmp_path / name) for name in ("empty", "llama", "headless")}
    assert main(["plan", *(a.format(model=model, **names) for a in arguments)]) == 2
    captured = capfd.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out


LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    "arguments", [["-n", "1"], ["-n", "2", "--split", "3,0"], ["-n", "2", "--bandwidth", "fast,1"]]
)
def test_wrong_arguments(arguments, model, capsys):
    with pytest.raises(SystemExit) as error:
        main(["plan", model, *arguments])
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err
