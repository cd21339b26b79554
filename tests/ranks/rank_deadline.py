"""Run by test_deadline.py as a rank: one of them stops in the middle of a generation.

Its arguments are the rank that stops, for how many seconds, and where: in a "prompt", in "decode",
or before it loads the checkpoint in the folder that is named then.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time

import mlx.core as mx
import ranks
import tiny_models
from mlx_lm.utils import sharded_load

import mlx_lm_skiphead  # noqa: F401

loops = importlib.import_module("mlx_lm.generate")
stops, seconds, where, *folder = sys.argv[1:]

group = ranks.join(sleeps=str(ranks.rank()) != stops)


def stop() -> None:
    if str(group.rank()) == stops:
        pid = os.getpid()
        print(f"== {time.time()} stops", file=sys.stderr, flush=True)
        command = f"kill -STOP {pid}; sleep {seconds}; kill -CONT {pid}"
        subprocess.Popen(["sh", "-c", command], start_new_session=True)
        time.sleep(1)


def progress(done: int, total: int) -> None:
    if where == "prompt" and done == 12:
        stop()


if where == "load":
    stop()
    sharded_load(*folder, pipeline_group=group)
model = tiny_models.make("qwen2-tied")
model.model.pipeline(group)
told = []
prompt = mx.array([i * 7 % 250 for i in range(41)])
for token, _ in loops.generate_step(
    prompt, model, max_tokens=10**9, prefill_step_size=4, prompt_progress_callback=progress
):
    told.append(token)
    if where == "decode" and len(told) == 20:
        stop()
