"""The bench on real ranks: what it prints, that both ways give the same tokens, how it ends."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoint
import warm
from test_demo import left_of, ranks_of

from mlx_lm_skiphead.cli import main
from mlx_lm_skiphead.cli.bench import interval
from mlx_lm_skiphead.cli.ranks import RankFailed, free_ports, records, running

BENCH = ("-m", "mlx_lm_skiphead", "bench")
INSTRUMENTS = (str(Path(__file__).parents[1] / "tools" / "bench.py"),)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint.write("deepseek_v3", folder)
    return str(folder)


def bench(*arguments: str, command: tuple[str, ...] = BENCH) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm.python(), *command, *arguments],
        env={**os.environ, warm.JOIN: "1"},
        capture_output=True,
        text=True,
        timeout=200,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("count", [1, 2])
def test_json_and_plot(count, model, tmp_path):
    plot = tmp_path / "plot.png"
    sizes = ["--batch", "1,3", "--prompt", "5,9", "--tokens", "4", "--rounds", "6"]
    output = ["--json", "--plot", str(plot)]
    done = bench(model, "-n", str(count), *sizes, *output, command=INSTRUMENTS)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["family"] == "deepseek_v3" and told["ranks"] == count and told["tokens_agree"]
    assert [(case["batch"], case["prompt"]) for case in told["cases"]] == [
        *((batch, prompt) for prompt in (5, 9) for batch in (1, 3))
    ]
    for case in told["cases"]:
        times, ratio = case["ms_per_token"], case["ratio"]
        pairs = zip(times["unpatched"]["values"], times["plugin"]["values"], strict=True)
        assert ratio["values"] == [plugin / unpatched for unpatched, plugin in pairs]
        assert len(ratio["values"]) == 6 and case["tokens"] == 4
        assert ratio["low"] == ratio["interval"]["low"] and ratio["interval"]["confidence"] > 0.95
        for way in ("unpatched", "plugin"):
            expected = 1000 * case["batch"] / times[way]["median"]
            assert case["tokens_per_second"][way] == pytest.approx(expected)
            assert case["first_token_ms"][way]["median"] > 0
    for memory in told["memory"]:
        loaded, left = memory["loaded_bytes"], sum(memory["on_disk"].values())
        assert left == (65536 if count > 1 else 0)
        assert loaded["unpatched"] == pytest.approx(loaded["plugin"] + left, abs=10_000)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_plan_on_slow_links(model, tmp_path):
    """Links so slow that what this machine computes hardly counts: 8 KiB take 66 ms."""
    plot = tmp_path / "plot.png"
    sizes = ["--batch", "32", "--tokens", "6", "--rounds", "2"]
    links = ["--link-rate", "1", "--link-delay", "20", "--plan", "--plot", str(plot)]
    done = bench(model, "-n", "3", *sizes, *links, "--json", command=INSTRUMENTS)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    (case,) = told["cases"]
    latency, rate = told["memory"][0]["link"]
    assert latency > 20 and rate == pytest.approx(1e-3, rel=0.3)
    for way, hidden_states, latencies in (("unpatched", 4, 3), ("plugin", 2, 3)):
        measured, planned = case["ms_per_token"][way]["median"], case["planned"][way]
        assert measured > 65.5 * hidden_states + 20 * latencies
        assert planned == pytest.approx(measured, rel=0.25)
    assert case["ratio"]["median"] < 0.8
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_text_and_hosts(model, tmp_path):
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2))
    port = str(free_ports(2))
    done = bench(
        *(model, "--hostfile", str(hostfile), "--starting-port", port),
        *("--tokens", "4", "--rounds", "2"),
    )
    assert done.returncode == 0, done.stderr
    assert "deepseek_v3, 2 ranks, both ways in turn" in " ".join(done.stdout.split())
    assert "The interval of the ratio has 50 % confidence (2 rounds)." in done.stdout
    assert "Tokens agree: on all ranks, both ways, in every round." in done.stdout


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    "hosts",
    [pytest.param(False, id="ranks"), pytest.param(True, id="hosts", marks=pytest.mark.long)],
)
def test_stopped(how, hosts, model, tmp_path):
    """It says what it has, and leaves no process."""
    where = ["-n", "2"]
    if hosts:
        if how == signal.SIGKILL:
            pytest.skip("then mlx.launch goes on, which nothing can be done about")
        hostfile = tmp_path / "hosts.json"
        hostfile.write_text(json.dumps([{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}] * 2))
        where = ["--hostfile", str(hostfile), "--starting-port", str(free_ports(2))]
    process = subprocess.Popen(
        [
            *warm.command_line("bench", model),
            *where,
            *("--tokens", "8", "--rounds", "100000", "--json"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert process.stderr is not None
    while "round 4 of" not in (line := process.stderr.readline()):
        assert line, "it has ended"
    started = descendants(process.pid)
    process.send_signal(how)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    if how != signal.SIGKILL:
        assert process.returncode == 130, errors
        assert "Stopped; all ranks have been ended." in errors
        assert len(json.loads(output)["cases"][0]["ratio"]["values"]) > 1
    assert not left_of(started)


def descendants(pid: int) -> list[int]:
    children = ranks_of(pid)
    return children + [p for child in children for p in descendants(child)]


@pytest.mark.parametrize(
    ("at", "told"),
    [(8192, True), (8 * 512 - 1, True), (9000, False)],
    ids=["between records", "before a newline", "in a record"],
)
def test_a_torn_output(at, told, tmp_path):
    """Launchers pass on pieces of some size, with what other ranks print between them: mlx.launch
    of 8192 bytes, and mpirun of 4095 when it is late, since a terminal holds no more."""
    event = {"results": {"text": " |x\n" * 9000}}
    said, other = b"".join(records(0, event)), b"".join(records(1, {"step": "loading"}))
    (tmp_path / "said").write_bytes(said[:at] + b"[INFO] of others\n" + other + said[at:])
    with running(2, ["cat", str(tmp_path / "said")]) as events:
        if told:
            assert list(events) == [{"step": "loading"}, event]
        else:
            with pytest.raises(RankFailed, match="rank 0: a part of what it printed has been lost"):
                list(events)


def test_instruments(model):
    """Heads and layers that run twice, a split, the plan, and unpatched against itself."""
    case = [model, "-n", "2", "--tokens", "4", "--rounds", "2"]
    slower = ["--head-passes", "2", "--layer-passes", "2", "--split", "6,1"]
    done = bench(*case, *slower, "--plan", command=INSTRUMENTS)
    assert done.returncode == 0, done.stderr
    assert "2 ranks with 6,1 layers" in " ".join(done.stdout.split())
    assert "planned ms per token" in done.stdout and "and links of" in done.stdout
    done = bench(*case, "--control", command=INSTRUMENTS)
    assert done.returncode == 0, done.stderr


def test_a_rank_that_fails(model):
    """Here for a core that there is not."""
    done = bench(model, "-n", "2", "--cores", "0;999", command=INSTRUMENTS)
    assert done.returncode == 1
    assert "rank 1" in done.stderr and "Nothing was measured." in done.stdout


@pytest.mark.long
def test_a_rank_that_is_killed(model):
    """It says nothing, and neither does mlx.launch by its exit code."""
    environment = {**os.environ, "PYTHONINSPECT": ""}
    arguments = [sys.executable, *BENCH, model, "-n", "2", "--rounds", "100000", "--tokens", "8"]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    while "round 2 of" not in (line := process.stderr.readline()):
        assert line, "it has ended"
    command = ["ps", "-o", "pid=,args=", "-p", ",".join(map(str, descendants(process.pid)))]
    listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    ranks = [int(line.split()[0]) for line in listed if "cli.ranks " in line]
    assert len(ranks) == 2, listed
    os.kill(ranks[1], signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "mlx-lm-skiphead bench: " in errors and "rank 1" in errors
    assert "both ways in turn" in " ".join(output.split())  # a long path breaks the line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere/at/all", "-n", "2"], "there is no folder nowhere/at/all"),
        (["{llama}", "-n", "2"], "does not support mlx_lm.models.llama"),
        (["{model}", "-n", "2", "--split", "4,4"], "mlx-lm cannot split deepseek_v3 so: "),
        (["{model}", "-n", "9"], "9 ranks need 9 layers, and this model has 7"),
        (["{model}", "--hostfile", "{tmp}/none.json"], "none.json is no host file"),
        (["{model}", "--hostfile", "{tmp}/one.json"], "a list of 2 hosts or more"),
        (["{model}", "-n", "2", "--gpus", "0,1,2"], "--gpus is for 3 ranks, and there are 2"),
    ],
)
def test_what_cannot_be(arguments, said, model, capfd, tmp_path):
    (tmp_path / "llama").mkdir()
    llama = {"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2}
    llama |= {"intermediate_size": 64, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(llama))
    (tmp_path / "llama" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (tmp_path / "one.json").write_text('[{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]')
    names = {"model": model, "llama": str(tmp_path / "llama"), "tmp": str(tmp_path)}
    assert main(["bench", *(argument.format(**names) for argument in arguments)]) == 2
    captured = capfd.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    "arguments",
    [[], ["-n", "0"], ["-n", "2", "--hostfile", "x"], ["-n", "2", "--batch", "1,-1"]],
)
def test_wrong_arguments(arguments, model, capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench", model, *arguments])
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_interval():
    assert interval([3.0]) == {"low": 3, "high": 3, "confidence": 0}
    assert interval([1, 2, 3, 4, 5, 6]) == {"low": 1, "high": 6, "confidence": 1 - 2 / 64}
    low, high, confidence = interval([*range(9)]).values()
    assert (low, high) == (1, 7) and confidence == pytest.approx(0.9609, abs=1e-4)


def test_interval_holds_the_median_as_often_as_it_says():
    draw = random.Random(0)
    held, said = [], 0.0
    for _ in range(4000):
        found = interval([draw.lognormvariate(0, 1) for _ in range(12)])
        low, high, said = found.values()
        held.append(low <= 1 <= high)  # 1 is the median of that distribution
    assert said >= 0.95
    assert statistics.mean(held) == pytest.approx(said, abs=0.015)
