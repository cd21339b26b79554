"""Run by test_plan.py as a rank: loads each of the checkpoints in a folder, says what that took."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import ranks
import tiny_models
from mlx_lm.models.cache import make_prompt_cache

import mlx_lm_skiphead

group = ranks.join()


def cache_bytes(model):
    """Of a prompt that this rank has computed as its last step would be: one token at the end."""
    cache = make_prompt_cache(model)
    context = int(sys.argv[2])
    for length in (context - 1, 1):
        mx.eval(model(mx.zeros((1, length), mx.int32), cache=cache))
    return sum(one.nbytes for layer in cache for one in getattr(layer, "caches", (layer,)))


told = {}
if tiny_models.is_pipelined("muse_spark"):
    tiny_models.make("muse_spark")  # which lets that family run without Metal
model = None
for folder in sorted(Path(sys.argv[1]).iterdir()):
    del model
    gc.collect()
    mx.clear_cache()  # a buffer from it may be larger than what it is used for
    before = mx.get_active_memory()
    # Not by `sharded_load`: tiny configurations do not please every tokenizer.
    model, _ = mlx_lm.utils.load_model(folder, lazy=True, strict=False)
    model.model.pipeline(group)
    mx.eval(model.parameters())
    gc.collect()
    told[folder.name] = {"loaded": mx.get_active_memory() - before}
    for status in mlx_lm_skiphead.status().models:
        told[folder.name]["on disk"] = status.on_disk
    if not mlx_lm_skiphead.status().models:  # unpatched
        told[folder.name]["cache"] = cache_bytes(model)
ranks.report(told)
