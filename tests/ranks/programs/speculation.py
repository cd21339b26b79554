"""Speculative decoding beside samplers and processors that have a state of their own."""

from __future__ import annotations

import itertools

import mlx.core as mx

from programs.common import PROMPT, loops, seen, tokens
from programs.models import draft_of_loaded, loaded
from programs.registry import program, refused


class Counting:
    """A logits processor whose effect depends on how often it has been called."""

    def __init__(self):
        self.calls = itertools.count()

    def __call__(self, context, logits):
        return logits + 3.0 * (mx.arange(logits.shape[-1]) % 7 == next(self.calls) % 7)


class OwnKey:
    """A sampler that splits a random key of its own."""

    def __init__(self):
        self.key = mx.random.key(11)

    def __call__(self, logprobs):
        self.key, key = mx.random.split(self.key)
        return mx.random.categorical(logprobs, key=key)


def speculation(draft, drafts=2, **options):
    """Tokens, the next random number, and a usual generation after that."""
    model, draft = loaded(), draft_of_loaded(draft)
    mx.random.seed(7)
    running = loops.speculative_generate_step(
        mx.array(PROMPT), model, draft, max_tokens=20, num_draft_tokens=drafts, **options
    )
    told = [[token, from_draft] for token, _, from_draft in running]
    mx.synchronize(loops.generation_stream)
    return [told, mx.random.uniform().item(), tokens(model)]


@program("mlx-engine #112", "mlx-lm #1175", "mlx-lm #1620", draft=["wrong", "noisy"], drafts=[2, 5])
def counting_processor(draft, drafts):
    """A processor counts its calls: workers that call it less often get other tokens."""
    return speculation(draft, drafts, logits_processors=[Counting()])


@program("mlx-engine #112", "mlx-lm #1175", "mlx-lm #1620", draft=["wrong", "noisy"])
def key_of_its_own(draft):
    """A sampler splits a random key of its own, which must stay in step on all ranks."""
    return speculation(draft, sampler=OwnKey())


class Surprised:
    """A sampler whose next choice depends on the values that it has seen, as Mirostat's."""

    def __init__(self):
        self.surprise = mx.array(0.0)

    def __call__(self, logprobs):
        chosen = mx.argmax(logprobs + 5.0 * mx.sin(self.surprise + mx.arange(logprobs.shape[-1])))
        self.surprise = self.surprise - logprobs.reshape(-1)[chosen]
        rows = logprobs + 5.0 * mx.sin(self.surprise + mx.arange(logprobs.shape[-1]))
        return mx.argmax(rows, axis=-1)


@refused("mlx-lm #990", "mlx-lm #1531")
def drafts_by_value():
    """A sampler like Mirostat's: the drafts depend on values that workers lack."""
    return speculation("wrong", sampler=Surprised())


@program(at=range(7))
def failing_call(at):
    """A sampler raises at one of a step's calls, beside a processor that draws numbers."""
    model, draft, calls = loaded(), draft_of_loaded("wrong"), itertools.count()
    mx.random.seed(7)

    def sampler(logprobs):
        if next(calls) == at:
            raise ValueError(f"call {at}")
        return mx.argmax(logprobs, axis=-1)

    running = loops.speculative_generate_step(
        mx.array(PROMPT),
        model,
        draft,
        max_tokens=9,
        sampler=sampler,
        logits_processors=[lambda _, logits: logits + mx.random.normal(logits.shape)],
    )
    told = seen((token for token, *_ in running), ValueError)
    mx.synchronize(loops.generation_stream)
    return [told, mx.random.uniform().item()]
