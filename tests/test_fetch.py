"""Which files each rank fetches from a hub on this machine, and what comes of those it does not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import hub as hubs
import pytest
import ranks
import tiny_checkpoint
import tiny_models
from warm import python

from mlx_lm_skiphead.cli import main

SCRIPT = Path(__file__).with_name("rank_fetch.py")
FILES = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
LAYERS = [1, 2, 2, 3, 3, 4]
"""By layer, the number of its file. The first has the embedding too, the last norm and head."""

UNPATCHED = {2: ["134", "124"], 3: ["134", "1234", "124"]}
"""By count of ranks and rank, the numbers of the files that upstream asks for."""
PLUGIN = {
    "untied": {2: ["34", "12"], 3: ["34", "23", "12"]},
    "tied": {2: ["134", "12"], 3: ["134", "23", "12"]},
}
CAST = [{"repo": "tiny/cast"}] if tiny_models.is_pipelined("kimi_k3") else []
"""Ranks send each other the type of the embedding, and nearly all weights have another."""
HIDDEN = ["34", "234", "124"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write("deepseek_v3", root / "untied", quantize=True, num_hidden_layers=6)
    kinds = ["sliding_attention", "full_attention"] * 3
    write("ministral3-tied", root / "tied", num_hidden_layers=6, layer_types=kinds)
    if CAST:
        text = tiny_models.CONFIGS["kimi_k3"]["text_config"]
        attention = text["linear_attn_config"] | {"kda_layers": [1, 2, 4, 5]}
        text = {**text, "num_hidden_layers": 6, "linear_attn_config": attention}
        write("kimi_k3", root / "cast", half_embedding=True, text_config=text)
    with hubs.serve(root) as served:
        yield served


def write(case: str, folder: Path, half_embedding: bool = False, **changes: Any) -> None:
    """A checkpoint of four files, weights in the order of the model, as mlx-lm writes them."""
    import mlx.core as mx

    folder.mkdir()
    tiny_checkpoint.write(case, folder, **changes)
    index = folder / "model.safetensors.index.json"
    keys = list(json.loads(index.read_text())["weight_map"])
    weights: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        weights |= mx.load(str(path))
    if half_embedding:
        (key,) = (key for key in weights if "embed_tokens" in key)
        weights[key] = weights[key].astype(mx.bfloat16)
    mx.eval(weights)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    numbers = [
        LAYERS[int(m[1])] if (m := re.search(r"layers\.(\d+)", k)) else 1 if "embed" in k else 4
        for k in keys
    ]
    assert numbers == sorted(numbers)
    weight_map = {key: FILES[n - 1] for key, n in zip(keys, numbers, strict=True)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in FILES:
        part = {key: weights[key] for key in keys if weight_map[key] == file}
        mx.save_safetensors(str(folder / file), part, metadata={"format": "mlx"})


def start(hub, count: int, cache: Path, *tasks: dict[str, Any], check: bool = True, **env: str):
    hub.asked.clear()
    variables = {
        "HF_HOME": f"{cache}/RANK",
        "HF_ENDPOINT": hub.endpoint("RANK"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **env,
    }
    text = json.dumps(tasks)
    return ranks.launch(SCRIPT, text, ranks=count, env=variables, timeout=150, check=check)


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def count(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def unpatched(hub, count, caches) -> list[Any]:
    return start(
        hub,
        count,
        caches / f"unpatched-{count}",
        {"repo": "tiny/untied", "then": ["direct", "inner"]},
        {"repo": "tiny/tied", "then": ["direct", "inner"]},
        *CAST,
        {"repo": "tiny/untied", "then": ["recast"]},
    ).results


@pytest.fixture(scope="module")
def plugin(hub, count, caches) -> list[Any]:
    """Ends with a cache in which nothing of ``tiny/untied`` is that only a direct call needs."""
    cache = caches / f"plugin-{count}"
    first = [{"repo": "tiny/untied"}, *CAST]
    told = start(hub, count, cache, *first, MLX_LM_SKIPHEAD="1").results
    shutil.copytree(cache, caches / f"spare-{count}", symlinks=True)
    more = start(
        hub,
        count,
        cache,
        {"repo": "tiny/untied", "then": ["text", "refused", "direct", "direct", "asked", "inner"]},
        {"repo": "tiny/tied", "then": ["inner", "asked"]},
        MLX_LM_SKIPHEAD="1",
    ).results
    return [[one[0], *two, *one[1:]] for one, two in zip(told, more, strict=True)]


def paths(name: str, numbers: str) -> list[str]:
    return [f"{name}/{FILES[int(number) - 1]}" for number in numbers]


def files(numbers: str) -> list[str]:
    return [FILES[int(number) - 1] for number in numbers]


def test_what_is_fetched(count, unpatched, plugin):
    for rank, ((untied, tied, *cast, _), (cold, warm, warm_tied, *cold_cast)) in enumerate(
        zip(unpatched, plugin, strict=True)
    ):
        assert untied["asked"] == paths("untied", UNPATCHED[count][rank])
        assert tied["asked"] == paths("tied", UNPATCHED[count][rank]) + untied["asked"]
        mine = {name: PLUGIN[name][count][rank] for name in PLUGIN}
        assert cold["asked"] == paths("untied", mine["untied"])
        assert cold["tokens"] == warm["tokens"] == untied["tokens"]
        assert warm_tied["tokens"] == tied["tokens"]
        left = "".join(n for n in "14" if n not in mine["untied"])
        assert cold["left"] == warm["left"] == [files(left)]
        for plain, mine_cast in zip(cast, cold_cast, strict=True):
            assert mine_cast["tokens"] == plain["tokens"]
            # The last file has more than norm and head there.
            assert mine_cast["left"] == [files(left.replace("4", ""))]
        assert warm["asked"] == []  # the cache has what this rank needs
        left = "".join(n for n in "14" if n not in mine["tied"])
        assert warm_tied["left"] == [files(left)]


def test_a_direct_call_fetches_once(hub, count, unpatched, plugin):
    for rank, ((untied, tied, *_), (_, warm, warm_tied, *_)) in enumerate(
        zip(unpatched, plugin, strict=True)
    ):
        text, errors, first, second, asked, inner = warm["then"]
        assert ("without model-0000" in text) == bool(warm["left"][0])
        size = (hub.root / "untied" / FILES[3]).stat().st_size / 1e6
        if rank:
            assert len(errors) == 2
            for error in errors:
                assert f"norm of deepseek_v3 on rank {rank} and lm_head of" in error
                command = f"hf download tiny/untied --revision {hubs.COMMIT} {FILES[3]}"
                assert command in error
            assert len(first["said"]) == 1
            assert f"lm_head of deepseek_v3 on rank {rank} has been fetched" in first["said"][0]
            assert f"{FILES[3]}, {size:.1f} MB" in first["said"][0]
        else:
            assert errors == first["said"] == []
        assert second["said"] == inner["said"] == []
        assert asked == (paths("untied", "4") if rank else [])
        direct = untied["then"][0]["numbers"]
        assert first["numbers"] == second["numbers"] == direct
        assert inner["numbers"] == untied["then"][1]["numbers"]

        inner, asked = warm_tied["then"]
        assert inner["numbers"] == tied["then"][1]["numbers"]
        ours = [path for path in asked if path.startswith("tied")]
        assert ours == paths("tied", UNPATCHED[count][rank])


def test_offline(hub, count, unpatched, plugin, caches):
    """With the cache of unpatched mlx-lm, and with what a rank has of the plugin's own."""
    for cache in ("unpatched", "spare"):
        then = ["uninstall_refused", "errors"] if cache == "spare" else ["direct"]
        told = start(
            hub,
            count,
            caches / f"{cache}-{count}",
            {"repo": "tiny/untied", "then": then},
            MLX_LM_SKIPHEAD="1",
            HF_HUB_OFFLINE="1",
        ).results
        for rank, ((plain, *_), (mine,)) in enumerate(zip(unpatched, told, strict=True)):
            assert mine["tokens"] == plain["tokens"]
            assert hub.asked == []
            if cache == "unpatched":
                assert mine["left"] == [[]]
                assert mine["then"][0]["numbers"] == plain["then"][0]["numbers"]
                continue
            refused, errors = mine["then"]
            assert bool(refused) == bool(rank) and len(errors) == 2 * bool(rank)
            for error in filter(None, [refused, *errors]):
                assert f"hf download tiny/untied --revision {hubs.COMMIT} {FILES[3]}" in error


