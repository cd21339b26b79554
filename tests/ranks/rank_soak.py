"""Run by test_soak.py as a rank: decodes for a long time, in batches that change size all the time.

Its arguments are how many decode steps, and after how many memory is first looked at. A cycle of
requests comes again and again; between two of them nothing is left but the model.
"""

from __future__ import annotations

import gc
import importlib
import sys
import zlib

import mlx.core as mx
import ranks
import tiny_models

import mlx_lm_skiphead

loops = importlib.import_module("mlx_lm.generate")
# When, of a cycle's steps, which requests come: prompt length and how many tokens.
CYCLE = {0: [(1, 9), (5, 3)], 2: [(12, 30)], 7: [(3, 1), (2, 25), (7, 12)], 20: [(1, 20)]}


def cycle(model) -> tuple[int, list[int]]:
    """Steps taken, and the tokens."""
    batch = loops.BatchGenerator(model, prefill_step_size=8)
    tokens, step, responses = [], 0, []
    while step <= max(CYCLE) or responses:
        if requests := CYCLE.get(step):
            prompts = [[(7 * i + step) % 256 for i in range(length)] for length, _ in requests]
            batch.insert(prompts, max_tokens=[limit for _, limit in requests])
        responses = batch.next_generated()
        tokens += [response.token for response in responses]
        step += 1
    batch.close()
    single = loops.generate_step(mx.array([1, 2, 3]), model, max_tokens=10)
    tokens += [token for token, _ in single]
    return step + 10, tokens


def main(steps: int, first: int) -> None:
    group = ranks.join()
    model = tiny_models.make("deepseek_v3")
    model.model.pipeline(group)
    done, digest, memory = 0, 0, []
    while done < steps:
        taken, tokens = cycle(model)
        done += taken
        digest = zlib.crc32(repr(tokens).encode())
        if (not memory and done >= first) or done >= steps:
            gc.collect()
            mx.synchronize(loops.generation_stream)
            memory.append(mx.get_active_memory())
    # Each cycle of greedy decoding gives the same tokens; the last one's are looked at.
    ranks.report({"steps": done, "memory": memory, "tokens": digest})


assert mlx_lm_skiphead.status().mode in ("on", "off")
main(*map(int, sys.argv[1:]))
