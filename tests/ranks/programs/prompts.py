"""Prompts that ranks choose by values, which workers lack: each generation is to be warned of."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_sampler

from programs.common import PROMPT, loops, rest, steps
from programs.models import MODEL, RANK, SIZE
from programs.registry import NOTES, other_prompts


def note(prompts, generations=1):
    """Which ranks have had other prompts than rank 0, all of one length, and how often."""
    ids = mx.array([token for prompt in prompts for token in prompt])
    rows = np.array(mx.distributed.all_gather(ids)).reshape(SIZE, -1).tolist()
    ranks_that_differ = [rank for rank in range(SIZE) if rows[rank] != rows[0]]
    NOTES["other prompts"] = {"ranks": ranks_that_differ, "generations": generations}


def best_of_four():
    """The answer of four that this rank finds the likeliest, by the mean of its logprobs."""
    answers = []
    for number in range(4):
        mx.random.seed(40 + number)
        options = {"max_tokens": 4, "sampler": make_sampler(1.0)}
        found = [
            (token, logprobs[token].item())
            for token, logprobs in loops.generate_step(mx.array(PROMPT), MODEL, **options)
        ]
        answers.append(([token for token, _ in found], sum(p for _, p in found) / 4))
        rest()
    return max(answers, key=lambda answer: answer[1])[0]


def likeliest(prompt, count):
    """The tokens that this rank finds the likeliest next, the likeliest last."""
    *_, (_, logprobs) = loops.generate_step(mx.array(prompt), MODEL, max_tokens=1)
    rest()
    return mx.argsort(logprobs)[-count:].tolist()


@other_prompts(loop=["generate", "batch"])
def best_of(loop):
    """Best of four by mean logprob: each rank goes on with the one that it has chosen."""
    prompt = [*PROMPT, *best_of_four()]
    told = list(steps(loop, prompt=prompt, n=4))
    rest()
    note([prompt])
    return told


@other_prompts()
def tree():
    """A tree search: the three likeliest next tokens, each of them gone on with in one batch."""
    prompts = [[*PROMPT, token] for token in likeliest(PROMPT, 3)]
    batch = loops.BatchGenerator(MODEL, max_tokens=4)
    batch.insert(prompts)
    told = []
    while responses := batch.next_generated():
        told.append([[r.uid, r.token] for r in responses])
    batch.close()
    rest()
    note(prompts)
    return told


@other_prompts()
def path():
    """A search, a token at a time: each generation but the first has a prompt of this rank's."""
    prompt = list(PROMPT)
    for _ in range(2):
        prompt.append(likeliest(prompt, 2)[0])
    told = list(steps("generate", prompt=prompt, n=3))
    rest()
    note([prompt], generations=2)
    return told


@other_prompts(loop=["generate", "batch"])
def another_prompt(loop):
    """The last rank alone was given another prompt."""
    prompt = [*PROMPT, 30 + (RANK == SIZE - 1)]
    told = list(steps(loop, prompt=prompt, n=4))
    rest()
    note([prompt])
    return told
