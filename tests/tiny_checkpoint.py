"""A model of tiny_models.py as a checkpoint that mlx-lm loads, with a tokenizer and chat template.

The tokenizer has one id for each of 255 characters and one for the end of a text. So a text says
exactly which tokens it is made of, and no token waits for the next to become a character. Prompts
may use printable ASCII and line feeds; the other characters are only ever generated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_models

END = "<end>"
END_ID = tiny_models.VOCAB - 1

HEAD_FILE = "model-head.safetensors"
EMBEDDING_FILE = "model-embedding.safetensors"

_ASCII = "\n" + "".join(map(chr, range(0x20, 0x7F)))
# Letters with accents, for as many ids as are left.
CHARACTERS = _ASCII + "".join(map(chr, range(0x100, 0x100 + END_ID - len(_ASCII))))

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def write(
    case: str, folder: Path, *, quantize: bool = False, mixed: bool = False, **changes: Any
) -> None:
    """Write the model of `case`, as `tiny_models.make` makes it, into `folder`, which exists.

    Head and embedding are in files of their own, `HEAD_FILE` and `EMBEDDING_FILE`. With `mixed`
    the head is quantized to 8 bits, the embedding not at all, and the rest to 4 bits.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import quantize_model

    config = {**tiny_models.CONFIGS[case], "eos_token_id": END_ID, **changes}
    model = tiny_models.make(case, quantize=quantize, **changes)
    if quantize:
        config["quantization"] = {"group_size": 32, "bits": 4}
    if mixed:
        model, config = quantize_model(model, config, 32, 4, quant_predicate=_mixed)
    weights = dict(tree_flatten(model.parameters()))
    files = {key: _file_of(key) for key in weights}
    for file in set(files.values()):
        part = {key: array for key, array in weights.items() if files[key] == file}
        mx.save_safetensors(str(folder / file), part, metadata={"format": "mlx"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)


def _mixed(path: str, module: Any) -> bool | dict[str, int]:
    return {"group_size": 32, "bits": 8} if "lm_head" in path else "embed" not in path


def _file_of(key: str) -> str:
    if "lm_head" in key:
        return HEAD_FILE
    return EMBEDDING_FILE if "embeddings" in key or "embed_tokens" in key else "model.safetensors"


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # A character in the spelling of a vocabulary of bytes, where for example a space is "Ġ".
    names = [byte_level.pre_tokenize_str(character)[0][0] for character in CHARACTERS]
    vocabulary = {name: i for i, name in enumerate([*names, END])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
