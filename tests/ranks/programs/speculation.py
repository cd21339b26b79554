"""Speculation."""

from __future__ import annotations

import itertools

import mlx.core as mx
import tiny_models

from programs.loading import PROMPT, load, loops, tokens


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


def speculation(drafts, **options):
    model, draft = load(), tiny_models.make("glm4_moe")
    mx.random.seed(7)
    steps = loops.speculative_generate_step(
        mx.array(PROMPT), model, draft, max_tokens=20, num_draft_tokens=drafts, **options
    )
    told = [[token, from_draft] for token, _, from_draft in steps]
    mx.synchronize(loops.generation_stream)
    return [told, mx.random.uniform().item(), tokens(model)]


def failing_speculation():
    """A sampler that raises at each of a step's calls, beside a processor that draws numbers."""
    model, draft, told = load(), tiny_models.make("glm4_moe"), []
    for at in range(7):
        mx.random.seed(7)
        calls, seen = itertools.count(), []

        def sampler(logprobs, at=at, calls=calls):
            if next(calls) == at:
                raise ValueError(f"call {at}")
            return mx.argmax(logprobs, axis=-1)

        try:
            for token, *_ in loops.speculative_generate_step(
                mx.array(PROMPT),
                model,
                draft,
                max_tokens=9,
                sampler=sampler,
                logits_processors=[lambda _, logits: logits + mx.random.normal(logits.shape)],
            ):
                seen.append(token)
        except ValueError as error:
            seen.append(str(error))
        mx.synchronize(loops.generation_stream)
        told.append([seen, mx.random.uniform().item()])
    return told


class Surprised:
    """A sampler whose next choice depends on the values that it has seen, as Mirostat's."""

    def __init__(self):
        self.surprise = mx.array(0.0)

    def __call__(self, logprobs):
        chosen = mx.argmax(logprobs + 5.0 * mx.sin(self.surprise + mx.arange(logprobs.shape[-1])))
        self.surprise = self.surprise - logprobs.reshape(-1)[chosen]
        rows = logprobs + 5.0 * mx.sin(self.surprise + mx.arange(logprobs.shape[-1]))
        return mx.argmax(rows, axis=-1)