def test_a_folder_without_those_files(hub, unpatched, count, tmp_path):
    for rank, numbers in enumerate(PLUGIN["untied"][count]):
        shutil.copytree(hub.root / "untied", tmp_path / str(rank))
        for number in "1234":
            if number not in numbers:
                (tmp_path / str(rank) / FILES[int(number) - 1]).unlink()
    folder = f"{tmp_path}/RANK"
    tasks = [{"repo": folder, "then": [what]} for what in ("errors", "quantized", "recast")]
    environment = {"ALL_FILES": str(hub.root / "untied"), "FOLDER": folder}
    told = start(hub, count, tmp_path / "cache", *tasks, MLX_LM_SKIPHEAD="1", **environment).results
    for rank, ((plain, *_, plain_recast), (mine, quantized, recast)) in enumerate(
        zip(unpatched, told, strict=True)
    ):
        assert mine["tokens"] == plain["tokens"]
        (errors,) = mine["then"]
        assert len(errors) == 2 * bool(rank)
        for error in errors:
            assert str(tmp_path / str(rank) / FILES[3]) in error and "hf download" not in error
        ((tokens, errors),) = quantized["then"]
        assert tokens == plain["tokens"] and len(errors) == 2 * bool(rank)
        assert all("made (quantized, fused) from weights that are not here" in e for e in errors)
        assert recast["then"] == plain_recast["then"]


