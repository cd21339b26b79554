"""Steps that look at a model or change it, and other packages that wrap functions."""

from __future__ import annotations

import shutil

import mlx.core as mx
import mlx.nn as nn
import tiny_models
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.utils import save_model
from pieces import Scaled

from fuzzing.lab import checksum


class Changes:
    """Those steps of a session."""

    def wrap(self, place, who):
        """Another package wraps a function of mlx's or mlx-lm's, on the ranks `who`."""
        if self.lab.rank not in who:
            return
        model = self.model_of[0]
        if place in ("model", "stage"):
            cls, attribute = type(model if place == "model" else model.model), "__call__"
            owner = next(base for base in cls.__mro__ if attribute in vars(base))
        else:
            owner, attribute = {
                "eval": (mx, "eval"),
                "async_eval": (mx, "async_eval"),
                "all_gather": (mx.distributed, "all_gather"),
                "all_sum": (mx.distributed, "all_sum"),
                "batch": (self.loops.GenerationBatch, "_step"),
            }.get(place, (self.loops, place))
        real = getattr(owner, attribute)

        def counting(*args, **kwargs):
            self.counts["calls of closures"] += 1
            return real(*args, **kwargs)

        self.wrapped.append((owner, attribute, vars(owner)[attribute]))
        setattr(owner, attribute, counting)

    def unwrap(self):
        if self.wrapped:
            setattr(*self.wrapped.pop())

    def look(self):
        for name, module in self.model_of[0].named_modules():
            if name.endswith(("lm_head", "embed_tokens")) and "weight" in dir(module):
                self.see("weight", name, checksum(module.weight))

    def save(self):
        save_model(self.lab.own / "model", self.model_of[0])
        saved = mx.load(str(self.lab.own / "model" / "model.safetensors"))
        self.see("saved", sorted((name, checksum(array)) for name, array in saved.items()))
        shutil.rmtree(self.lab.own / "model")

    def dtype(self, to):
        self.model_of[0].set_dtype(getattr(mx, to))

    def quantize(self):
        nn.quantize(self.model_of[0], group_size=32, bits=4)

    def new_head(self):
        model = self.model_of[0]
        name = "lm_head" if "lm_head" in model else "model.embed_tokens"
        weight = mx.random.normal((tiny_models.VOCAB, tiny_models.HIDDEN), key=mx.random.key(5))
        model.load_weights([(f"{name}.weight", weight)], strict=False)

    def adapter(self, where):
        model = self.model_of[0]
        parent, name = model.model, "embed_tokens"
        if where == "layer":
            parent, name = model.model.layers[-1].self_attn, "o_proj"
        elif where != "embedding" and "lm_head" in model:
            parent, name = model, "lm_head"
        module = parent[name]
        if where == "wrapped head" and parent is model:
            model.lm_head = Scaled(module)
            return
        kind = LoRAEmbedding if name == "embed_tokens" else LoRALinear
        adapted = kind.from_base(module, r=4, scale=10.0)
        adapted.lora_b = 0.1 * mx.random.normal(adapted.lora_b.shape, key=mx.random.key(3))
        parent[name] = adapted
