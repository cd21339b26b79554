"""One rank of a bench: both ways in turn, in one process, so that drift of the machine cancels."""

from __future__ import annotations

import gc
import hashlib
import importlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .. import install, status, uninstall
from . import measure as measuring
from .ranks import WAYS, launched_rank

FEWEST, MOST = 8, 64  # tokens, where none are demanded
GATHERS = 16
Say = Callable[..., None]


def measure(task: dict[str, Any], say: Say) -> dict[str, Any]:
    """Load a model, and time rounds of it unpatched and with the plugin.

    Args:
        task: `model`; `cases`, a list of batch size and prompt length; `tokens` to generate, or
            None; `rounds`; `cores` by rank, or None; `head_passes`, see `slower_heads`; `plan`,
            0 or the bytes of hidden states, to measure what `plan.token` needs too.
        say: is told ``measured={...}`` after each measurement.

    Returns:
        What was in memory: `loaded_bytes` and `peak_bytes` by way, `on_disk` after loading. With
        `plan`, `link`, the latency in ms and the rate in Gbit/s or None; and `times`, for each case
        the ms of this rank's layers and of its head.
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

    links, times = [], []
    with slower_heads(model, group, task["head_passes"]):
        # With the plugin first: what unpatched mlx-lm reads besides is read then.
        for way in reversed(WAYS):
            if way == "unpatched":
                uninstall()
                mx.eval(model.parameters())
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
            if task["plan"]:
                say(step=f"round {done + 1} of {task['rounds']}, links and ranks alone")
                links.append(_link(group, task["plan"]))
                times.append([_alone(model, vocabulary, case, group) for case in task["cases"]])
    if task["plan"]:
        latency, rate = map(statistics.median, zip(*links, strict=True))
        result["link"] = latency, rate if rate < math.inf else None
        result["times"] = [
            [statistics.median(part) for part in zip(*of_case, strict=True)]
            for of_case in zip(*times, strict=True)
        ]
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


def _link(group: mx.distributed.Group, size: int) -> tuple[float, float]:
    """The latency of a link in ms, and its rate in Gbit/s: of all_gathers of 4 bytes and `size`."""
    if group.size() == 1:
        return 0.0, math.inf
    took = []
    for data in (mx.zeros(4, mx.uint8), mx.zeros(4 + size, mx.uint8)):
        start = 0.0
        for number in range(GATHERS + 1):
            mx.eval(mx.distributed.all_gather(data, stream=mx.cpu))
            if number == 0:  # until then some ranks may have been waiting for others
                start = time.perf_counter()
        # Not the median: ranks that are out of step take turns in being early.
        took.append(1000 * (time.perf_counter() - start) / GATHERS / (group.size() - 1))
    latency, longer = took[0], took[1] - took[0]
    return latency, 8 * size / longer / 1e6 if longer > 0 else math.inf


def _alone(
    model: Any, vocabulary: int, case: tuple[int, int], group: mx.distributed.Group
) -> tuple[float, float]:
    """Milliseconds that this rank's layers and its head take for a token, one rank at a time."""
    family = measuring.family_of(model)
    stage = family.stage_of(family.owner_of(model))
    batch, length = case
    prompts = mx.arange(batch * length).reshape(batch, length) % vocabulary
    place = stage.pipeline_rank, stage.pipeline_size
    took = (0.0, 0.0)
    for rank in range(group.size()):
        mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
        if rank == place[0]:
            stage.pipeline_rank, stage.pipeline_size = 0, 1  # its own layers, nothing sent
            try:
                took = _layers_and_head(model, prompts)
            finally:
                stage.pipeline_rank, stage.pipeline_size = place
    return took


def _layers_and_head(model: Any, prompts: mx.array) -> tuple[float, float]:
    owner = measuring.family_of(model).owner_of(model)
    cache = make_prompt_cache(model)
    heads: list[Callable[[], mx.array]] = []

    def keep(run_head: Callable[[], mx.array]) -> mx.array:
        heads.append(run_head)
        return run_head()

    _sample(owner(prompts, cache=cache))
    token = prompts[:, :1]
    with measuring.around_head(model, keep):
        _sample(owner(token, cache=cache))
    head = _median_ms(lambda: _sample(heads[0]()))
    both = _median_ms(lambda: _sample(owner(token, cache=cache)))
    return max(0.0, both - head), head


def _sample(logits: mx.array) -> None:
    """As mlx-lm's loops do it."""
    logits = logits[:, -1]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(mx.argmax(logprobs, axis=-1), logprobs)


def _median_ms(work: Callable[[], None], times: int = 5) -> float:
    took = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        took.append(1000 * (time.perf_counter() - start))
    return statistics.median(took)


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
