"""What programs share: mlx-lm's loops over one model, and the usual samplers and processors."""

from __future__ import annotations

import importlib
import itertools

import mlx.core as mx
import tiny_models

import mlx_lm_skiphead
from programs.models import DRAFT, MODEL, RANK, SIZE, loaded

loops = importlib.import_module("mlx_lm.generate")
MODE = mlx_lm_skiphead.status().mode
VOCAB = tiny_models.VOCAB
PROMPT, OTHER = tiny_models.PROMPTS[1], [5, 6]
LOOPS = ("generate", "batch", "speculation")
RANKS = {"rank 0": [0], "rank 1": [1], "all ranks": range(SIZE)}


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


def tokens(model, prompt=PROMPT, limit=8, **options):
    """A generation of another model than `steps` has."""
    mx.random.seed(7)
    told = [t for t, _ in loops.generate_step(mx.array(prompt), model, max_tokens=limit, **options)]
    mx.synchronize(loops.generation_stream)
    return told


def direct(model):
    """The first numbers of a direct call, and their type."""
    logits = model(mx.array([PROMPT]))[0, -1, :8]
    return [str(logits.dtype), [round(x, 3) for x in logits.astype(mx.float32).tolist()]]


def uninstall():
    """Without what `loaded` gave: its head would be read, and stay so for later programs."""
    loaded.cache_clear()
    mlx_lm_skiphead.uninstall()


def install():
    """The plugin again, if this rank has it on."""
    if MODE != "off":
        mlx_lm_skiphead.install(MODE)


def greedy(logprobs):
    return mx.argmax(logprobs, axis=-1)


def bias(of):
    """A processor that is against every third token."""

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


class Raising:
    """A processor that raises when it is called again, on all ranks."""

    def __init__(self, error, at):
        self.error, self.at = error, at
        self.calls = itertools.count()

    def __call__(self, context, logits):
        if next(self.calls) == self.at:
            raise self.error(f"call {self.at}")
        return logits
