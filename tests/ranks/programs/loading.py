"""Models that are loaded from checkpoints."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import mlx.core as mx
import ranks
import tiny_models
from mlx_lm.utils import load_model, sharded_load

loops = importlib.import_module("mlx_lm.generate")

UNTIED, TIED, NEXT = map(Path, sys.argv[1:4])

PROMPT = tiny_models.PROMPTS[1]

GROUP = ranks.join()

RANK = GROUP.rank()

OWN = Path(os.environ["RANK_RESULTS"], f"own-{RANK}")  # a folder of this rank's


def load(folder=UNTIED):
    return sharded_load(str(folder), pipeline_group=GROUP)[0]


def lazy(folder=UNTIED):
    """A model whose pipeline the program sets up itself."""
    model, _ = load_model(Path(folder), lazy=True)
    model.model.pipeline(GROUP)
    mx.eval(model.parameters())
    return model


def tokens(model, prompt=PROMPT, limit=8, **options):
    mx.random.seed(7)
    told = [t for t, _ in loops.generate_step(mx.array(prompt), model, max_tokens=limit, **options)]
    mx.synchronize(loops.generation_stream)
    return told


def direct(model):
    """The first numbers of a direct call, and their type."""
    logits = model(mx.array([PROMPT]))[0, -1, :8]
    return [str(logits.dtype), [round(x, 3) for x in logits.astype(mx.float32).tolist()]]
