"""Dead weights stay on disk, on real ranks: memory by MLX's counters, and files that are gone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny_checkpoint
from tiny_checkpoint import EMBEDDING_FILE, HEAD_FILE

SCRIPT = Path(__file__).with_name("rank_memory.py")
SIZE = {"vocab_size": 16384, "hidden_size": 256}  # of which head and embedding are the most
LOGITS = 4 * 4 * SIZE["vocab_size"]  # bytes: logits, log-probabilities and what is between
MODELS = {
    "untied": ("deepseek_v3", False),
    "untied, quantized": ("deepseek_v3", True),
    "tied": ("ministral3-tied", False),
    "tied, quantized": ("ministral3-tied", True),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, (case, quantize) in MODELS.items():
        made[name] = tmp_path_factory.mktemp("model")
        tiny_checkpoint.write(case, made[name], quantize=quantize, **SIZE)
    return made


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def count(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def unpatched(folders, count) -> list[dict[str, Any]]:
    return start(
        {
            **{name: {"folder": folder, "then": "grown"} for name, folder in folders.items()},
            "used": {"folder": folders["untied"], "then": "used_otherwise"},
        },
        count,
    )


@pytest.fixture(scope="module")
def skip(folders, count, tmp_path_factory) -> list[dict[str, Any]]:
    """What ranks with the plugin say; each task is one of the tests below."""
    untied = folders["untied"]
    removed = a_folder_each(untied, tmp_path_factory.mktemp("removed"), count)
    for rank in range(count):
        for file in unused_files(rank, count):
            (removed / str(rank) / file).unlink()
    spoilt = tmp_path_factory.mktemp("spoilt")
    for rank in range(count):
        shutil.copytree(untied, spoilt / str(rank))
    return start(
        {
            **{name: {"folder": folder, "then": "grown"} for name, folder in folders.items()},
            "own": {"folder": untied, "own pipeline": True, "then": "grown"},
            "used": {"folder": untied, "then": "used_otherwise"},
            "removed": {"folder": removed, "a folder each": True, "then": "refused_on_all_ranks"},
            "spoilt": {
                "folder": spoilt,
                "a folder each": True,
                "spoilt": HEAD_FILE,
                "then": "refused",
            },
            "thread": {"folder": untied, "then": "in_thread"},
            "uninstalled": {"folder": untied, "then": "uninstalled"},
        },
        count,
        MLX_LM_SKIPHEAD="1",
    )


def start(tasks: dict[str, Any], count: int, **env: str) -> list[dict[str, Any]]:
    text = json.dumps(tasks, default=str)
    return ranks.launch(SCRIPT, text, ranks=count, env=env, timeout=200).results


def a_folder_each(model: Path, folder: Path, count: int) -> Path:
    """Copies of `model` for each rank, whose files can be removed one by one."""
    for rank in range(count):
        shutil.copytree(model, folder / str(rank), copy_function=os.link)
    return folder


def unused_files(rank: int, count: int) -> list[str]:
    """Of the untied model: the head's but on rank 0, the embedding's but on the first stage."""
    return [HEAD_FILE] * (rank != 0) + [EMBEDDING_FILE] * (rank != count - 1)


def size_of(file: Path) -> int:
    """Bytes of the arrays in a safetensors file."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def unused(model: Path, rank: int, count: int) -> dict[str, int]:
    head, embedding = model / HEAD_FILE, model / EMBEDDING_FILE
    tied = not head.exists()
    sizes = {}
    if rank != 0 and not tied:
        sizes["lm_head"] = size_of(head)
    if rank != count - 1 and not (tied and rank == 0):
        sizes["embed_tokens"] = size_of(embedding)
    return sizes


@pytest.mark.parametrize("name", MODELS)
def test_memory(name, folders, count, unpatched, skip):
    for rank, (plain, told) in enumerate(zip(unpatched, skip, strict=True)):
        plain, told = plain[name], told[name]
        missing = unused(folders[name], rank, count)
        total = sum(missing.values())
        for counter in ("loaded", "peak of loading"):
            where = f"{counter}, rank {rank}"
            near = pytest.approx(plain[counter] - total, abs=0.01 * plain[counter])
            assert told[counter] == near, where
        # In a generation a worker needs no logits either, nor what is computed of them.
        less = plain["peak"] - told["peak"] - total
        assert -0.01 * plain["peak"] < less < 0.01 * plain["peak"] + (rank > 0) * LOGITS, rank
        status = {"rank": rank, "ranks": count, "on_disk": missing, "not_here": []}
        status["family"] = told["left"][0]["family"]
        status["layers"] = told["left"][0]["layers"]
        assert told["left"] == told["left after"] == [status]
        assert not plain["left"]
        assert told["tokens"] == plain["tokens"]


