"""Run by test_real_model.py, alone or as a rank: asks the real model, in three ways."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from typing import Any

import mlx.core as mx
import mlx_lm
import ranks
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import sharded_load

import mlx_lm_skiphead

QUESTION = "What is the capital of France?"


def ask(model: Any, tokenizer: Any, question: str, **options: Any) -> dict[str, Any]:
    mx.random.seed(5)
    # Without a system prompt the template has one of its own, and a CPU reads 5 tokens a second.
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    steps = list(mlx_lm.stream_generate(model, tokenizer, prompt, **options))
    return {
        "tokens": [step.token for step in steps],
        "logprobs": [step.logprobs[step.token].item() for step in steps],
        "text": "".join(step.text for step in steps),
        "finish": [step.finish_reason for step in steps],
    }


def run_module(module: str, *arguments: str, typed: str = "") -> str:
    """What ``python -m module`` prints here, with `typed` at its prompts."""
    sys.argv, sys.stdin = [module, *arguments], io.StringIO(typed)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_module(module, run_name="__main__")
    return printed.getvalue()


def main(path: str) -> None:
    group = ranks.join()
    if group.size() > 1:
        model, tokenizer = sharded_load(path, pipeline_group=group)
    else:
        model, tokenizer = mlx_lm.load(path)
    told = {
        "mode": mlx_lm_skiphead.status().mode,
        "stop": ask(model, tokenizer, QUESTION, max_tokens=40),
        "length": ask(model, tokenizer, "Tell me a story.", max_tokens=12),
        "first token": ask(model, tokenizer, QUESTION, max_tokens=1),
        "seeded": ask(
            model,
            tokenizer,
            "Name a fruit.",
            max_tokens=12,
            sampler=make_sampler(0.8, top_p=0.95),
            prefill_step_size=8,
        ),
        "generate": mlx_lm.generate(model, tokenizer, QUESTION, max_tokens=8),
    }
    tokenizer.add_eos_token(tokenizer.decode(told["stop"]["tokens"][:1]))
    told["stop at once"] = ask(model, tokenizer, QUESTION, max_tokens=8)
    arguments = ["--model", path, *(["--pipeline"] if group.size() > 1 else [])]
    told["chat"] = run_module(
        "mlx_lm.chat",
        *arguments,
        "--max-tokens=12",
        "--system-prompt=",
        typed=f"{QUESTION}\nAnd of Spain?\nq\n",
    )
    told["benchmark"] = run_module("mlx_lm.benchmark", *arguments, "-p=8", "-g=4", "-n=1")
    ranks.report(told)


main(*sys.argv[1:])
