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
PROMPT = [i * 7 % 250 for i in range(41)]
STOP = "kill -STOP {0}; sleep 5; kill -CONT {0}"


def say(what):
    print(f"== {os.environ['MLX_RANK']} {what}", file=sys.stderr, flush=True)


def limits(watch="0", deadline="0"):
    os.environ |= {"MLX_LM_SKIPHEAD_WATCH": watch, "MLX_LM_SKIPHEAD_DEADLINE": deadline}
    mlx_lm_skiphead.install()


def stop():
    """This rank, for five seconds."""
    subprocess.Popen(["sh", "-c", STOP.format(os.getpid())])
    time.sleep(0.5)  # less than the watch of any part


class Slow:
    """In the place of a layer: each of its calls takes a while, and the rank may stop in one."""

    def __init__(self, layer):
        self.layer, self.calls, self.seconds, self.stops_at = layer, 0, 0.0, 0

    def __call__(self, *args):
        time.sleep(self.seconds)
        self.calls += 1
        if self.calls == self.stops_at:
            stop()
        return self.layer(*args)


def main(seconds: float) -> None:
    group = ranks.join(sleeps=ranks.rank() != 1)
    rank = group.rank()
    model = tiny_models.make("qwen2-tied")
    model.model.pipeline(group)

    def tokens(prompt=(1, 2, 3), stopped=False, **options):
        told = []
        for token, _ in loops.generate_step(mx.array(prompt), model, max_tokens=8, **options):
            told.append(token)
            if stopped and rank == 1 and len(told) == 3:
                stop()
        mx.synchronize(loops.generation_stream)
        return told

    def chunks():
        return tokens(PROMPT, prefill_step_size=4)

    def batch():
        generator = loops.BatchGenerator(model, prefill_step_size=4, max_tokens=8)
        generator.insert_segments([[PROMPT[:5], PROMPT[5:22], PROMPT[22:33]], [PROMPT[:9]]])
        told = []
        while responses := generator.next_generated():
            told += [[r.uid, r.token] for r in responses]
        generator.close()
        return told

    def nap_at(call):
        """A callback, or a sampler, that sleeps in that one of its calls."""
        seen = []

        def nap(*args):
            seen.append(mlx_lm_skiphead.status().steps)
            if len(seen) == call:
                time.sleep(2 * seconds)
            return mx.argmax(args[0], axis=-1) if isinstance(args[0], mx.array) else seen

        return nap

    told = {"right": tokens()}
    say("idle")
    time.sleep(2 * seconds)
    say("stopped")
    told["stopped"] = tokens(stopped=True)
    say("callback")
    nap = nap_at(1 if rank == 1 else 0)
    told["callback"] = tokens(prompt_progress_callback=nap)
    told["status"] = nap(0)[0]
    if group.size() == 3:
        told["prompt"], told["batched"] = chunks(), batch()
        say("busy")
        limits(deadline="2")
        told["busy"] = tokens(prompt_progress_callback=nap_at(1), sampler=nap_at(3))
        time.sleep(2 * seconds)
        limits(watch="1")
        slow = model.model.layers[-1] = Slow(model.model.layers[-1])
        say("slow chunks")
        slow.seconds = 0.4
        told["slow"] = chunks()
        slow.seconds = 0.1
        for loop in (chunks, batch):
            say(f"stopped, {loop.__name__}")
            slow.stops_at = slow.calls + 6 if rank == 1 else 0
            told[loop.__name__] = loop()
    say("end")
    ranks.report(told)


main(float(os.environ.get("MLX_LM_SKIPHEAD_WATCH", "0")))
