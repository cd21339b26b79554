"""``python tests/tools/step_time.py``: what the plugin's own Python takes per decode step.

mlx-lm's loops run with a model that only hands out arrays that it has, in one process that plays a
rank of two. What a step takes is measured without py-spy, which stops a process to look at it; then
py-spy looks 200 times a second where it is: in a function of the package, with the operations of
MLX that it makes, or elsewhere.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))  # for tiny_models

FAMILY = "deepseek_v3"
STEPS, SECONDS, BATCH = 500, 10, 8
INHERITED = ("(nn/", "(mlx/nn/", "(contextlib", "(threading", "(_weakrefset")
"""Files of functions that count where they are called."""


def stub(rank: int):
    """A model on one rank of two, with the plugin, that computes nothing."""
    import mlx.core as mx
    import tiny_models

    import mlx_lm_skiphead
    from mlx_lm_skiphead.patching import drift

    hidden = {size: mx.zeros((size, 1, 8)) for size in (1, BATCH)}
    logits = {size: mx.zeros((size, 1, 32)) for size in (1, BATCH)}
    mx.eval(hidden, logits)

    def stage_call(self, inputs, cache=None):
        size = inputs.shape[0]
        return mx.distributed.all_gather(hidden[size])[:size]

    def model_call(self, inputs, cache=None):
        return logits[self.model(inputs, cache).shape[0]]

    family = importlib.import_module(f"mlx_lm.models.{FAMILY}")
    family.Model.__call__, family.DeepseekV3Model.__call__ = model_call, stage_call
    drift.runs_head = drift.broadcasts = lambda _: ""
    mlx_lm_skiphead.install(strict=True)
    model = tiny_models.make(FAMILY)
    model.model.pipeline_size, model.model.pipeline_rank = 2, rank
    return model


def single(model) -> None:
    import mlx.core as mx

    loops = importlib.import_module("mlx_lm.generate")
    for _ in loops.generate_step(mx.array([1]), model, max_tokens=STEPS):
        pass


def batched(model) -> None:
    loops = importlib.import_module("mlx_lm.generate")
    batch = loops.BatchGenerator(model, stop_tokens=[])
    # Not to their end, where upstream looks into the caches, which are empty here.
    batch.insert([[1]] * BATCH, max_tokens=[STEPS + 2] * BATCH)
    for _ in range(STEPS):
        batch.next_generated()
    batch.close()


LOOPS = {"single": single, "batched": batched}


def decode(rank: int, loop: str) -> None:
    model = stub(rank)
    until, steps, start = time.monotonic() + SECONDS, 0, time.perf_counter()
    while time.monotonic() < until:
        LOOPS[loop](model)
        steps += STEPS
    print(f"step {1e6 * (time.perf_counter() - start) / steps}")


def is_own(stack: list[str]) -> bool:
    calling = (frame for frame in reversed(stack) if not any(part in frame for part in INHERITED))
    return "(mlx_lm_skiphead/" in next(calling, "")


def main() -> None:
    env = {k: v for k, v in os.environ.items() if k != "MLX_LM_SKIPHEAD"}
    spy = Path(sys.executable).with_name("py-spy")
    for loop in LOOPS:
        for rank in (0, 1):
            command = [sys.executable, __file__, str(rank), loop]
            alone = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
            with tempfile.TemporaryDirectory() as folder:
                raw = Path(folder, "raw")
                subprocess.run(
                    [spy, "record", "-r", "200", "-f", "raw", "-o", raw, "--", *command],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    check=True,
                    env=env,
                )
                own = total = 0
                for line in raw.read_text().splitlines():
                    frames, _, samples = line.rpartition(" ")
                    stack = frames.split(";")
                    if any(frame.startswith(loop) for frame in stack):
                        total += int(samples)
                        own += int(samples) * is_own(stack)
            step = float(re.findall(r"^step (.*)$", alone.stdout, re.MULTILINE)[0])
            print(
                f"rank {rank}, {loop}: {step * own / total:.0f} of {step:.0f} us a step",
                flush=True,
            )


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else decode(int(sys.argv[1]), sys.argv[2])
