"""Which files each rank fetches from a hub on this machine, and what comes of those it does not.

`MLX_LM_SKIPHEAD_DOWNLOAD=needed`, `all` and unset, against unpatched mlx-lm on as many ranks.
"""

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

import mlx_lm_skiphead
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
NEEDED = {"MLX_LM_SKIPHEAD": "1", "MLX_LM_SKIPHEAD_DOWNLOAD": "needed"}
CALLS = {"then": ["direct", "inner"]}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write("deepseek_v3", root / "untied", quantize=True, num_hidden_layers=6)
    kinds = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
    write("ministral3-tied", root / "tied", **kinds)
    write("ministral3-untied", root / "half", half="", **kinds)
    if CAST:
        text = tiny_models.CONFIGS["kimi_k3"]["text_config"]
        attention = text["linear_attn_config"] | {"kda_layers": [1, 2, 4, 5]}
        text = {**text, "num_hidden_layers": 6, "linear_attn_config": attention}
        write("kimi_k3", root / "cast", half="embed_tokens", text_config=text)
    with hubs.serve(root) as served:
        yield served


def write(case: str, folder: Path, half: str | None = None, **changes: Any) -> None:
    """A checkpoint of four files, weights in the order of the model, as mlx-lm writes them.

    Those whose key has `half` in it are bfloat16.
    """
    import mlx.core as mx

    folder.mkdir()
    tiny_checkpoint.write(case, folder, **changes)
    index = folder / "model.safetensors.index.json"
    keys = list(json.loads(index.read_text())["weight_map"])
    weights: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        weights |= mx.load(str(path))
    for key in weights:
        if half is not None and half in key:
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
    return ranks.launch(SCRIPT, text, ranks=count, env=variables, timeout=60, check=check)


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def count(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def unpatched(hub, count, caches) -> list[Any]:
    tasks = [{"repo": "tiny/untied", **CALLS}, {"repo": "tiny/tied", **CALLS}]
    tasks += [{"repo": "tiny/half", **CALLS}, *CAST]
    return start(hub, count, caches / f"unpatched-{count}", *tasks).results


@pytest.fixture(scope="module")
def needed(hub, count, caches) -> list[Any]:
    tasks = [
        {"repo": "tiny/untied", "then": ["direct", "inner", "read", "same_as_before"]},
        {"repo": "tiny/tied", "then": ["direct", "inner", "read", "fetch_all"]},
        {"repo": "tiny/half", "then": ["direct", "bring"]},
        *CAST,
    ]
    return start(hub, count, caches / f"needed-{count}", *tasks, **NEEDED).results


def paths(name: str, numbers: str) -> list[str]:
    return [f"{name}/{FILES[int(number) - 1]}" for number in numbers]


def files(numbers: str) -> list[str]:
    return [FILES[int(number) - 1] for number in numbers]


def of(name: str, asked: list[str]) -> list[str]:
    return [path for path in asked if path.startswith(f"{name}/")]


def absent(name: str, rank: int, count: int) -> dict[str, str]:
    """By module that a rank is without, the number of its file."""
    is_tied, is_last = name == "tied", rank == count - 1
    embedding = {"embed_tokens": "1"} if not is_last and not (is_tied and rank == 0) else {}
    head = {} if rank == 0 else {"norm": "4"} if is_tied else {"lm_head": "4", "norm": "4"}
    return head | embedding


def test_what_is_fetched(count, unpatched, needed):
    for rank, (plain, mine) in enumerate(zip(unpatched, needed, strict=True)):
        for name, there, here in zip(("untied", "tied", "half", "cast"), plain, mine, strict=False):
            assert here["tokens"] == there["tokens"], (rank, name)
            assert of(name, there["asked"]) == paths(name, UNPATCHED[count][rank])
            numbers = PLUGIN["tied" if name == "tied" else "untied"][count][rank]
            if name == "cast" and rank:  # the last file has more than norm and head there
                numbers = "".join(sorted({*numbers, "4"}))
            assert of(name, here["asked"]) == paths(name, numbers), (rank, name)
            lacks = absent(name, rank, count)
            if name == "cast":
                lacks = {module: file for module, file in lacks.items() if file == "1"}
            assert len(here["left"]) == len(lacks)
            for sentence, (module, number) in zip(
                sorted(here["left"]), sorted(lacks.items()), strict=True
            ):
                (file,) = files(number)
                assert sentence == (
                    f"{module} is not on this machine: its weights are in {file}, and "
                    f"MLX_LM_SKIPHEAD_DOWNLOAD=needed has not fetched that file. `hf download "
                    f"tiny/{name} {file}` brings it; then load the model again."
                )


def test_a_direct_call_is_an_error_on_all_ranks(needed):
    """Of the model, and of the pipelined model in it."""
    for mine in needed:
        for name, here in zip(("untied", "tied", "half"), mine, strict=False):
            error = here["then"]["direct"]
            assert "The model was called outside mlx-lm's loops" in error
            # Tied, the embedding is the head; a rank in the middle lacks that too.
            assert re.search("On rank 1 (lm_head|norm|embed_tokens) is not on this machine", error)
            assert f"`hf download tiny/{name} {FILES[3]}` brings it" in error
        for here in mine[:2]:
            assert here["then"]["inner"] == here["then"]["direct"]


def test_reading_what_is_absent_is_an_error(count, needed):
    """Of each kind; and it changes nothing."""
    for rank, mine in enumerate(needed):
        for name, here in zip(("untied", "tied"), mine, strict=False):
            lacks = absent(name, rank, count)
            told = here["then"]["read"]
            assert told["absent"] == len(lacks)
            assert len(told["errors"]) == (7 + 3 * len(lacks) if lacks else 0)
            for kind, error in told["errors"].items():
                module = next((m for m in lacks if m in kind), "")
                assert f"{module} is not on this machine" in error, kind
                assert f"`hf download tiny/{name} model-0000" in error
        assert mine[0]["then"]["same_as_before"] == mine[0]["tokens"]


def test_a_file_that_is_brought(hub, count, unpatched, needed):
    """By the command of the error, or by fetching all: then nothing is absent."""
    for rank, (plain, mine) in enumerate(zip(unpatched, needed, strict=True)):
        numbers, still_absent, can_be_read = mine[2]["then"]["bring"]
        assert numbers == plain[2]["then"]["direct"] and not still_absent and can_be_read
        assert mine[1]["then"]["fetch_all"] == [plain[1]["then"]["direct"], []]
        asked = sorted({path for r, path in hub.asked if r == str(rank)})
        assert of("tied", asked) == paths("tied", UNPATCHED[count][rank])


@pytest.mark.skipif(not tiny_models.takes_split(), reason="this mlx-lm splits evenly only")
@pytest.mark.parametrize(
    ("split", "value", "numbers"),
    [("5,1", "needed", ["234", "1"]), ("1,5", "needed", ["4", "123"]), ("5,1", "", ["1234", "14"])],
)
def test_it_follows_the_split(split, value, numbers, hub, tmp_path):
    variables = NEEDED | {"MLX_LM_SKIPHEAD_DOWNLOAD": value, "MLX_LM_SKIPHEAD_SPLIT": split}
    told = start(hub, 2, tmp_path, {"repo": "tiny/untied"}, **variables).results
    for (mine,), its in zip(told, numbers, strict=True):
        assert of("untied", mine["asked"]) == paths("untied", its)
        assert mine["tokens"] == told[0][0]["tokens"]


@pytest.mark.parametrize("value", ["", "all"], ids=["unset", "all"])
def test_all(hub, count, unpatched, value, tmp_path):
    tasks = [{"repo": "tiny/untied", **CALLS}, {"repo": "tiny/tied", **CALLS}]
    variables = {"MLX_LM_SKIPHEAD": "1", "MLX_LM_SKIPHEAD_DOWNLOAD": value}
    results = start(hub, count, tmp_path, *tasks, **variables).results
    assert results == [[{**task, "left": []} for task in plain[:2]] for plain in unpatched]


def test_offline(hub, count, unpatched, needed, caches):
    """With the cache of unpatched mlx-lm, and with what `needed` has fetched."""
    for cache in ("unpatched", "needed"):
        task = {"repo": "tiny/untied", "then": ["direct"]}
        told = start(hub, count, caches / f"{cache}-{count}", task, HF_HUB_OFFLINE="1", **NEEDED)
        for (plain, *_), (mine,) in zip(unpatched, told.results, strict=True):
            assert mine["tokens"] == plain["tokens"]
            assert hub.asked == []
            if cache == "unpatched":
                assert mine["left"] == []
                assert mine["then"]["direct"] == plain["then"]["direct"]
            else:
                assert "On rank 1 lm_head is not on this machine" in mine["then"]["direct"]


@pytest.mark.parametrize("value", ["all", "needed"])
def test_a_folder_without_those_files(hub, unpatched, count, value, tmp_path):
    for rank, numbers in enumerate(PLUGIN["untied"][count]):
        shutil.copytree(hub.root / "untied", tmp_path / str(rank))
        for number in "1234":
            if number not in numbers:
                (tmp_path / str(rank) / FILES[int(number) - 1]).unlink()
    task = {"repo": f"{tmp_path}/RANK", "then": ["direct", "read"]}
    variables = {"MLX_LM_SKIPHEAD": "1", "MLX_LM_SKIPHEAD_DOWNLOAD": value}
    told = start(hub, count, tmp_path / "cache", task, **variables).results
    for rank, ((plain, *_), (mine,)) in enumerate(zip(unpatched, told, strict=True)):
        assert mine["tokens"] == plain["tokens"]
        here = mine["then"]
        assert here["read"]["absent"] == len(mine["left"]) == len(absent("untied", rank, count))
        assert here["read"]["errors"] and all(here["read"]["errors"].values())
        lacks = f"its weights are in {FILES[3]}, and {tmp_path / '1'} lacks that file."
        assert f"On rank 1 lm_head is not on this machine: {lacks}" in here["direct"]


MODELSCOPE = """
import fnmatch, os, pathlib, shutil

def snapshot_download(repo, revision=None, allow_patterns=None):
    assert revision is None
    folder = pathlib.Path(os.environ["FOLDER"], os.environ["MLX_RANK"], repo)
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
        {"repo": "tiny/untied", "then": ["direct"]},
        **{**NEEDED, "MLXLM_USE_MODELSCOPE": "True"},
        **{"ALL_FILES": str(hub.root / "untied"), "FOLDER": str(tmp_path)},
        PYTHONPATH=os.pathsep.join([str(tmp_path / "package"), *([path] if path else [])]),
    ).results
    for rank, ((plain, *_), (mine,)) in enumerate(zip(unpatched, told, strict=True)):
        assert mine["tokens"] == plain["tokens"] and mine["asked"] == []
        fetched = (tmp_path / str(rank) / "tiny/untied").glob("*.safetensors")
        here = sorted(file.name for file in fetched)
        assert here == files(PLUGIN["untied"][count][rank])
        command = f"`modelscope download --model tiny/untied {FILES[3]}`"
        assert command in mine["then"]["direct"]


def test_hidden(hub, tmp_path):
    """A worker gives final hidden states, of the norm, and a direct call needs no more."""
    tasks = [{"repo": f"tiny/{name}", **CALLS} for name in ("untied", "tied")]
    variables = {**NEEDED, "MLX_LM_SKIPHEAD": "hidden"}
    results = start(hub, 3, tmp_path, *tasks, **variables).results
    for rank, told in enumerate(results):
        assert told[0]["asked"] == paths("untied", HIDDEN[rank])
        for mine, of_rank_0 in zip(told, results[0], strict=True):
            direct, inner = mine["then"]["direct"], mine["then"]["inner"]
            assert mine["tokens"] == of_rank_0["tokens"]
            assert inner == of_rank_0["then"]["inner"]
            assert (direct == inner) == bool(rank)


def test_an_unknown_value_is_refused(monkeypatch):
    monkeypatch.setenv("MLX_LM_SKIPHEAD_DOWNLOAD", "some")
    with pytest.raises(ValueError, match=r"_DOWNLOAD='some' .*Give all \(or unset it\) or needed"):
        mlx_lm_skiphead.install()
    assert mlx_lm_skiphead.status().mode == "off"


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
        done = start(hub, 2, tmp_path, {"repo": "tiny/untied"}, check=False, **NEEDED)
    finally:
        hub.breaks.clear()
        hub.gone_after_config.clear()
        hub.gone.clear()
    assert re.match(r"httpx2?|huggingface_hub|requests", done.results[1])  # its own
    assert re.search(r"tiny/untied cannot be loaded by rank 1 \(\w+Error\(", done.results[0])
