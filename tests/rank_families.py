"""Run by test_families.py, alone or as a rank: generates with the models of the cases it is given.

Reports, per case and kind of request, the tokens and logprobs, the next random number, and how
many heads were evaluated for how many tokens; and what direct calls give, in both modes.
"""

from __future__ import annotations

import importlib
import sys

import mlx.core as mx
import ranks
import tiny_models
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import mlx_lm_skiphead
from mlx_lm_skiphead.cli.measure import count_heads

TOKENS = 10
generate = importlib.import_module("mlx_lm.generate")


def requests():
    """(name, prompt, options of generate_step)."""
    one, short, long = tiny_models.PROMPTS
    yield "greedy, one token", one, {}
    yield "greedy, several chunks", long, {"prefill_step_size": 16}
    yield "temperature and seed", short, {"sampler": make_sampler(0.8)}
    penalties = make_logits_processors({7: 2.0, 31: -3.0}, 1.3)
    yield "penalty and bias", short, {"logits_processors": penalties}
    everything = {"sampler": make_sampler(0.8, top_p=0.9), "logits_processors": penalties}
    yield "all of it", long, {**everything, "prefill_step_size": 16}


def answer(model, prompt, options):
    mx.random.seed(7)
    tokens, logprobs = [], []
    for token, logprob in generate.generate_step(
        mx.array(prompt), model, max_tokens=TOKENS, **options
    ):
        tokens.append(token)
        logprobs.append(logprob[token].item())
    # Drawn after the loop: every rank must stand where sampling left upstream.
    return {"tokens": tokens, "logprobs": logprobs, "random": mx.random.uniform().item()}


def answers(model, *names):
    """Every request, or those that are named; and heads per token."""
    with count_heads(model) as count:
        told = {
            name: answer(model, prompt, options)
            for name, prompt, options in requests()
            if name in names or not names
        }
    # mlx-lm computes one token more than it gives out.
    return told, count.evaluated() / (len(told) * (TOKENS + 1))


def direct(model):
    """A model call outside the loops: the shape and the first numbers of what it gives."""
    out = model(mx.array([tiny_models.PROMPTS[1]]))
    return {"shape": out.shape, "numbers": out[0, -1, :8].astype(mx.float32).tolist()}


def main(*cases: str) -> None:
    group = mx.distributed.init()
    told = {}
    for case in cases:
        name, _, how = case.partition("+")
        model = tiny_models.make(name, quantize=how == "quantized")
        if group.size() > 1:
            model.model.pipeline(group)
        told[case] = {}
        told[case]["requests"], told[case]["heads per token"] = answers(model)
        told[case]["direct"] = direct(model)
        if mlx_lm_skiphead.status().mode != "off":
            mlx_lm_skiphead.install("hidden")
            told[case]["requests, hidden"], _ = answers(model, "all of it")
            told[case]["direct, hidden"] = direct(model)
            mlx_lm_skiphead.install("on")
    ranks.report(told)


main(*sys.argv[1:])
