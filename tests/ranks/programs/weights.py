"""What programs do to weights: cast, adapt, wrap, replace, save, and delete their folder."""

from __future__ import annotations

import shutil

import mlx.core as mx
import tiny_models
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.utils import load_model, save_model, sharded_load
from pieces import Scaled

from programs.common import VOCAB, direct, tokens
from programs.models import FILES, GROUP, RANK, checkpoint, load, own_pipeline
from programs.registry import program
from programs.threads import in_thread


@program("unsloth-zoo #854", "oMLX #3277", model=["untied", "tied"])
def recast(model):
    """Weights get another type after loading; a head left on disk would keep the old one."""
    dtype = mx.float16 if model == "untied" else mx.bfloat16
    model = load(f"{'qwen2' if model == 'untied' else 'ministral3'}-{model}")
    model.set_dtype(dtype)
    return [tokens(model), direct(model), tokens(model)]


@program("unsloth-zoo #932", where=["lm_head"], when=["before the pipeline", "after the pipeline"])
@program("unsloth-zoo #932", where=["embed_tokens"], when=["after the pipeline"])
def adapter(where, when):
    """LoRA on the head, or on an embedding that is the head too: a module without `weight`."""
    tied = where == "embed_tokens"
    model, _ = load_model(checkpoint("ministral3-tied" if tied else "qwen2-untied"), lazy=True)

    def adapt():
        parent = model.model if tied else model
        kind = LoRAEmbedding if tied else LoRALinear
        mx.random.seed(3)
        adapted = kind.from_base(getattr(parent, where), r=4, scale=10.0)
        adapted.lora_b = mx.random.normal(adapted.lora_b.shape) * 0.1
        setattr(parent, where, adapted)

    if when == "before the pipeline":
        adapt()
    model.model.pipeline(GROUP)
    mx.eval(model.parameters())
    if when == "after the pipeline":
        adapt()
    return [tokens(model), direct(model)]


@program("unsloth-zoo #932")
def wrapped_head():
    """The head is wrapped in a module of the program's own, which must still run on rank 0."""
    model = load()
    model.lm_head = Scaled(model.lm_head)
    return [tokens(model), direct(model)]


@program()
def deleted_folder():
    """The checkpoint is deleted after loading; a head left on disk is read all the same."""
    copy = FILES / f"copy-{RANK}"
    shutil.copytree(checkpoint("qwen2-untied"), copy)
    model = own_pipeline(copy)
    shutil.rmtree(copy)
    return [in_thread(0, lambda: model.lm_head.weight[[3, 7], :4].tolist()), direct(model)]


@program()
def new_head():
    """The head gets new weights; one on disk must not come back in a direct call."""
    new = mx.random.normal((VOCAB, tiny_models.HIDDEN), key=mx.random.key(1))
    model = load()
    model.load_weights([("lm_head.weight", new)], strict=False)
    return [tokens(model), direct(model)]


@program()
def saved():
    """A pipelined model is saved: the file must not lack the head, nor have NaN in it."""
    folder = FILES / f"saved-{RANK}"
    save_model(folder, load())
    file = mx.load(str(folder / "model.safetensors"))
    return {key: round(mx.abs(array).sum().item(), 2) for key, array in file.items()}


@program()
def no_group():
    """`sharded_load` without a group: it splits some families by itself."""
    model = sharded_load(str(checkpoint("qwen3_next-untied")))[0]
    size = model.model.pipeline_size
    return [size, tokens(model), tokens(model, sampler=make_sampler(0.8)), direct(model)]
