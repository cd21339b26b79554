"""A step that does not end: each rank says so once, what it waits for, and what is said is true."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import tiny_models

from mlx_lm_skiphead.config import deadline_seconds, watch_seconds

SCRIPT = Path(__file__).parent / "rank_watch.py"
ON = {"MLX_LM_SKIPHEAD": "1", "MLX_LM_SKIPHEAD_WATCH": "2"}
pytestmark = pytest.mark.skipif(tiny_models.EVENLY, reason="mlx-lm before 0.32 has no qwen2")


def lines(stderr: str, part: str) -> dict[str, list[str]]:
    """What each rank of 3 has said in a part of the program."""
    found: dict[str, list[str]] = {}
    for rank in "012":
        said = re.findall(rf"^(?:== (\d) (.*)|(rank {rank} of \d, .*))$", stderr, re.MULTILINE)
        now = ""
        for by, name, line in said:
            if by == rank:
                now = name
            elif line and now == part:
                found.setdefault(rank, []).append(line)
    return found


def test_what_is_said_is_true():
    done = ranks.launch(SCRIPT, ranks=3, env=ON, timeout=120)
    first = done.results[0]
    for rank, told in enumerate(done.results):
        assert told["right"] == first["right"] == told["stopped"] == told["callback"]
        (step,) = told["status"]
        assert step.startswith(f"rank {rank} of 3, prompt: 0 s for a callback of the program")
    assert not lines(done.stderr, "idle")
    stopped = lines(done.stderr, "stopped")
    assert stopped.keys() == {"0", "2"}  # rank 1 itself has nothing to say
    for rank, what in (("0", "hidden states of rank 1"), ("2", "rank 0's token")):
        told, went_on = stopped[rank]
        # A worker has built the next step while it waits for the token of the one before.
        assert re.match(
            rf"rank {rank} of 3, step [3-6], batch 1: [2-5] s for {what}; usually an", told
        )
        assert went_on.startswith(told.partition(";")[0]) and "went on after" in went_on
    assert "Thread 0x" in done.stderr and "rank_watch.py" in done.stderr  # the stacks
    callback = lines(done.stderr, "callback")
    assert callback["1"][0].endswith("s for a callback of the program")
    assert re.search("prompt, chunk 1 of 1: [2-4] s for hidden states of rank 1", callback["0"][0])
    # With a deadline of half the naps that all ranks take.
    assert not lines(done.stderr, "busy")
    assert not lines(done.stderr, "slow chunks")
    for rank in done.results:
        assert rank["busy"] == first["right"]
        assert rank["slow"] == rank["chunks"] == first["prompt"]
        assert rank["batch"] == first["batched"]
    for loop in ("chunks", "batch"):
        stopped = lines(done.stderr, f"stopped, {loop}")
        assert stopped.keys() >= {"0"} and "1" not in stopped
        told, with_stacks, went_on = stopped["0"]
        # Rank 1 may have built a chunk, and not yet sent the ones before.
        where = r"rank 0 of 3, prompt, chunk [4-6] of 10: {} s for hidden states of rank 1"
        # A busy machine may look, and go on, a few seconds late; never early.
        assert re.match(where.format("[1-9]") + "; usually an[^;]*$", told)
        assert re.match(where.format("[3-9]") + "; usually an.*; the stacks of all", with_stacks)
        assert re.match(where.format("[3-9]") + r": went on after ([4-9]|1\d) s", went_on)


@pytest.mark.parametrize("off", ["0", "1"])
def test_a_rank_without_the_plugin_is_named_where_ranks_are_not_compared(off):
    env = ON | {"OFF": off}
    with pytest.raises(ranks.RanksTimeout) if off == "1" else contextlib.nullcontext() as timeout:
        done = ranks.launch(SCRIPT, ranks=2, env=env, timeout=15, check=False)
    if off == "0":
        assert "Rank 0 has sent something else than a token share." in done.stderr
        assert "or mlx-lm-skiphead is off on that rank" in done.stderr
    else:
        told = "rank 0 of 2, step 2, batch 1: 2 s for hidden states of rank 1; usually .*"
        assert re.search(f"{told}mlx-lm-skiphead is off on one", str(timeout.value))


SWITCHED_OFF = """
import os, threading, time
import mlx_lm_skiphead
from mlx_lm_skiphead.ranks import watch

def seconds_of_cpu(value):
    os.environ["MLX_LM_SKIPHEAD_WATCH"] = value
    mlx_lm_skiphead.install()
    with watch.watched(lambda seconds: "a step", is_slow=False):
        before = time.process_time()
        time.sleep(1.5)
    return time.process_time() - before

print(seconds_of_cpu("0.1"), seconds_of_cpu("0"), seconds_of_cpu("0.1"))
assert "skiphead-watch" in [thread.name for thread in threading.enumerate()]
"""


def test_a_watch_that_is_switched_off_takes_no_time():
    command = [sys.executable, "-c", SWITCHED_OFF]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert all(float(seconds) < 0.2 for seconds in done.stdout.split())
    # Of the first and the third step, and none of the second.
    assert done.stderr.count("a step; ") == done.stderr.count("a step: went on after") == 2


DEADLINE = """
import os, subprocess, sys, time
import mlx_lm_skiphead
from mlx_lm_skiphead.ranks import watch

os.environ |= {"MLX_LM_SKIPHEAD_WATCH": "0", "MLX_LM_SKIPHEAD_DEADLINE": "2"}
mlx_lm_skiphead.install()

def describe(seconds):
    return f"rank 0 of 2, step 3: {seconds:.0f} s for rank 1"

with watch.watched(describe):
    for _ in range(10):  # it goes on
        time.sleep(0.3)
        watch.goes_on()
    with watch.watched(describe, is_programs=True):  # it is busy
        time.sleep(3)
    time.sleep(1)
    stop = f"kill -STOP {os.getpid()}; sleep 4; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", stop])
    time.sleep(0.5)  # it was stopped, and is awake again
time.sleep(3)  # it is idle
print("waits", flush=True)
with watch.watched(describe):
    time.sleep(20)
"""


def test_a_deadline():
    command = [sys.executable, "-c", DEADLINE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "waits\n"
    assert done.returncode == 75
    said = r"mlx-lm-skiphead: rank 0 of 2, step 3: [23] s for rank 1; MLX_LM_SKIPHEAD_DEADLINE=2 is"
    assert re.fullmatch(rf"{said} over, exit code 75\n", done.stderr)


@pytest.mark.parametrize(("value", "seconds"), [(None, 30), ("0", 0), ("2.5", 2.5)])
def test_seconds(value, seconds):
    assert watch_seconds({} if value is None else {"MLX_LM_SKIPHEAD_WATCH": value}) == seconds
    deadline = deadline_seconds({} if value is None else {"MLX_LM_SKIPHEAD_DEADLINE": value})
    assert deadline == (seconds if value else 0)


@pytest.mark.parametrize("value", ["-1", "nan", "soon", "inf"])
def test_no_number(value):
    with pytest.raises(ValueError, match="MLX_LM_SKIPHEAD_WATCH="):
        watch_seconds({"MLX_LM_SKIPHEAD_WATCH": value})
    with pytest.raises(ValueError, match="MLX_LM_SKIPHEAD_DEADLINE="):
        deadline_seconds({"MLX_LM_SKIPHEAD_DEADLINE": value})
