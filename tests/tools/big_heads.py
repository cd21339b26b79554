"""``python tests/tools/big_heads.py NAME FOLDER``: few layers, and the head of a large model.

Its weights are random, and its text noise; for `mlx-lm-skiphead bench`. NAME is one of `MODELS`.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import qwen2
from mlx_lm.utils import quantize_model

sys.path.insert(0, str(Path(__file__).parents[1] / "ranks"))  # what the tests share

import tiny_checkpoint


class Shape(NamedTuple):
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int


MODELS = {
    "1024x64-float32": (Shape(1024, 64, 128, 8, 2, 4), mx.float32, 0),
    "2048x768-float32": (Shape(2048, 768, 3072, 12, 4, 10), mx.float32, 0),
    "65536x512-float32": (Shape(65536, 512, 1024, 8, 2, 8), mx.float32, 0),
    "129280x7168-bfloat16": (Shape(129280, 7168, 2048, 56, 8, 4), mx.bfloat16, 0),
    "262144x3840-4bit": (Shape(262144, 3840, 4096, 30, 6, 8), mx.bfloat16, 4),
}
"""Shape, type, and to how many bits it is quantized (0: not). Those of float32 are for a
CPU, and the second one has more layers than head."""


def write(name: str, folder: Path) -> None:
    shape, dtype, bits = MODELS[name]
    config: dict[str, Any] = {
        **shape._asdict(),
        "model_type": "qwen2",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "eos_token_id": tiny_checkpoint.END_ID,
    }
    mx.random.seed(3)
    model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    model.update(tree_map_with_path(lambda key, old: _random(key, old, dtype), model.parameters()))
    if bits:
        model, config = quantize_model(model, config, 64, bits)
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    file = "model.safetensors"
    mx.save_safetensors(str(folder / file), weights, metadata={"format": "mlx"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    tiny_checkpoint.write_tokenizer(folder)


def _random(key: str, old: mx.array, dtype: mx.Dtype) -> mx.array:
    """So large that no token is the likeliest of all from then on."""
    noise = mx.random.normal(old.shape)
    if old.ndim == 1:
        return (old + 0.1 * noise).astype(dtype)
    if "lm_head" in key or "embed" in key:
        return (0.35 * noise).astype(dtype)
    return (2 / math.sqrt(old.shape[-1]) * noise).astype(dtype)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in MODELS:
        sys.exit(f"usage: big_heads.py NAME FOLDER; NAME is one of {', '.join(MODELS)}")
    write(sys.argv[1], Path(sys.argv[2]))
