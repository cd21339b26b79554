"""The demo, as a user starts it: what it prints, its exit codes, and that nothing is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import warm
from rich.console import Console

from mlx_lm_skiphead.cli import demo, main

DEMO = ("-m", "mlx_lm_skiphead", "demo")


def ranks_of(parent: int) -> list[int]:
    """The processes that `parent` has started."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout
    return [
        int(p) for p, pp in (line.split() for line in listed.splitlines()[1:]) if int(pp) == parent
    ]


def left_of(processes: list[int]) -> list[int]:
    """Those that do not end within 30 s: ranks of a killed parent notice at their next look."""
    limit = time.monotonic() + 30
    while (left := [p for p in processes if Path(f"/proc/{p}").exists()]) and (
        time.monotonic() < limit
    ):
        time.sleep(0.1)
    return left


def test_demo() -> None:
    done = subprocess.run(
        [warm.python(), *DEMO, "-n", "3", "--max-tokens", "4"],
        capture_output=True,
        text=True,
        timeout=400,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "120", warm.JOIN: "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cell = r" +([\d.]+) → ([\d.]+) │"
    row = rf"│ +(\d) │ (.+?) +│{cell}{cell} +([\d.]+) │{cell}"
    rows = re.findall(row, done.stdout)
    assert [(*found[:2], *found[-2:]) for found in rows] == [
        ("0", "head", "1.00", "1.00"),
        ("1", "middle", "1.00", "0.00"),
        ("2", "first stage", "1.00", "0.00"),
    ]
    # After loading, without the plugin and with it, and what it left on disk.
    memory = [[float(found[place]) for place in (2, 3, 6)] for found in rows]
    assert [on_disk for _, _, on_disk in memory] == [134.2, 268.4, 134.2]
    assert all(abs(plain - (skip + left)) < 0.2 for plain, skip, left in memory), memory
    assert "Tokens agree: on all ranks, both ways, in every round." in done.stdout
    said = " ".join(done.stdout.split())
    assert "Answers agree: 4 greedy tokens and 4 at temperature 0.8, on all 3 ranks" in said
    assert "plugin / unpatched" in done.stdout
    assert "only rank 0 ran the head, and 537 MB of weights stayed on disk." in said
    steps = done.stderr.splitlines()
    assert all(re.match("loading|warming up|answering|round", step) for step in steps), steps


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_demo_that_is_stopped(how: signal.Signals) -> None:
    process = subprocess.Popen(
        warm.command_line("demo"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert process.stderr is not None
    while "loading" not in process.stderr.readline():
        assert process.poll() is None
    (launcher,) = ranks_of(process.pid)
    ranks = ranks_of(launcher)
    assert len(ranks) == 2
    process.send_signal(how)
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    if how != signal.SIGKILL:
        assert process.returncode == 130 and "all ranks have been ended" in errors
        assert not output and "Traceback" not in errors
    assert not left_of(ranks)


def answers(unpatched: dict[str, Any], last: dict[str, Any]) -> list[dict[str, Any]]:
    """Of two ranks: all are `unpatched`, but for rank 1's with the plugin."""
    return [{"answers": {"unpatched": unpatched, "plugin": its}} for its in (unpatched, last)]


def test_different_tokens_are_said_and_exit_1() -> None:
    plain = {"text": "a", "tokens": [[1, 2], [3]], "heads_per_token": 0}
    console = Console(record=True, width=120)
    assert demo._compare(console, answers(plain, {**plain, "tokens": [[1, 9], [3]]})) == 1
    said = console.export_text()
    assert "rank 1 gives [[1, 9], [3]] where unpatched mlx-lm gives [[1, 2], [3]]" in said


def test_workers_that_run_heads_are_said_and_exit_1() -> None:
    plain = {"text": "a", "tokens": [[1], [3]], "heads_per_token": 1}
    console = Console(record=True, width=120)
    assert demo._compare(console, answers(plain, plain)) == 1
    assert "workers ran heads with the plugin on" in console.export_text()


def test_a_model_that_is_not_there(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--model", str(tmp_path)]) == 2
    captured = capfd.readouterr()
    assert "mlx-lm-skiphead demo: there is no model in" in captured.err and not captured.out


@pytest.mark.parametrize(
    "arguments", [["-n", "1"], ["-n", "two"], ["--max-tokens", "0"], ["--unknown"]]
)
def test_wrong_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["demo", *arguments])
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err
