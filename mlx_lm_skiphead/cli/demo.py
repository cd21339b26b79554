"""``mlx-lm-skiphead demo``: runs a model on ranks of this machine, both ways, and compares them.

It is a `bench` that also answers a sentence. Without ``--model`` it makes a small model of
DeepSeek-V3's shape with random weights. It prints what `bench` prints: times, memory, and what is
left on disk. And it prints how many heads each rank ran for a token of the answers, and whether
their tokens agree.

Example: mlx-lm-skiphead demo --model ./my-model -n 3 --prompt 'Hello'
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from . import bench
from .shared import at_least


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``demo``."""
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
    console = Console(markup=False, highlight=False)
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
    bench.report(console, told)
    code = _compare(console, results) or code
    left = sum(sum(result["on_disk"].values()) for result in results)
    if code == 0 and is_random:
        line = f"So only rank 0 ran the head, and {left / 1e6:.0f} MB of weights stayed on disk."
        console.print(line, "`mlx-lm-skiphead plan` says what that saves with your model.")
    return code


def _compare(console: Console, results: list[dict[str, Any]]) -> int:
    """Compare tokens and heads. With the plugin each rank must have the tokens that rank 0 has
    without it, and no worker may run a head."""
    right = results[0]["answers"]["unpatched"]
    answers = [result["answers"]["plugin"] for result in results]
    console.print(f"text: {right['text']!r}")
    wrong = [
        f"rank {rank} gives {answer['tokens']} where unpatched mlx-lm gives {right['tokens']}"
        for rank, answer in enumerate(answers)
        if answer["tokens"] != right["tokens"]
    ]
    if any(answer["heads_per_token"] for answer in answers[1:]):
        wrong.append("workers ran heads with the plugin on")
    for line in wrong:
        console.print(f"Please report this: {line}", style="red")
    if not wrong:
        line = "Answers agree: {} greedy tokens and {} at temperature 0.8, on all {} ranks."
        console.print(line.format(*map(len, right["tokens"]), len(answers)), style="green")
    return int(bool(wrong))


def write_model(folder: Path) -> None:
    """Write a small model of DeepSeek-V3's shape: config, random weights, and a tokenizer.

    Of its 330 MB the head and the embedding have 134 each, as in a model of a large vocabulary. All
    are float32, the only type that is fast on a CPU. Each token is spelled as its number, and each
    word of a prompt is the token 0.
    """
    import mlx.core as mx
    from mlx_lm.models import deepseek_v3
    from mlx_lm.utils import save_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    mx.random.seed(0)
    config = Path(__file__).with_suffix(".json").read_text()
    model = deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(json.loads(config)))
    # The default embedding is so small that every token would look alike.
    table = model.model.embed_tokens.weight
    model.model.embed_tokens.weight = mx.random.normal(table.shape)
    save_model(folder, model)
    (folder / "config.json").write_text(config)
    spelled = {str(number): number for number in range(table.shape[0])}
    words = models.WordLevel(spelled, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="1")
    whole.save_pretrained(folder)
