"""What programs do with weights."""

from __future__ import annotations

import shutil
import threading

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.utils import load_model, save_model, sharded_load

import mlx_lm_skiphead
from programs.loading import GROUP, NEXT, OWN, TIED, UNTIED, direct, lazy, load, tokens


def recast(folder, dtype):
    model = load(folder)
    model.set_dtype(dtype)
    return [tokens(model), direct(model), tokens(model)]


def lora(where, when):
    model = load_model(TIED if where == "embed_tokens" else UNTIED, lazy=True)[0]

    def adapt():
        parent = model.model if where == "embed_tokens" else model
        kind = LoRAEmbedding if where == "embed_tokens" else LoRALinear
        mx.random.seed(3)
        adapted = kind.from_base(getattr(parent, where), r=4, scale=10.0)
        adapted.lora_b = mx.random.normal(adapted.lora_b.shape) * 0.1
        setattr(parent, where, adapted)

    if when == "before":
        adapt()
    model.model.pipeline(GROUP)
    mx.eval(model.parameters())
    if when == "after":
        adapt()
    return [tokens(model), direct(model)]


class Scaled(nn.Module):
    """A head in another one's clothes: no `weight`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x):
        return self.inner(x) * 1.5


def wrapped_head():
    model = load()
    model.lm_head = Scaled(model.lm_head)
    return [tokens(model), direct(model)]


def in_thread(function):
    told = []
    thread = threading.Thread(target=lambda: told.append(function()))
    thread.start()
    thread.join()
    return told


def weights():
    """What a program does with the weights: in threads, without their folder, saved, loaded."""
    shutil.copytree(UNTIED, OWN)
    model = lazy(OWN)
    shutil.rmtree(OWN)
    told = [in_thread(lambda: model.lm_head.weight[[3, 7], :4].tolist()), direct(model)]
    model = load()
    new = mx.random.normal(model.lm_head.weight.shape, key=mx.random.key(1))
    model = load()
    model.load_weights([("lm_head.weight", new)], strict=False)
    told += [tokens(model), direct(model)]
    model = load()
    save_model(OWN, model)
    saved = mx.load(str(OWN / "model.safetensors"))
    told.append({key: round(mx.abs(array).sum().item(), 2) for key, array in saved.items()})
    told.append(in_thread(lambda: direct(load()))[0])
    return told


def quantized_in_a_thread():
    """Whose arrays no other thread can compute; `uninstall()` does not try to."""
    model, mode = load(), mlx_lm_skiphead.status().mode

    def quantize():
        nn.quantize(model, group_size=32)
        return tokens(model)

    told = in_thread(quantize)
    mlx_lm_skiphead.uninstall()
    if mode != "off":
        mlx_lm_skiphead.install(mode)
    return told


def no_group():
    """`sharded_load` splits some families by itself."""
    model = sharded_load(str(NEXT))[0]
    size = model.model.pipeline_size
    return [size, tokens(model), tokens(model, sampler=make_sampler(0.8)), direct(model)]
