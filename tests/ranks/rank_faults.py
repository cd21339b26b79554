"""Run by test_soak.py as a rank: generates, and something happens to one of the ranks.

Its arguments are what, and to which rank.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time

import ranks

what, victim = sys.argv[1], int(sys.argv[2])
hit = ranks.rank() == victim
if what == "ten seconds late" and hit:
    time.sleep(10)

import mlx.core as mx  # noqa: E402
import tiny_models  # noqa: E402

import mlx_lm_skiphead  # noqa: E402, F401

loops = importlib.import_module("mlx_lm.generate")
group = ranks.join(sleeps=not hit)
model = tiny_models.make("deepseek_v3")
if group.size() > 1:
    model.model.pipeline(group)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def generate(*, killed="", **options):
    chunks = iter(range(1000))

    def progress(done, total):
        if killed == "prefill" and next(chunks) == 2:
            die()

    told = []
    steps = loops.generate_step(
        mx.array(tiny_models.PROMPTS[2]),
        model,
        max_tokens=20,
        prefill_step_size=8,
        prompt_progress_callback=progress,
        **options,
    )
    for token, _ in steps:
        told.append(token)
        if killed == "decode" and len(told) == 10:
            die()
        if what == "stopped for five seconds" and hit and len(told) == 10:
            waker = f"sleep 5; kill -CONT {os.getpid()}"
            subprocess.Popen(["sh", "-c", waker], start_new_session=True)
            os.kill(os.getpid(), signal.SIGSTOP)
    return told


def raises(*args):
    raise ZeroDivisionError(f"in a {what.split()[0]}")


told = [generate()]
if what.startswith("killed in") and hit:
    if what.endswith("between"):
        die()
    generate(killed=what.split()[-1])
told.append(generate(**{"sampler": raises} if what == "sampler raises" else {}))
if what == "processor raises":
    generate(logits_processors=[raises])
if what == "ten seconds late":
    time.sleep(0.1)
ranks.report(told)
