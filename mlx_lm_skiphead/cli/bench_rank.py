"""One rank of a bench: both ways in turn, in one process, so that drift of the machine cancels."""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .. import install, status, uninstall
from . import measure as measuring
from .ranks import WAYS, launched_rank

FEWEST, MOST = 8, 64  # tokens, where none are demanded
Say = Callable[..., None]


def measure(task: dict[str, Any], say: Say) -> dict[str, Any]:
    """Load a model, and time rounds of it unpatched and with the plugin.

    Args:
        task: `model`; `cases`, a list of batch size and prompt length; `tokens` to generate, or
            None; `rounds`; `cores` by rank, or None; `head_passes`, see `slower_heads`.
        say: is told ``measured={...}`` after each measurement.

    Returns:
        What was in memory: `loaded_bytes` and `peak_bytes` by way, `on_disk` after loading.
    """
    if task["cores"] is not None:
        os.sched_setaffinity(0, task["cores"][launched_rank() or 0])
    group = mx.distributed.init()
    say(step="loading")
    model, _, _ = measuring.load(task["model"], group)
    family = measuring.family_of(model)
    if refused := measuring.refused(family.name):
        raise ValueError(f"nothing is skipped here: {refused}")
    owner = family.owner_of(model)
    vocabulary = family.head_of(owner)["weight"].shape[0]  # not read for that
    on_disk = next((s.on_disk for s in status().models), {})
    result: dict[str, Any] = {"on_disk": on_disk, "loaded_bytes": {}, "peak_bytes": {}}

    with slower_heads(model, group, task["head_passes"]):
        # With the plugin first: what unpatched mlx-lm needs besides is read when it needs it.
        for way in reversed(WAYS):
            if way == "unpatched":
                uninstall()
                _prompted(model, vocabulary, (1, 1), 1, group)
                gc.collect()
            result["loaded_bytes"][way] = mx.get_active_memory()
            mx.reset_peak_memory()
            tokens = []
            for case in task["cases"]:
                say(step=f"warming up, {way}, {_named(case)}")
                warm = _prompted(model, vocabulary, case, task["tokens"] or FEWEST, group)
                tokens.append(task["tokens"] or _agreed(2000 / warm["ms_per_token"], group))
            result["peak_bytes"][way] = mx.get_peak_memory()
        for done in range(task["rounds"]):
            for case, length in zip(task["cases"], tokens, strict=True):
                # Each way comes first as often as the other.
                for way in WAYS if done % 2 == 0 else reversed(WAYS):
                    install() if way == "skip" else uninstall()
                    say(step=f"round {done + 1} of {task['rounds']}, {_named(case)}")
                    measured = _prompted(model, vocabulary, case, length, group)
                    say(measured={"case": case, "round": done, "way": way, **measured})
    return result


@contextmanager
def slower_heads(model: Any, group: mx.distributed.Group, passes: int) -> Iterator[None]:
    """Workers compute each head `passes` times, which stands for machines that are slower at it."""
    if passes == 1 or group.rank() == 0:
        yield
        return

    def repeated(run_head: Callable[[], mx.array]) -> mx.array:
        logits = run_head()
        for _ in range(passes - 1):
            logits = mx.depends(run_head(), logits)
        return logits

    with measuring.around_head(model, repeated):
        yield


def _prompted(
    model: Any, vocabulary: int, case: tuple[int, int], tokens: int, group: mx.distributed.Group
) -> dict[str, Any]:
    """Generate `tokens` for each of a batch: when they came, and a digest of what they are."""
    batch, length = case
    prompts = [
        [(31 * i + 7 * i * i + 11 * b) % vocabulary for i in range(length)] for b in range(batch)
    ]
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))  # all ranks begin at once
    steps = _single(model, prompts[0], tokens) if batch == 1 else _batched(model, prompts, tokens)
    start = time.perf_counter()
    times, generated = [], []
    for step in steps:
        times.append(time.perf_counter() - start)
        generated.append(step)
    between = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    return {
        "tokens": tokens,
        "first_token_ms": 1000 * times[0],
        "ms_per_token": 1000 * between,
        "digest": hashlib.sha256(repr(sorted(map(tuple, generated))).encode()).hexdigest()[:16],
    }


def _agreed(tokens: float, group: mx.distributed.Group) -> int:
    """Rank 0's number of tokens, within reason, on all ranks."""
    mine = min(MOST, max(FEWEST, round(tokens))) if group.rank() == 0 else 0
    total: Any = mx.distributed.all_sum(mx.array(mine), stream=mx.cpu).item()
    return int(total)


def _single(model: Any, prompt: list[int], tokens: int) -> Iterator[list[int]]:
    loops: Any = importlib.import_module("mlx_lm.generate")
    for number, (token, _) in enumerate(
        loops.generate_step(mx.array(prompt), model, max_tokens=tokens)
    ):
        yield [number, 0, token]
    # Unpatched, a step is still in flight; it must not reach into what comes next.
    mx.synchronize(loops.generation_stream)


def _batched(model: Any, prompts: list[list[int]], tokens: int) -> Iterator[list[int]]:
    loops: Any = importlib.import_module("mlx_lm.generate")
    size = len(prompts)
    generator = loops.BatchGenerator(
        model, completion_batch_size=size, prefill_batch_size=size, stop_tokens=[]
    )
    uids = generator.insert(prompts, max_tokens=[tokens] * size)
    number = 0
    while responses := generator.next_generated():
        row = [number]
        for response in responses:
            row += [uids.index(response.uid), response.token]
        yield row
        number += 1
    generator.close()
    mx.synchronize(loops.generation_stream)


def _named(case: tuple[int, int]) -> str:
    return f"batch {case[0]}, prompt {case[1]}"
