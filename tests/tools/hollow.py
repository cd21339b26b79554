"""``python tests/tools/hollow.py FOLDER``: headers of a model of DeepSeek-V3's shape, in 4 bits.

For `plan`, which reads nothing else. Files of weights are sparse: as long as real ones, and empty.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import deepseek_v3

CONFIG = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "quantization": {"group_size": 64, "bits": 4},
}


def main(folder: Path) -> None:
    folder.mkdir()
    model = deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(CONFIG))
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, **CONFIG["quantization"])  # lazily, as all of this
    files: dict[str, dict[str, mx.array]] = {}
    for key, array in tree_flatten(model.parameters()):
        layer = key.split(".")[2] if ".layers." in key else "rest"
        files.setdefault(f"model-{layer}.safetensors", {})[key] = array
    for name, arrays in files.items():
        header, size = {}, 0
        for key, array in arrays.items():
            dtype = {mx.uint32: "U32", mx.bfloat16: "BF16", mx.float32: "F32"}[array.dtype]
            places = [size, size := size + array.nbytes]
            header[key] = {"dtype": dtype, "shape": array.shape, "data_offsets": places}
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(file.tell() + size)
    index = {"weight_map": {key: name for name, arrays in files.items() for key in arrays}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
