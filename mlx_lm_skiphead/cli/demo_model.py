"""The demo's model: a small one of DeepSeek-V3's shape with random weights.

Of its 330 MB the head and the embedding have 134 each, as in a model of a large vocabulary. Its
text is noise.
"""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = Path(__file__).with_suffix(".json")

FILE_BYTES = 140 * 10**6
"""The largest file of weights. mlx-lm fills files in the same order, up to 5 GiB."""


def write(folder: Path) -> None:
    """Write config, weights (float32: the only type that is fast on a CPU) and a tokenizer."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import deepseek_v3

    mx.random.seed(0)
    config = json.loads(CONFIG.read_text())
    model = deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(config))
    # The default embedding is so small that every token would look alike.
    table = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = mx.random.normal(table.shape)
    weights = dict(tree_flatten(model.parameters()))
    files: dict[str, dict[str, mx.array]] = {}
    size = FILE_BYTES
    for key, array in weights.items():
        size += array.nbytes
        if size > FILE_BYTES:
            size, name = array.nbytes, f"model-{len(files) + 1:05d}.safetensors"
        files.setdefault(name, {})[key] = array
    for name, part in files.items():
        mx.save_safetensors(str(folder / name), part, metadata={"format": "mlx"})
    index = {"metadata": {}, "weight_map": {key: name for name in files for key in files[name]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder, config["vocab_size"])


def _write_tokenizer(folder: Path, size: int) -> None:
    """Each byte is an id, so that any prompt has one; the other ids are spelled as numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # "Ġ" is how this alphabet writes a space.
    names = [*alphabet, "<end>", *(f"Ġ{i}" for i in range(257, size))]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
