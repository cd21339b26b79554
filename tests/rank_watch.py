"""Run by test_watch.py as a rank: what the watch says, one scenario after another."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time

import mlx.core as mx
import ranks
import tiny_models

if os.environ.get("OFF") == os.environ["MLX_RANK"]:
    os.environ["MLX_LM_SKIPHEAD"] = "0"
import mlx_lm_skiphead

loops = importlib.import_module("mlx_lm.generate")
STOP = "kill -STOP {0}; sleep 5; kill -CONT {0}"


def say(what):
    print(f"== {os.environ['MLX_RANK']} {what}", file=sys.stderr, flush=True)


def main(seconds: float) -> None:
    group = mx.distributed.init()
    rank = group.rank()
    model = tiny_models.make("qwen2-tied")
    model.model.pipeline(group)

    def tokens(prompt=(1, 2, 3), stopped=False, **options):
        told = []
        for token, _ in loops.generate_step(mx.array(prompt), model, max_tokens=8, **options):
            told.append(token)
            if stopped and rank == 1 and len(told) == 3:
                subprocess.Popen(["sh", "-c", STOP.format(os.getpid())])
                time.sleep(1)
        mx.synchronize(loops.generation_stream)
        return told

    told = {"right": tokens()}
    say("idle")
    time.sleep(2 * seconds)
    say("stopped")
    told["stopped"] = tokens(stopped=True)
    say("callback")
    naps = [2 * seconds] if rank == 1 else []
    called = []

    def nap(done, total):
        called.append(mlx_lm_skiphead.status().steps)
        time.sleep(naps.pop() if naps else 0)

    told["callback"] = tokens(prompt_progress_callback=nap)
    told["status"] = called[0]
    say("long prompt")
    tokens(prompt=[i % 256 for i in range(int(os.environ["CHUNKS"]))], prefill_step_size=1)
    say("end")
    ranks.report(told)


main(float(os.environ.get("MLX_LM_SKIPHEAD_WATCH", "0")))
