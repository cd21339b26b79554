"""Tiny random models of every pipelined mlx-lm family, for tests that compare generated tokens.

`CONFIGS` names the cases, `make` builds the model of a case and `PROMPTS` holds the prompts.
A case gets the same weights in every process, so each rank of a pipeline can build its own copy.
The layer counts suit pipelines of two and of three ranks.
"""

from __future__ import annotations

import copy
import importlib
import math
import zlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    import mlx.nn as nn

Config = dict[str, Any]

VOCAB = 256
HIDDEN = 64

# One token is no prefill at all, the long prompt is several prefill chunks.
PROMPTS: list[list[int]] = [
    [17],
    [3, 141, 59, 26, 53, 58, 97],
    [(37 * i + 11 * (i // 5) + 5) % VOCAB for i in range(40)],
]

_BASE: Config = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
_GQA: Config = {**_BASE, "num_key_value_heads": 2, "head_dim": 16}
_MLA: Config = {
    **_BASE,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "attention_bias": False,
}
_YARN: Config = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

# Routed experts, in the key names of the DeepSeek and GLM families ...
_EXPERTS: Config = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
# ... and of the Qwen families.
_QWEN_EXPERTS: Config = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
}

# The indexer keeps fewer positions than the long prompt has.
_INDEXER: Config = {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 12}

_GLM: Config = {
    **_GQA,
    **_EXPERTS,
    "num_hidden_layers": 5,
    "rope_scaling": None,
    "use_qk_norm": True,
    "attention_bias": False,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
}
_DEEPSEEK_V3: Config = {**_MLA, **_EXPERTS, "num_hidden_layers": 5}
_MISTRAL_ROPE: Config = {**_YARN, "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1}

# Linear attention, with full attention in the last layer of each interval. Some ranks get layers
# of one kind only.
_LINEAR: Config = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
_QWEN3_5: Config = {
    **_GQA,
    **_LINEAR,
    "full_attention_interval": 3,
    "rope_parameters": {
        "type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}

# Every case is one of these, with its usual head.
FAMILIES: dict[str, Config] = {
    "deepseek_v2": {
        **_MLA,
        **_EXPERTS,
        "num_hidden_layers": 5,
        "topk_method": "group_limited_greedy",
        "rope_scaling": _YARN,
    },
    "deepseek_v3": {**_DEEPSEEK_V3, "num_hidden_layers": 7, "rope_scaling": _YARN},
    "deepseek_v32": {**_DEEPSEEK_V3, **_INDEXER},
    "deepseek_v41": {
        **_BASE,
        **_EXPERTS,
        **_INDEXER,
        "num_hidden_layers": 7,
        "scoring_func": "sqrtsoftplus",
        "head_dim": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "o_groups": 2,
        "o_lora_rank": 32,
        "sliding_window": 8,
        # Layers read the compressed keys of earlier layers, on another rank too.
        "compress_ratios": [0, 2, 2, 2, 1, 1, 1],
        "kv_source_layer_ids": [1, 4],
        "index_source_layer_ids": [1, 2, 4, 5],
        "candidate_source_layer_id": 4,
        "candidate_topk_blocks": 4,
        "candidate_block_size": 4,
    },
    "glm4_moe": _GLM,
    "glm4_moe_lite": {**_DEEPSEEK_V3, "tie_word_embeddings": False},
    "ministral3": {
        **_GQA,
        "num_hidden_layers": 5,
        "rope_parameters": _MISTRAL_ROPE,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    },
    "mistral4": {
        **_DEEPSEEK_V3,
        "num_hidden_layers": 7,
        "rope_parameters": _MISTRAL_ROPE,
    },
    "bailing_hybrid": {
        **_MLA,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "group_norm_size": 4,
        # Ranks get whole groups, and rank 0 also the layer left over.
        "layer_group_size": 2,
        "num_hidden_layers": 7,
    },
    "kimi_k3": {
        "text_config": {
            **_MLA,
            "num_hidden_layers": 7,
            "linear_attn_config": {
                # Counted from 1.
                "kda_layers": [1, 2, 4, 5, 7],
                "full_attn_layers": [3, 6],
                "num_heads": 2,
                "head_dim": 32,
                "short_conv_kernel_size": 4,
                "gate_lower_bound": -5.0,
                "use_full_rank_gate": True,
            },
            "attn_res_block_size": 3,
            "activation_situ_beta": 4.0,
            "activation_situ_linear_beta": 25.0,
            "mla_use_output_gate": True,
            "num_experts": 8,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "num_expert_group": 1,
            "topk_group": 1,
            "routed_expert_hidden_size": 32,
            "latent_moe_use_norm": True,
        }
    },
    "minimax_m3_vl": {
        "text_config": {
            **_GQA,
            "num_hidden_layers": 5,
            "intermediate_size": 32,
            "dense_intermediate_size": 128,
            "shared_intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rotary_dim": 8,
            "mlp_layer_types": ["dense"] + ["sparse"] * 4,
            "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * 4,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "index_block_size": 4,
            "index_topk_blocks": 4,
        }
    },
    "muse_spark": {
        "text_config": {
            **_GQA,
            "num_hidden_layers": 5,
            "post_norm_eps": 1e-8,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            # A zero is a layer without rotary embeddings.
            "layer_rope_theta": [10000.0, 10000.0, 0, 10000.0, 0],
            "layer_types": ["sliding_attention"] * 2
            + ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
            "final_logit_softcapping": 20.0,
            "output_multiplier": 1.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "moe_hidden_size": 32,
            "moe_intermediate_size": 32,
        }
    },
    "qwen2": {**_GQA, "num_hidden_layers": 5},
    "qwen3_5": {**_QWEN3_5, "num_hidden_layers": 7},
    "qwen3_moe": {
        **_GQA,
        **_QWEN_EXPERTS,
        "num_hidden_layers": 7,
        "tie_word_embeddings": False,
    },
    "qwen3_next": {
        **_GQA,
        **_LINEAR,
        **_QWEN_EXPERTS,
        "num_hidden_layers": 5,
        "full_attention_interval": 2,
        "partial_rotary_factor": 0.5,
    },
    "glm_moe_dsa": {
        **_DEEPSEEK_V3,
        **_INDEXER,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "qwen3_5_moe": {"text_config": {**_QWEN3_5, **_QWEN_EXPERTS, "num_hidden_layers": 5}},
    "solar_open": {**_GLM, "num_hidden_layers": 7},
    # A qwen3_5 of which one layer is packed to 2 bits.
    "prism_hadamard_qwen35": {
        "text_config": {**_QWEN3_5, "num_hidden_layers": 5, "tie_word_embeddings": False},
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": "model.layers.1.mlp.down_proj",
                "embedding": False,
                "dtype": "float16",
                "block": 0,
            }
        ],
    },
    "kimi_k25": {"text_config": _DEEPSEEK_V3},
}

# The families that read tie_word_embeddings when they run the head. The others always have a
# head of their own.
TIEABLE = (
    "ministral3",
    "mistral4",
    "bailing_hybrid",
    "kimi_k3",
    "minimax_m3_vl",
    "qwen2",
    "qwen3_5",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe",
)


def _tied(config: Config, tied: bool) -> Config:
    if "text_config" in config:
        return {**config, "text_config": _tied(config["text_config"], tied)}
    return {**config, "tie_word_embeddings": tied}


# Before 0.32 mlx-lm lost layers where they do not divide evenly.
EVENLY = metadata.version("mlx-lm").startswith("0.31.")


def _of_six_layers(config: Config) -> Config:
    if "text_config" in config:
        return {**config, "text_config": _of_six_layers(config["text_config"])}
    return {**config, "num_hidden_layers": 6}


def _configs() -> dict[str, Config]:
    configs = {}
    for family, config in FAMILIES.items():
        config = {"model_type": family, **(_of_six_layers(config) if EVENLY else config)}
        configs[family] = config
        if family in TIEABLE:
            configs[f"{family}-tied"] = _tied(config, True)
            configs[f"{family}-untied"] = _tied(config, False)
    return configs


CONFIGS: dict[str, Config] = _configs()


def is_pipelined(case: str) -> bool:
    """Whether the installed mlx-lm can pipeline the model of `case`: before 0.32 it had fewer."""
    if not EVENLY:
        return True
    try:
        model = make(case)
    except ModuleNotFoundError:
        return False
    return hasattr(model, "model") and hasattr(model.model, "pipeline")


def _randomize(model: nn.Module) -> None:
    """Draw the weights anew, with spreads at which prompt, layers and head all matter.

    Constructors make routers of zeros, norms of ones and layers that barely change the stream.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_unflatten

    # Also the weight of a head that shares it. Small beside the output of the layers, or the
    # likeliest next token of a tied model would be the last one.
    vocabulary = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.endswith("lm_head")
    }
    weights = []
    for name, value in tree_flatten(model.parameters()):
        noise = mx.random.normal(value.shape)
        if value.dtype == mx.uint32:
            value = mx.random.randint(0, 2**31 - 1, value.shape).astype(mx.uint32)
        elif name in vocabulary:
            value = 0.35 * noise
        elif value.ndim == 1:
            # Norms, biases and decays keep their meaning.
            value = value + 0.1 * noise
        else:
            # A depthwise convolution is [channels, taps, 1].
            inputs = value.shape[-1] if value.shape[-1] > 1 else value.shape[-2]
            value = 2.0 / math.sqrt(inputs) * noise
        weights.append((name, value))
    model.update(tree_unflatten(weights))


def _replace_metal_kernels(muse_spark: ModuleType) -> None:
    """Let muse_spark run without Metal: upstream has its fused kernels for no other backend."""
    import mlx.core as mx

    def qk_norm(
        qkvg: mx.array,
        *,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        eps: float,
        query_scale: float,
    ) -> tuple[mx.array, mx.array]:
        heads = qkvg.reshape(*qkvg.shape[:-1], -1, head_dim)[..., : n_heads + n_kv_heads, :]
        queries, keys = mx.split(mx.fast.rms_norm(heads, None, eps), [n_heads], axis=-2)
        return queries * query_scale, keys

    def qk_norm_rope(
        qkvg: mx.array, *, rope_base: float, offset: int | mx.array, **norm: Any
    ) -> list[mx.array]:
        def rotate(x: mx.array) -> mx.array:
            x = x.swapaxes(1, 2)
            dims = x.shape[-1]
            x = mx.fast.rope(x, dims, traditional=True, base=rope_base, scale=1.0, offset=offset)
            return x.swapaxes(1, 2)

        return [rotate(x) for x in qk_norm(qkvg, **norm)]

    def pre_norm(stream: mx.array, norm: nn.RMSNorm, *, dtype: mx.Dtype) -> mx.array:
        return norm(stream).astype(dtype)

    def norm_add_norm(
        branch: mx.array,
        stream: mx.array,
        *,
        alpha: mx.array,
        beta: mx.array,
        post_weight: mx.array | None,
        post_eps: float,
        next_norm: nn.RMSNorm | None,
    ) -> tuple[mx.array, mx.array | None]:
        scaled = branch if post_weight is None else branch * post_weight
        stream = alpha * stream + beta * mx.fast.rms_norm(scaled, None, post_eps)
        if next_norm is None:
            return stream, None
        return stream, pre_norm(stream, next_norm, dtype=branch.dtype)

    def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
        x = mx.fast.rms_norm(x, None, eps).swapaxes(1, 2)
        return x.reshape(gate.shape) * mx.sigmoid(gate)

    def expert_routing(
        logits: mx.array,
        expert_bias: mx.array,
        *,
        top_k: int,
        multiplier: float,
        score_eps: float,
        route_scale: float,
    ) -> tuple[mx.array, mx.array]:
        scores = mx.sigmoid(multiplier * logits)
        experts = mx.argsort(-(scores + expert_bias), axis=-1)[..., :top_k]
        scores = mx.take_along_axis(scores, experts, axis=-1)
        return experts, route_scale * scores / (scores.sum(axis=-1, keepdims=True) + score_eps)

    def post_expert_norm_combine(
        experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float
    ) -> mx.array:
        normed = mx.fast.rms_norm(norm_weight * experts, None, eps)
        return (normed * weights[..., None]).sum(axis=-2)

    for kernel in (
        qk_norm,
        qk_norm_rope,
        pre_norm,
        norm_add_norm,
        rms_norm_sigmoid_gate,
        expert_routing,
        post_expert_norm_combine,
    ):
        setattr(muse_spark, kernel.__name__, kernel)


# With their first weights, these cases answer a prompt with few distinct tokens, or have a choice
# of `PROMPTS`, greedy or sampled, that is nearly a tie.
_RESEEDED = (
    "deepseek_v2",
    "deepseek_v32",
    "ministral3",
    "ministral3-untied",
    "minimax_m3_vl-tied",
    "qwen3_moe-tied",
    "qwen3_5_moe",
)


def make(case: str, *, quantize: bool = False, **changes: Any) -> nn.Module:
    """Build the model of a case, in float32. Seeds the global random state.

    Args:
        case: a key of `CONFIGS`.
        quantize: to 4 bits in groups of 32, where the family allows it: everywhere but in routers
            and the like, head and embeddings included. muse_spark allows only some experts.
        changes: what its configuration has otherwise.
    """
    import mlx.core as mx
    from mlx_lm.utils import quantize_model

    config = copy.deepcopy(CONFIGS[case]) | changes
    arch = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    if config["model_type"] == "muse_spark" and not mx.metal.is_available():
        _replace_metal_kernels(arch)
    with mx.stream(mx.cpu):
        mx.random.seed(zlib.crc32(case.encode()) + (case in _RESEEDED))
        model = arch.Model(arch.ModelArgs.from_dict(config))
        _randomize(model)
        model.eval()
        if quantize:
            model, _ = quantize_model(model, {}, group_size=32, bits=4)
        mx.eval(model.parameters())
    return model
