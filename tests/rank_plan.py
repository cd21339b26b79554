"""Run by test_plan.py as a rank: loads each of the checkpoints in a folder, says what that took."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import ranks

import mlx_lm_skiphead

group = mx.distributed.init()
told = {}
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
ranks.report(told)
