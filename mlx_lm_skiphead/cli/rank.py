"""One rank of a demo or a bench: ``python -m mlx_lm_skiphead.cli.rank TASK`` (see `cli.ranks`).

Whether the plugin is on is up to the environment, as for any program that imports it. Prints one
JSON object a line: ``{"step": ...}`` as it goes, ``{"result": ...}`` last, or ``{"error": ...}``,
and the rank in each.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import statistics
import sys
import threading
from typing import Any

from .. import install, status, uninstall
from .ranks import WAYS, launched_rank


def main() -> None:
    task = json.loads(base64.b64decode(sys.argv[1]))
    over_mpi = "OMPI_COMM_WORLD_RANK" in os.environ
    # mpirun has an input for rank 0 only.
    if task.get("ends_with_input", True) and not (over_mpi and launched_rank()):
        threading.Thread(target=_end_with_input, daemon=True).start()
    if over_mpi:  # or each rank would be alone, where MLX does not find the library
        import mlx.core as mx

        mx.distributed.init(strict=True, backend="mpi")
    try:
        if "rounds" in task:
            from .bench_rank import measure

            say(result=measure(task, say))
        else:
            say(result=_demo(task))
    except (ValueError, OSError) as error:  # a model that is not there or cannot be pipelined
        say(error=f"{error}")


def _demo(task: dict[str, Any]) -> dict[str, Any]:
    """Load, generate, count; and, where the task has rounds, time both ways in turn."""
    import mlx.core as mx

    from . import downloads, measure
    from .models import locate

    group = mx.distributed.init(strict=True)
    say(step="loading")
    measure.load(task["model"], group)  # so that the files are in the system's cache, for the next
    model, tokenizer, load_seconds = measure.load(task["model"], group)
    loaded = mx.get_active_memory()
    (on_disk,) = [model.on_disk for model in status().models] or [{}]
    family = measure.family_of(model)
    stage = family.stage_of(family.owner_of(model))
    head = family.head_of(family.owner_of(model))
    prompt = _encode(tokenizer, task["prompt"])
    tokens = task["max_tokens"]

    say(step="generating")
    mx.reset_peak_memory()
    greedy = measure.generate(model, tokenizer, prompt, tokens)
    peak = mx.get_peak_memory()
    seeded = measure.generate(model, tokenizer, prompt, tokens, temperature=0.8)
    say(step="counting heads")
    with measure.count_heads(model) as count:
        counted = measure.generate(model, tokenizer, prompt, tokens)
    result = {
        "layers": [stage.start_idx, stage.end_idx],
        "load_seconds": load_seconds,
        "loaded_bytes": loaded,
        "on_disk": on_disk,
        "peak_bytes": peak,
        "head_bytes": sum(array.nbytes for array in head.parameters().values()),
        "downloads": downloads.of_rank(locate(task["model"]), model, family),
        "refused": measure.refused(family.name),
        "greedy": greedy.tokens,
        "seeded": seeded.tokens,
        "text": greedy.text,
        # mlx-lm computes one token more than it gives out.
        "heads_per_token": count.evaluated() / (len(counted.tokens) + 1),
    }
    timed: dict[str, list[float]] = {way: [] for way in WAYS}
    for done in range(task["timing_rounds"]):
        for way, times in timed.items():
            if way == "skip":
                install()
            else:
                uninstall()
            say(step=f"timing, round {done + 1} of {task['timing_rounds']}")
            seconds = measure.generate(model, tokenizer, prompt, tokens).seconds
            between = [b - a for a, b in itertools.pairwise(seconds)]
            if between:  # not so if the first token was a stop token
                times.append(1000 * statistics.median(between))
    return {**result, "ms_per_token": timed}


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def say(**event: Any) -> None:
    """Tell the process that started the ranks."""
    event["rank"] = launched_rank() or 0
    print(json.dumps(event), flush=True)


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
