"""Uneven splits on real ranks: every family with the extreme ones, against one process."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import ranks
import serving
import tiny_checkpoint
import tiny_models
from rank_split import OWN

from mlx_lm_skiphead.cli import doctor, sizes
from mlx_lm_skiphead.config import layers_by_rank
from mlx_lm_skiphead.families import FAMILIES

SCRIPT = Path(__file__).with_name("rank_split.py")
OPTIONS = ("--prefill-step-size", "32")  # of the server
NO_WEIGHTS = 2000  # bytes in memory of rotation tables and the like
ALIASES = {family.name for family in FAMILIES if family.is_alias}
CASES = [c for c in tiny_models.FAMILIES if c not in ALIASES and tiny_models.is_pipelined(c)]
TIED = ["qwen3_next-tied", "ministral3-tied"]
REFUSED = {"kimi_k3": "SkipheadError: {}: mlx_lm.models.kimi_k3 of mlx-lm {} takes no split. "}


uneven = pytest.mark.skipif(not tiny_models.takes_split(), reason="this mlx-lm splits evenly only")


def layers_of(case: str) -> int:
    config = tiny_models.CONFIGS[case]
    return config.get("text_config", config)["num_hidden_layers"]


def splits(case: str, count: int) -> list[str]:
    """Rank 0, or the last rank, has all layers but one for each other rank."""
    sizes = ["1"] * (count - 1) + [str(layers_of(case) - count + 1)]
    return [",".join(sizes), ",".join(reversed(sizes))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for case in [*CASES, *TIED]:
        (folder / case).mkdir()
        tiny_checkpoint.write(case, folder / case)
    return folder


@pytest.fixture(scope="module")
def right(folder) -> dict[str, Any]:
    """What one process answers without the plugin."""
    return ranks.alone(SCRIPT, str(folder), *CASES, *TIED, timeout=300).results[0]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(2, id="2 ranks"),
        pytest.param(3, id="3 ranks", marks=pytest.mark.long),
    ],
)
def count(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def told(count, folder) -> list[dict[str, Any]]:
    cases = [":".join([case, *splits(case, count)]) for case in [*CASES, *TIED]]
    env = {"MLX_LM_SKIPHEAD": "1"}
    return ranks.launch(SCRIPT, str(folder), *cases, ranks=count, env=env, timeout=600).results


def without_logprobs(batch: Any) -> Any:
    if isinstance(batch, str):  # of a family that cannot be batched
        return batch
    return [response[:2] for response in batch["told"]], batch["random"], batch["batch_generate"]


@uneven
@pytest.mark.parametrize("case", [*CASES, *TIED])
def test_family(case, count, folder, right, told):
    expected = right[f"{case}:"]
    for split in splits(case, count):
        said = [rank[f"{case}:{split}"] for rank in told]
        if any("error" in rank for rank in said):
            assert len({rank["error"] for rank in said}) == 1  # the same on all ranks
            asked = f"MLX_LM_SKIPHEAD_SPLIT={split}"
            if case == "bailing_hybrid":
                assert said[0]["error"].startswith(f"ValueError: {asked}: split [")
                assert "leaves a rank without an MLA layer" in said[0]["error"]
            else:
                assert said[0]["error"].startswith(
                    REFUSED[case].format(asked, metadata.version("mlx-lm"))
                )
            continue
        end = layers_of(case)
        planned = sizes.plan(folder / case, count, [int(part) for part in split.split(",")])
        for rank, each, size in zip(range(count), said, planned.ranks, strict=True):
            where = f"{split}, rank {rank}"
            for name, answer in each["requests"].items():
                assert answer["tokens"] == expected["requests"][name]["tokens"], where
                assert answer["random"] == expected["requests"][name]["random"], where
            assert without_logprobs(each["batch"]) == without_logprobs(expected["batch"]), where
            assert each["heads"] == (rank == 0), where
            assert each["trimmable"] == expected["trimmable"], where
            first, end = end - int(split.split(",")[rank]), end
            assert each["layers"] == [first, end] == list(size.layers), where
            (status,) = each["status"]
            assert status["layers"] == [first, end] and status["on_disk"] == size.on_disk, where
            assert 0 <= each["loaded"] - size.memory_bytes["plugin"] < NO_WEIGHTS, where
            end = first


@uneven
def test_most_families_take_a_split(told):
    errors = [name for name, said in told[0].items() if "error" in said]
    assert {name.partition(":")[0] for name in errors} == {"bailing_hybrid", "kimi_k3"}


@uneven
def test_the_programs_own_split_counts(count, told):
    others = [2] + [1] * (count - 2)
    own = [5 - sum(others), *others]
    for split, at in ((own, 0), (own[::-1], 1)):
        for rank in range(count):
            first = sum(split[rank + 1 :])
            assert told[rank]["own"][at] == [first, first + split[rank]]


@uneven
def test_a_model_that_is_left_to_upstream_is_an_error(told):
    for said in told:
        assert said["left"].startswith("MLX_LM_SKIPHEAD_SPLIT has no effect on this model")


OFF = """
import sys
from pathlib import Path
import mlx_lm_skiphead, mlx.core as mx, ranks
from mlx_lm.utils import load_model
group = ranks.join()
model, _ = load_model(Path(sys.argv[1]), lazy=True, strict=False)
model.model.pipeline(group)
mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
ranks.report([model.model.start_idx, model.model.end_idx])
"""


@uneven  # where that family has five layers
@pytest.mark.parametrize("split", ["1,4", "some"])
def test_off(split, folder, tmp_path):
    """It has no effect, and nothing is said, not even of a value that is wrong."""
    (tmp_path / "off.py").write_text(OFF)
    env = {"MLX_LM_SKIPHEAD": "0", "MLX_LM_SKIPHEAD_SPLIT": split}
    done = ranks.launch(tmp_path / "off.py", str(folder / OWN), ranks=2, env=env)
    assert done.results == [[2, 5], [0, 2]]
    assert not done.stdout and "skiphead" not in done.stderr.lower().replace(str(tmp_path), "")


@uneven
@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            ["4,4"],
            "ValueError: MLX_LM_SKIPHEAD_SPLIT=4,4: split [4, 4] must be positive and sum to",
        ),
        (
            ["0,5"],
            "ValueError: MLX_LM_SKIPHEAD_SPLIT=0,5: split [0, 5] must be positive and sum to",
        ),
        (["5"], "ValueError: MLX_LM_SKIPHEAD_SPLIT=5: split has 1 entries for group size 2"),
        (["2,3", "3,2"], "The ranks differ in MLX_LM_SKIPHEAD_SPLIT: 2,3 on rank 0, 3,2 on rank 1"),
        (["2,3", ""], "MLX_LM_SKIPHEAD_SPLIT: 2,3 on rank 0, not set on rank 1. All ranks must"),
        (["2,3", "3,3"], "ValueError: MLX_LM_SKIPHEAD_SPLIT=3,3: split [3, 3] must be positive"),
        (["", "x"], "ValueError: MLX_LM_SKIPHEAD_SPLIT='x' is not understood. Give the layers of"),
    ],
)
def test_errors_end_the_launch(values, said, folder, tmp_path):
    program = tmp_path / "loads.py"
    program.write_text(
        "import os, ranks, sys\n"
        f"os.environ['MLX_LM_SKIPHEAD_SPLIT'] = {values!r}[ranks.rank() % {len(values)}]\n"
        "import mlx_lm_skiphead, mlx.core as mx, mlx_lm.utils\n"
        "mlx_lm.utils.sharded_load(sys.argv[1], ranks.join())\n"
        "ranks.report('loaded')\n"
    )
    env = {"MLX_LM_SKIPHEAD": "1"}
    done = ranks.launch(program, str(folder / OWN), ranks=2, env=env, check=False, timeout=40)
    assert done.results == [None, None] and done.seconds < 20
    assert said in done.stderr


@pytest.mark.skipif(tiny_models.takes_split(), reason="this mlx-lm takes a split")
def test_an_older_mlx_lm_says_so(folder):
    cases = ("deepseek_v3:3,3", "deepseek_v3")
    done = ranks.launch(SCRIPT, str(folder), *cases, ranks=2, env={"MLX_LM_SKIPHEAD": "1"})
    for said in done.results:
        assert "takes no split. Unset it." in said["deepseek_v3:3,3"]["error"]
        assert said["deepseek_v3:"]["layers"] in ([0, 3], [3, 6])


@pytest.mark.parametrize("value", ["x", "1,", "1;2", "1.5,2"])
def test_not_understood(value):
    with pytest.raises(ValueError, match=r"_SPLIT=.* is not understood. Give the layers of each"):
        layers_by_rank({"MLX_LM_SKIPHEAD_SPLIT": value})


@pytest.mark.parametrize(("value", "split"), [(None, None), ("", None), ("20, 12", [20, 12])])
def test_understood(value, split):
    assert layers_by_rank({} if value is None else {"MLX_LM_SKIPHEAD_SPLIT": value}) == split


def test_run(tmp_path):
    """In its process, and in each Python that the program starts."""
    program = (
        "import subprocess, sys, mlx_lm_skiphead.config as config\n"
        "print(config.split, flush=True)\n"
        "if sys.argv[1:]: subprocess.run([sys.executable, '-c', "
        "'import mlx_lm_skiphead.config as c; print(c.active, c.split)'])\n"
    )
    (tmp_path / "program.py").write_text(program)
    run = [sys.executable, "-m", "mlx_lm_skiphead", "run", "--split", "20,12", "program.py", "x"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stdout == "[20, 12]\non [20, 12]\n" and not done.stderr


def asked(server: serving.Server) -> list[Any]:
    import test_server  # here, since it imports openai

    with serving.client(server) as client:
        ask = partial(serving.ask, client)
        cases = [c for n, c in test_server.ONE_BY_ONE.items() if "logprobs" not in n]
        again = [case for case in cases[::-1] if "stream" not in case[1]]
        return [ask(prompt, **options) for prompt, options in [*cases, *again]]


@uneven
@pytest.mark.parametrize(
    ("case", "said"), [("kimi_k3", "this mlx-lm splits it evenly only"), (OWN, "")]
)
def test_doctor(case, said, folder, monkeypatch):
    monkeypatch.setenv("MLX_LM_SKIPHEAD_SPLIT", "3,2")
    report = doctor.diagnose(str(folder / case), [], False)
    assert said in report["model"]["reason"] and report["model"]["supported"] == (not said)


@uneven
def test_the_server(tmp_path):
    """Ranks find the same in their prompt caches, though one could reuse more: of the layers of
    this hybrid the last one alone has a cache that can be trimmed."""
    tiny_checkpoint.write("qwen3_next", tmp_path, num_hidden_layers=4)
    with serving.server(tmp_path, *OPTIONS) as server:
        right = asked(server)
    options = {"count": 2, "plugin": True, "split": "1,3"}
    with serving.server(tmp_path, *OPTIONS, **options) as server:
        assert asked(server) == right
        head, worker = server.reported()
        assert head > 0 and worker == 0