MODELSCOPE = """
import fnmatch, os, pathlib, shutil

def snapshot_download(repo, revision=None, allow_patterns=None):
    assert revision is None
    if os.environ["MLX_RANK"] == "1" and os.path.exists(os.environ["GONE"]):
        raise OSError("no network")
    folder = pathlib.Path(os.environ["FOLDER"].replace("RANK", os.environ["MLX_RANK"]), repo)
    folder.mkdir(parents=True, exist_ok=True)
    for file in pathlib.Path(os.environ["ALL_FILES"]).iterdir():
        if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
            shutil.copy(file, folder)
    return str(folder)
"""


def test_modelscope(hub, unpatched, count, tmp_path):
    """By a client in its place, called as mlx-lm calls it."""
    (tmp_path / "package" / "modelscope").mkdir(parents=True)
    (tmp_path / "package" / "modelscope" / "__init__.py").write_text(MODELSCOPE)
    path = os.environ.get("PYTHONPATH")
    told = start(
        hub,
        count,
        tmp_path / "cache",
        {"repo": "tiny/untied", "then": ["modelscope_gone", "direct"]},
        **{"MLX_LM_SKIPHEAD": "1", "MLXLM_USE_MODELSCOPE": "True"},
        **{"ALL_FILES": str(hub.root / "untied"), "FOLDER": f"{tmp_path}/RANK"},
        GONE=str(tmp_path / "gone"),
        PYTHONPATH=os.pathsep.join([str(tmp_path / "package"), *([path] if path else [])]),
    ).results
    for rank, ((plain, *_), (mine,)) in enumerate(zip(unpatched, told, strict=True)):
        assert mine["tokens"] == plain["tokens"] and mine["asked"] == []
        left = "".join(n for n in "14" if n not in PLUGIN["untied"][count][rank])
        assert mine["left"] == [files(left)]
        errors, direct = mine["then"]
        assert direct["numbers"] == plain["then"][0]["numbers"]
        assert len(errors) == 2 * (rank == 1)
        command = f"modelscope download --model tiny/untied {FILES[3]}"
        assert all(command in error for error in errors)


