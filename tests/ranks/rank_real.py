"""Run by test_real_model.py, alone or as a rank: asks the real model, in three ways."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_lm
import ranks
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import sharded_load

import mlx_lm_skiphead

QUESTION = "What is the capital of France?"
START = "The capital of Italy is"


def chat_prompt(tokenizer: Any, question: str) -> Any:
    # Without a system prompt the template has one of its own, and a CPU reads 7 tokens a second.
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


def ask(model: Any, tokenizer: Any, prompt: Any, **options: Any) -> dict[str, Any]:
    mx.random.seed(5)
    steps = list(mlx_lm.stream_generate(model, tokenizer, prompt, **options))
    return {
        "tokens": [step.token for step in steps],
        "logprobs": [step.logprobs[step.token].item() for step in steps],
        "text": "".join(step.text for step in steps),
        "finish": [step.finish_reason for step in steps],
    }


def stop_at_once(model: Any, tokenizer: Any) -> dict[str, Any]:
    """The first token is made one that ends an answer."""
    (first,) = ask(model, tokenizer, START, max_tokens=1)["tokens"]
    tokenizer.add_eos_token(first)
    return ask(model, tokenizer, START, max_tokens=8)


def run_module(module: str, *arguments: str, typed: str = "") -> str:
    """What ``python -m module`` prints here, with `typed` at its prompts."""
    sys.argv, sys.stdin = [module, *arguments], io.StringIO(typed)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_module(module, run_name="__main__")
    return printed.getvalue()


def main(path: str, *parts: str) -> None:
    """All parts, or those that are named."""
    group = ranks.join()
    if group.size() > 1:
        model, tokenizer = sharded_load(path, pipeline_group=group)
    else:
        model, tokenizer = mlx_lm.load(path)
    ways: dict[str, Callable[[], Any]] = {
        "stop": lambda: ask(model, tokenizer, chat_prompt(tokenizer, QUESTION), max_tokens=40),
        "length": lambda: ask(model, tokenizer, "Once upon a time there was a", max_tokens=12),
        "first token": lambda: ask(model, tokenizer, START, max_tokens=1),
        "seeded": lambda: ask(
            model,
            tokenizer,
            "The name of a red fruit is",
            max_tokens=8,
            sampler=make_sampler(0.8, top_p=0.95),
            prefill_step_size=3,
        ),
        "generate": lambda: mlx_lm.generate(model, tokenizer, START, max_tokens=4),
        "stop at once": lambda: stop_at_once(model, tokenizer),
        "chat": lambda: run_module(
            "mlx_lm.chat",
            *arguments,
            "--max-tokens=8",
            "--system-prompt=",
            typed=f"{QUESTION}\nAnd of Spain?\nq\n",
        ),
        "benchmark": lambda: run_module("mlx_lm.benchmark", *arguments, "-p=4", "-g=2", "-n=1"),
    }
    arguments = ["--model", path, *(["--pipeline"] if group.size() > 1 else [])]
    told = {name: way() for name, way in ways.items() if name in parts or not parts}
    ranks.report({"mode": mlx_lm_skiphead.status().mode} | told)


main(*sys.argv[1:])
