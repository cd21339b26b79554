"""``mlx-lm-skiphead demo``: a `bench` on this machine that also answers a sentence.

Without ``--model`` it makes a small model of DeepSeek-V3's shape with random weights. It prints how
many heads each rank ran for a token, whether the tokens of the answers agree, and what `bench`
prints: times, memory, and what is left on disk.

Example: mlx-lm-skiphead demo --model ./my-model -n 3 --prompt 'Hello'
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from . import bench, downloads
from .ranks import WAYS, role
from .shared import at_least, both, new_command, table

LARGE = 100 * 10**6
"""Bytes from which on a module has a file of its own: the head and the embedding."""


def add_command(commands: Any) -> None:
    """Add ``demo`` to the parser's subcommands."""
    summary = "run a model on ranks of this machine, without the plugin and with it, and compare"
    parser = new_command(commands, run, __doc__, summary)
    option, size = parser.add_argument, at_least(1)
    option("--model", metavar="PATH_OR_REPO", help="a model that mlx-lm can pipeline")
    option("-n", dest="ranks", type=at_least(2), default=2, metavar="N", help="ranks (2)")
    option("--backend", choices=("ring", "mpi"), default="ring", help="of MLX (ring)")
    option("--prompt", dest="text", default="What is the capital of France?", help="(%(default)s)")
    option("--max-tokens", dest="tokens", type=size, default=24, metavar="N", help="(24)")
    as_bench = {"batch": [1], "prompt": [8], "rounds": 7}
    parser.set_defaults(hostfile=None, starting_port=0, gpus=None, split=None, **as_bench)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit code: as `bench.run`; also 1 if the tokens of answers differ or workers run heads.

    Raises:
        Unusable: if the model cannot be used.
    """
    console = Console(highlight=False)
    is_random = arguments.model is None
    with tempfile.TemporaryDirectory() as folder:
        if is_random:
            arguments.model = folder
            with console.status("building a model with random weights (330 MB)"):
                write_model(Path(folder))
        told, code = bench.measure(arguments)
    results: list[dict[str, Any]] = told["memory"]
    if not all(results):
        return code
    told["model"] = "DeepSeek-V3's shape, random weights" if is_random else arguments.model
    rows = []
    for rank, result in enumerate(results):
        first, end = result["layers"]
        heads = {way: result["answers"][way]["heads_per_token"] for way in WAYS}
        rows.append([str(rank), role(rank, len(results)), f"{first}-{end - 1}", both(heads, 2)])
    title = f"a head of {results[0]['head_bytes'] / 1e6:.0f} MB: unpatched → plugin"
    console.print(table(title, ("rank", "role", "layers", "heads per token"), rows))
    bench.report(console, told)
    console.print(downloads.summary([result["downloads"] for result in results]))
    code = _compare(console, results) or code
    left = sum(sum(result["on_disk"].values()) for result in results)
    if code == 0 and is_random:
        console.print(
            f"So only rank 0 ran the head, and {left / 1e6:.0f} MB of weights stayed on disk. "
            "Between equal machines the plugin gains little time: "
            f"`mlx-lm-skiphead plan MODEL -n {len(results)}` says what it saves with your model."
        )
    return code


def _compare(console: Console, results: list[dict[str, Any]]) -> int:
    """Compare tokens and heads. With the plugin each rank must have the tokens that rank 0 has
    without it, and no worker may run a head."""
    unpatched, plugin = ([result["answers"][way] for result in results] for way in WAYS)
    right = unpatched[0]
    console.print(f"text: {right['text']!r}", markup=False)
    wrong = [
        f"rank {rank}, {kind}: {answer[kind]} where unpatched mlx-lm gives {right[kind]}"
        for kind in ("greedy", "seeded")
        for rank, answer in enumerate(plugin)
        if answer[kind] != right[kind]
    ]
    ran_heads = any(answer["heads_per_token"] for answer in plugin[1:])
    wrong += ["workers ran heads with the plugin on"] if ran_heads else []
    for line in wrong:
        console.print(f"Please report this: {line}", style="red", markup=False)
    line = "[green]Answers agree[/]: {} greedy tokens and {} at temperature 0.8, on all {} ranks."
    if not wrong:
        console.print(line.format(len(right["greedy"]), len(right["seeded"]), len(plugin)))
    return 1 if wrong else 0


def write_model(folder: Path) -> None:
    """Write a small model of DeepSeek-V3's shape: config, random weights, and a tokenizer.

    Of its 330 MB the head and the embedding have 134 each, as in a model of a large vocabulary. All
    are float32, the only type that is fast on a CPU. Its text is noise.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import deepseek_v3

    mx.random.seed(0)
    config = json.loads(Path(__file__).with_suffix(".json").read_text())
    model = deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(config))
    # The default embedding is so small that every token would look alike.
    table = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = mx.random.normal(table.shape)
    weights = dict(tree_flatten(model.parameters()))
    files: dict[str, dict[str, mx.array]] = {}
    for key, array in weights.items():
        name = key.split(".")[-2] if array.nbytes > LARGE else "layers"
        files.setdefault(f"model-{name}.safetensors", {})[key] = array
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