def test_hidden(hub, tmp_path):
    """A worker gives final hidden states, of the norm. And `uninstall()` of a tied model."""
    tasks = [
        {"repo": "tiny/untied", "then": ["direct", "inner", "asked"]},
        {"repo": "tiny/tied", "then": ["uninstalled", "asked"]},
    ]
    results = start(hub, 3, tmp_path, *tasks, MLX_LM_SKIPHEAD="hidden").results
    for rank, (told, tied) in enumerate(results):
        assert told["asked"] == told["then"][2] == paths("untied", HIDDEN[rank])
        direct, inner, _ = told["then"]
        assert direct["said"] == inner["said"] == []
        assert inner["numbers"] == results[0][0]["then"][1]["numbers"]
        assert (direct["numbers"] == inner["numbers"]) == bool(rank)
        # What mlx-lm needs without the plugin is brought before that is gone.
        after, asked = tied["then"]
        assert after["tokens"] == tied["tokens"] == results[0][1]["tokens"]
        ours = [path for path in asked if path.startswith("tied")]
        assert ours == paths("tied", UNPATCHED[3][rank])


def plan_from_headers(hub, name, count, home) -> subprocess.CompletedProcess[str]:
    command = ["plan", "-n", str(count), f"tiny/{name}", "--fetch-headers", "--json"]
    return subprocess.run(
        [python(), "-m", "mlx_lm_skiphead", *command],
        env={**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": hub.endpoint("plan")},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_plan_follows_no_name_out_of_the_folder(hub, ending, tmp_path):
    """Such a name in a listing is of no file here: to ask for it would be an error."""
    plain = plan_from_headers(hub, "untied", 2, tmp_path)
    hub.listed_too = [f"model/../../x.{ending}", f"../model.{ending}", f"/tmp/model.{ending}"]
    try:
        looked = plan_from_headers(hub, "untied", 2, tmp_path)
    finally:
        hub.listed_too = []
    assert looked.returncode == 0, looked.stderr
    assert looked.stdout == plain.stdout


@pytest.mark.parametrize("name", PLUGIN)
def test_plan(hub, name, count, tmp_path, capfd):
    """By the headers on the hub, what ranks fetch; no file of weights is fetched for it."""
    hub.asked.clear()
    arguments = ["plan", "-n", str(count)]
    looked = plan_from_headers(hub, name, count, tmp_path)
    assert looked.returncode == 0, looked.stderr
    there = json.loads(looked.stdout)
    assert main([*arguments, str(hub.root / name), "--json"]) == 0
    here = json.loads(capfd.readouterr().out)
    assert there | {"model": ""} == here | {"model": ""}
    assert hub.asked == []
    sizes = {file: (hub.root / name / file).stat().st_size for file in FILES}
    totals = {"all": 0, "needed": 0}
    for rank, told in enumerate(there["ranks"]):
        for way, numbers in (("all", UNPATCHED[count]), ("needed", PLUGIN[name][count])):
            assert told["downloads"][way] == {file: sizes[file] for file in files(numbers[rank])}
            totals[way] += sum(told["downloads"][way].values())
    assert there["download_bytes"] == totals
    assert main([*arguments, str(hub.root / name)]) == 0
    said = capfd.readouterr().out
    assert "downloaded (all → needed)" in " ".join(said.split())
    saved = (totals["all"] - totals["needed"]) / 1e6
    assert f"MB: {saved:,.1f} MB less." in " ".join(said.split())


@pytest.mark.parametrize("what", ["half a file", "no hub"])
def test_what_fails_is_said_by_the_hub_client(hub, what, tmp_path):
    if what == "half a file":
        hub.breaks.add(("1", FILES[1]))
    else:
        hub.gone_after_config.add("1")
    try:
        done = start(hub, 2, tmp_path, {"repo": "tiny/untied"}, check=False, MLX_LM_SKIPHEAD="1")
    finally:
        hub.breaks.clear()
        hub.gone_after_config.clear()
        hub.gone.clear()
    assert re.match(r"httpx2?|huggingface_hub|requests", done.results[1])
    # Before mlx 0.32 the ring does not notice, and mlx.launch ends rank 0.
    assert done.results[0] in (None, "builtins: [ring] connection to a peer was lost")
