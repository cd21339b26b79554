"""Run by test_split.py, alone or as a rank: models that are split unevenly.

Its arguments are the folder of checkpoints, and for each model its name and splits, as in
``qwen2:1,4:4,1``; without one it is split as mlx-lm does. Of each it reports tokens, which layers
are this rank's, what is in memory and on disk, until which length prompt caches can be trimmed,
and errors. At the end come splits of the program's own, and a model that is left to upstream.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import rank_families
import ranks
import tiny_models
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

import mlx_lm_skiphead
from mlx_lm_skiphead import config, installing
from mlx_lm_skiphead.patching import registry

OWN = "glm4_moe"
LENGTHS = (1, 40)
REQUESTS = ("greedy, one token", "all of it, several chunks")
"""Of rank_families.py, where all families have them all."""
group = ranks.join()


def load(folder, split, *own):
    """The model, with a split by the variable, and perhaps one of the program's own."""
    os.environ[config.SPLIT] = split
    if mlx_lm_skiphead.status().mode != "off":
        mlx_lm_skiphead.install()
    # Not by `sharded_load`: tiny configurations do not please every tokenizer.
    model, _ = mlx_lm.utils.load_model(folder, lazy=True, strict=False)
    if group.size() > 1:
        model.model.pipeline(group, *own)
    mx.eval(model.parameters())
    gc.collect()
    return model


def layers(model):
    return [model.model.start_idx, model.model.end_idx]


def trimmable(model):
    """Whether the cache of a prompt can be trimmed, by its length."""
    told = []
    for length in LENGTHS:
        cache = make_prompt_cache(model)
        mx.eval(model(mx.zeros((1, length), mx.int32), cache=cache))
        told.append(can_trim_prompt_cache(cache))
    return told


def main(folder: str, *cases: str) -> None:
    told = {}
    if tiny_models.is_pipelined("muse_spark"):
        tiny_models.architecture("muse_spark")  # which lets that family run without Metal
    for case in cases:
        name, *splits = case.split(":")
        for split in splits or [""]:
            model = None
            said = told[f"{name}:{split}"] = {}
            gc.collect()
            mx.clear_cache()
            before = mx.get_active_memory()
            try:
                model = load(Path(folder, name), split)
            except (ValueError, mlx_lm_skiphead.SkipheadError) as error:
                said["error"] = f"{type(error).__name__}: {error}"
                continue
            said["loaded"] = mx.get_active_memory() - before
            said["status"] = [s._asdict() for s in mlx_lm_skiphead.status().models]
            said["requests"], said["heads"] = rank_families.answers(model, *REQUESTS)
            said["batch"] = rank_families.batched(model)
            said["trimmable"] = trimmable(model)
            said["layers"] = layers(model)
    if group.size() > 1 and len(cases) > 2:
        others = [2] + [1] * (group.size() - 2)
        own = [5 - sum(others), *others]
        split = ",".join(map(str, reversed(own)))
        told["own"] = [
            layers(load(Path(folder, OWN), split, *given)) for given in ((own,), (None,))
        ]
        # As if the plugin had refused that family.
        installing._take_out(registry.outcomes.pop(OWN).handles)
        try:
            mlx_lm.utils.sharded_load(str(Path(folder, OWN)), pipeline_group=group)
        except mlx_lm_skiphead.SkipheadError as error:
            told["left"] = str(error)
    ranks.report(told)


if __name__ == "__main__":
    main(*sys.argv[1:])