@pytest.mark.parametrize("name", [*MODELS, "own", "thread"])
def test_on_demand(name, folders, count, unpatched, skip):
    """A direct call gives upstream's logits, and takes the head's memory, once."""
    model = name if name in MODELS else "untied"
    for rank, (plain, told) in enumerate(zip(unpatched, skip, strict=True)):
        grown = told[name]["in_thread" if name == "thread" else "grown"]
        missing = unused(folders[model], rank, count)
        head = missing.get("lm_head", 0)
        if model.startswith("tied"):
            head = missing.get("embed_tokens", 0)
        assert grown["bytes"] == pytest.approx(head, abs=1000), rank
        assert grown["numbers"] == grown["again"] == plain[model]["grown"]["numbers"], rank


def test_nothing_else_notices(folders, count, unpatched, skip):
    for rank, (plain, told) in enumerate(zip(unpatched, skip, strict=True)):
        plain, told = plain["used"]["used_otherwise"], told["used"]["used_otherwise"]
        missing = unused(folders["untied"], rank, count)
        assert told.pop("left")[0]["on_disk"] == missing  # by nothing of this was it read
        assert told.pop("left after saving")[0]["on_disk"] == {}
        for what in told:
            assert told[what] == plain[what], (what, rank)


def test_a_file_that_is_not_needed_need_not_be_there(count, unpatched, skip):
    """A direct call is the same error on all ranks; and so is whatever reads the weights."""
    for rank, told in enumerate(t["removed"] for t in skip):
        assert told["tokens"] == unpatched[rank]["untied"]["tokens"]
        calls, others = told["refused_on_all_ranks"]
        for error in calls:
            assert (
                f"On rank 1 lm_head is not on this machine: its weights are in {HEAD_FILE}" in error
            )
        missing = {"lm_head": HEAD_FILE} if rank else {}
        missing |= {"embed_tokens": EMBEDDING_FILE} if rank < count - 1 else {}
        for what, error in others.items():
            named = [name for name in missing if f"{name} is not on this machine" in error]
            assert len(named) == 1 and missing[named[0]] in error, (what, error)


def test_a_file_that_is_spoilt_is_an_error(count, unpatched, skip):
    for rank, told in enumerate(t["spoilt"] for t in skip):
        assert told["tokens"] == unpatched[rank]["untied"]["tokens"]
        for error in told["refused"]:
            assert f"On rank {rank} lm_head was left on disk and cannot be read" in error
        assert len(told["refused"]) == (2 if rank else 0)


def test_uninstalled(folders, count, unpatched, skip):
    for rank, (plain, told) in enumerate(zip(unpatched, skip, strict=True)):
        after = told["uninstalled"]["uninstalled"]
        assert after["tokens"] == plain["untied"]["tokens"]
        assert after["numbers"] == plain["untied"]["grown"]["numbers"]
        # What is never used, with the plugin or without, is still not read.
        missing = unused(folders["untied"], rank, count)
        missing.pop("lm_head", None)
        assert after["left"][0]["on_disk"] == missing, rank


def test_a_file_that_is_needed_must_be_there(folders, tmp_path):
    """Upstream's error, where the embedding cannot be opened on the rank that embeds."""
    folder = a_folder_each(folders["untied"], tmp_path / "each", 2)
    (folder / "1" / EMBEDDING_FILE).unlink()
    (folder / "1" / EMBEDDING_FILE).symlink_to("nowhere")
    task = {"needed": {"folder": str(folder), "a folder each": True}}
    done = ranks.launch(
        SCRIPT, json.dumps(task), ranks=2, env={"MLX_LM_SKIPHEAD": "1"}, timeout=60, check=False
    )
    assert done.results == [None, None]
    assert "Failed to open file" in done.stderr and EMBEDDING_FILE in done.stderr
