"""What the programs share: the models, and the loops of mlx-lm over them."""

from __future__ import annotations

import importlib
import itertools
import os
from pathlib import Path

import mlx.core as mx
import ranks
import tiny_models

import mlx_lm_skiphead

loops = importlib.import_module("mlx_lm.generate")

GROUP = ranks.join()

RANK, SIZE = GROUP.rank(), GROUP.size()

MODE = mlx_lm_skiphead.status().mode

FILES = Path(os.environ["RANK_RESULTS"])

VOCAB = tiny_models.VOCAB

PROMPT, OTHER = tiny_models.PROMPTS[1], [5, 6]

LOOPS = ("generate", "batch", "speculation")


def pipelined(case, **changes):
    model = tiny_models.make(case, **changes)
    model.model.pipeline(GROUP)
    return model


MODEL = pipelined("qwen2-untied", num_hidden_layers=3)

DRAFT = tiny_models.make("qwen2-untied", num_hidden_layers=3)
"""The same, but for some noise: now and then it is right."""

DRAFT.lm_head.weight += 0.03 * mx.random.normal(DRAFT.lm_head.weight.shape, key=mx.random.key(4))

mx.eval(DRAFT.parameters())

SECOND = pipelined("deepseek_v3", num_hidden_layers=3)

WHOLE = tiny_models.make("qwen2-tied", num_hidden_layers=2)

# With heads enough for two ranks and for three.
WIDE = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 96}

SHARDED = tiny_models.make("qwen2-untied", num_hidden_layers=2, intermediate_size=192, **WIDE)

SHARDED.shard(GROUP)


def rest():
    """No step is in flight on any rank: the next program meets nothing of the last one's."""
    mx.synchronize(loops.generation_stream)
    mx.eval(mx.distributed.all_sum(mx.zeros((1,))))


def steps(loop, sampler=None, processors=None, n=8, rows="all", prompt=PROMPT, **options):
    """Tokens as `loop` gives them; in a batch two requests, with one sampler, or "one" with it."""
    if loop == "generate":
        for token, _ in loops.generate_step(
            mx.array(prompt),
            MODEL,
            max_tokens=n,
            sampler=sampler,
            logits_processors=processors,
            **options,
        ):
            yield token
    elif loop == "speculation":
        for token, _, from_draft in loops.speculative_generate_step(
            mx.array(prompt),
            MODEL,
            DRAFT,
            max_tokens=n,
            num_draft_tokens=2,
            sampler=sampler,
            logits_processors=processors,
            **options,
        ):
            yield [token, from_draft]
    else:
        of_all = sampler if rows == "all" else None
        batch = loops.BatchGenerator(MODEL, max_tokens=n, sampler=of_all)
        batch.insert(
            [prompt, OTHER],
            samplers=[None if rows == "all" else sampler, None],
            logits_processors=[[] if processors is None else processors, []],
        )
        while responses := batch.next_generated():
            yield [[r.uid, r.token] for r in responses]
        batch.close()


def seen(steps, error=()):
    """What `steps` give, and the error of this class with which they end."""
    told = []
    try:
        told.extend(steps)
    except error as raised:
        told.append(f"{type(raised).__name__}: {raised}")
    return told


def after():
    """A usual generation, when all is at rest."""
    rest()
    return list(steps("generate", n=3))


def greedy(logprobs):
    return mx.argmax(logprobs, axis=-1)


def bias(of):
    def processor(tokens, logits):
        return mx.where((mx.arange(VOCAB) + of) % 3 == 0, logits - 6.0, logits)

    return processor


def raising(error, who, at=3, then=greedy):
    """A sampler that raises at a call, on the ranks `who`."""
    calls = itertools.count()

    def sampler(logprobs):
        if next(calls) == at and RANK in who:
            raise error(f"call {at} on rank {RANK}")
        return then(logprobs)

    return sampler
