"""Run by test_programs.py as a rank: programs that people run, one after another.

Its arguments are folders of checkpoints: an untied one, a tied one, and one of qwen3_next. A
program reports what a user sees of it on this rank; with the plugin that must be what it is without
it.
"""

from __future__ import annotations

import os
import sys

import mlx.core as mx
import ranks
from programs.batches import done, errors, forced, random, small, two_batches
from programs.loading import RANK, TIED, UNTIED
from programs.own_loops import guidance, pair
from programs.packages import stages_of_their_own, telemetry
from programs.speculation import Counting, OwnKey, Surprised, failing_speculation, speculation
from programs.weights import lora, no_group, quantized_in_a_thread, recast, weights, wrapped_head

PROGRAMS = {
    "recast": lambda: recast(UNTIED, mx.float16),
    "recast, tied": lambda: recast(TIED, mx.bfloat16),
    "adapter before": lambda: lora("lm_head", "before"),
    "adapter after": lambda: lora("lm_head", "after"),
    "adapter, tied": lambda: lora("embed_tokens", "after"),
    "wrapped head": wrapped_head,
    "speculation, counting": lambda: speculation(2, logits_processors=[Counting()]),
    "speculation, 5 drafts": lambda: speculation(5, logits_processors=[Counting()]),
    "speculation, own key": lambda: speculation(2, sampler=OwnKey()),
    "speculation fails": failing_speculation,
    "speculation by value": lambda: speculation(2, sampler=Surprised()),
    "forced": forced,
    "two batches": lambda: two_batches(False),
    "two batches, two models": lambda: two_batches(True),
    "guidance, one block": lambda: guidance("one block"),
    "guidance, two blocks": lambda: guidance("two blocks"),
    "guidance, a share each": lambda: guidance("a share each"),
    "done": done,
    "errors": errors,
    "random": random,
    "telemetry": telemetry,
    "pair": pair,
    "weights": weights,
    "quantized in a thread": quantized_in_a_thread,
    "no group": no_group,
    "stages of their own": stages_of_their_own,
    "small": small,
}

told = {}

for name in sys.argv[4:] or PROGRAMS:
    try:
        told[name] = PROGRAMS[name]()
    except Exception as error:
        told[name] = f"{type(error).__name__}: {error}"
    print(RANK, name, file=sys.stderr, flush=True)

ranks.report(told)

os._exit(0)  # MLX may abort at the exit of a process in which a thread has computed
