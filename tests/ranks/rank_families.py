"""Run by test_families.py, alone or as a rank: generates with the models of the cases it is given.

Reports, per case and kind of request, the tokens and logprobs, the next random number, and how
many heads were evaluated for how many tokens; what direct calls give, in both modes; and which
weights are left on disk.
"""

from __future__ import annotations

import gc
import importlib
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx_lm
import ranks
import tiny_models
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import mlx_lm_skiphead
from mlx_lm_skiphead.cli.measure import count_heads
from mlx_lm_skiphead.families import family_of

TOKENS = 7
STOPS = tuple(range(100, 112))
generate = importlib.import_module("mlx_lm.generate")


def requests():
    """(name, prompt, options of generate_step)."""
    one, short, long = tiny_models.PROMPTS
    yield "greedy, one token", one, {}
    yield "temperature and seed", short, {"sampler": make_sampler(0.8)}
    penalties = make_logits_processors({7: 2.0, 31: -3.0}, 1.3)
    everything = {"sampler": make_sampler(0.8, top_p=0.9), "logits_processors": penalties}
    yield "all of it, several chunks", long, {**everything, "prefill_step_size": 16}


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
    return told, count() / (len(told) * (TOKENS + 1))


def batched(model):
    """Requests that join and leave a batch, each with a sampler and processors of its own."""
    if not all(hasattr(cache, "merge") for cache in make_prompt_cache(model)):
        return "this family's cache cannot be batched"
    mx.random.seed(7)
    told = []
    with count_heads(model) as count:
        batch = generate.BatchGenerator(
            model, prefill_step_size=16, stop_tokens=[[token] for token in STOPS]
        )
        penalties = make_logits_processors({7: 2.0, 31: -3.0}, 1.3)
        batch.insert(
            tiny_models.PROMPTS,
            max_tokens=[3, 8, 5],
            samplers=[None, make_sampler(0.8), None],
            logits_processors=[[], penalties, []],
        )
        late = [[9, 8, 7], [200]]
        while responses := batch.next_generated():
            told += [[r.uid, r.token, r.logprobs[r.token].item()] for r in responses]
            told += [[r.uid, r.finish_reason] for r in responses if r.finish_reason]
            if late and len(told) > 6:
                batch.insert([late.pop()], max_tokens=[4], samplers=[make_sampler(0.6)])
        batch.close()
    told = {"told": told, "random": mx.random.uniform().item(), "heads": count()}
    # The front door, which makes one call of one sampler for the whole batch.
    done = mlx_lm.batch_generate(
        model,
        Tokenizer(),
        tiny_models.PROMPTS,
        max_tokens=5,
        sampler=make_sampler(0.8),
    )
    return {**told, "batch_generate": done.texts}


class Tokenizer:
    """As much of one as `batch_generate` uses."""

    eos_token_ids = STOPS

    def decode(self, tokens):
        return str(tokens)


def direct(model):
    """A model call outside the loops: the shape and the first numbers of what it gives."""
    out = model(mx.array([tiny_models.PROMPTS[1]]))
    told = {"shape": out.shape, "numbers": out[0, -1, :8].astype(mx.float32).tolist()}
    if out.shape[-1] == tiny_models.HIDDEN:
        family = family_of(model)
        head = family.head_of(family.owner_of(model))
        logits = head.as_linear(out) if hasattr(head, "as_linear") else head(out)
        told["through the head"] = logits[0, -1, :8].astype(mx.float32).tolist()
    return told


def on_disk(model, file):
    """The weights of `model` are written to `file`, and are lazily loaded ones from there."""
    mx.save_safetensors(str(file), dict(tree_flatten(model.parameters())))
    model.load_weights(str(file))


def sizes(model):
    """Bytes of the head, None where it is tied, and of the embedding."""
    family = family_of(model)
    owner = family.owner_of(model)
    embedding = getattr(family.stage_of(owner), family.embedding)
    head = getattr(owner, "lm_head", None)
    return [
        None if m is None else sum(a.nbytes for _, a in tree_flatten(m.parameters()))
        for m in (head, embedding)
    ]


def left_on_disk():
    gc.collect()
    models = mlx_lm_skiphead.status().models
    return models[0].on_disk if len(models) == 1 else None


def main(*cases: str) -> None:
    group = ranks.join()
    folder = tempfile.TemporaryDirectory()
    told = {}
    for case in cases:
        name, _, how = case.partition("+")
        model = tiny_models.make(name, quantize=how == "quantized")
        told[case] = {"sizes": sizes(model)}
        if group.size() > 1:
            on_disk(model, Path(folder.name, f"{case}.safetensors"))
            model.model.pipeline(group)
            mx.eval(model.parameters())
            told[case]["attributes"] = sizes(model)
        told[case]["requests"], told[case]["heads per token"] = answers(model)
        told[case]["batch"] = batched(model)
        if group.size() > 1:
            told[case]["on disk"] = left_on_disk()
        told[case]["direct"] = direct(model)
        if group.size() > 1:
            told[case]["on disk, after a direct call"] = left_on_disk()
        if mlx_lm_skiphead.status().mode != "off":
            mlx_lm_skiphead.install("hidden")
            told[case]["requests, hidden"], _ = answers(model, "all of it, several chunks")
            told[case]["direct, hidden"] = direct(model)
            mlx_lm_skiphead.install("on")
    ranks.report(told)


if __name__ == "__main__":
    main(*sys.argv[1:])
