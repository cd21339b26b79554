"""Samplers and logits processors."""

from __future__ import annotations

import copy
import itertools

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler


class Planned(Exception):
    pass


class PlannedStop(BaseException):
    pass


ERRORS = {e.__name__: e for e in (Planned, PlannedStop, SystemExit, StopIteration, ValueError)}


class Samplers:
    """The part of a session that makes them."""

    def sampler(self, spec):
        if spec is None:
            return None
        name, *rest = spec
        if name == "temperature":
            return make_sampler(**rest[0])
        calls = itertools.count()
        seed = rest[0] if name in ("own key", "numpy", "numpy choice") else 0
        key = mx.random.key(seed)
        rng = np.random.default_rng(seed)
        second = self.second(rest[0]) if name == "second" else None

        def own_key(logprobs):
            nonlocal key
            key, now = mx.random.split(key)
            return mx.random.categorical(logprobs, key=now)

        def gumbel(logprobs):
            numbers = np.array(logprobs.astype(mx.float32))
            return mx.array((numbers + rng.gumbel(size=numbers.shape)).argmax(-1), mx.uint32)

        def choice(logprobs):  # numpy refuses NaN
            p = np.exp(np.array(logprobs.astype(mx.float32), np.float64))
            return mx.array([rng.choice(len(r), p=r / r.sum()) for r in p], mx.uint32)

        def by_turns(logprobs):
            return mx.argsort(logprobs, axis=-1)[..., -1 - next(calls) % 3]

        def forced(logprobs):  # as a grammar that allows one token only
            if next(calls) % 4 == 3:
                return mx.argmax(logprobs, axis=-1)
            return mx.full(logprobs.shape[:-1], 40, mx.uint32)

        def raises(logprobs):
            if next(calls) == rest[0]:
                raise ERRORS[rest[1]](f"planned, call {rest[0]}")
            return mx.argmax(logprobs, axis=-1)

        def broadcast(logprobs):
            ids = mx.argmax(logprobs, axis=-1).astype(mx.int32)
            if rest[0] == "eager":
                ids.tolist()
            everyone = mx.distributed.all_sum(ids if self.lab.rank == 0 else ids * 0)
            if rest[0] == "eager":
                mx.eval(everyone)
            return everyone.astype(mx.uint32)

        def waits(logprobs):
            logprobs.tolist()
            ids = mx.argmax(logprobs, axis=-1)
            return self.lab.exchange(self.number, next(self.exchanges), ids)

        def guided(logprobs):
            mx.eval(logprobs)
            return mx.argmax(logprobs - 0.5 * second(next(calls)), axis=-1)

        def shape(logprobs):
            if mx.isnan(logprobs).any().item():
                return mx.zeros((rest[0],), mx.uint32)
            return mx.argmax(logprobs, axis=-1)

        return {
            "broadcast": broadcast,
            "waits": waits,
            "second": guided,
            "shape": shape,
            "own key": own_key,
            "numpy": gumbel,
            "numpy choice": choice,
            "by turns": by_turns,
            "forced": forced,
            "raises": raises,
        }[name]

    def processors(self, specs):
        made = []
        for name, *rest in specs or []:
            if name == "usual":
                options = copy.deepcopy(rest[0])
                if "logit_bias" in options:  # keys that JSON has made strings
                    options["logit_bias"] = {int(k): v for k, v in options["logit_bias"].items()}
                made += make_logits_processors(**options)
            elif name in ("sum", "second", "waits"):
                made.append(self.together(name, *rest))
            else:
                made.append(Processor(name, *rest))
                if name in ("done", "reader"):
                    self.ends_to_watch.append(made[-1])
        return made

    def together(self, name, what=None):
        """A processor that goes by what other ranks say, or another model."""
        calls = itertools.count()
        second = self.second(what) if name == "second" else None

        def processor(tokens, logits):
            call = next(calls)
            if what != "lazy":
                mx.eval(logits)
            if name == "second":
                return logits - 0.5 * second(call).astype(logits.dtype)
            if name == "waits":
                logits[0, 0].item()
                ids = mx.argmax(logits, axis=-1)
                best = self.lab.exchange(self.number, next(self.exchanges), ids)
                ids = mx.arange(logits.shape[-1])
                return mx.where(ids == best[:, None], logits - 2.0, logits)
            mine = mx.sin(mx.arange(logits.shape[-1]) * (self.lab.rank + 1.0) + call)
            bias = mx.distributed.all_sum(mine)
            if what != "lazy":
                mx.eval(bias)
            return logits + bias.astype(logits.dtype)

        return processor

    def second(self, which):
        """A function that gives logits ``(1, V)`` of a second model, or of the stage alone."""
        model = self.model_of[0] if which == "stage" else self.seconds[which]
        cache = make_prompt_cache(model)

        def call(number):
            token = mx.array([[number % 50]])
            if which == "stage":
                hidden = model.model(token, cache=cache)[:, -1].astype(mx.float32)
                out = hidden.sum(axis=-1, keepdims=True) * mx.sin(mx.arange(256))
            else:
                out = model(token, cache=cache)[:, -1]
            mx.eval(out)
            return out

        return call

    def changed(self, processors, how, to):
        """The list of processors of a generation is another one from now on."""
        new = self.processors(to)
        if how == "clear":
            processors.clear()
        elif how == "extend":
            processors.extend(new)
        else:
            processors[:1] = new[:1]


class Processor:
    """A logits processor that goes by calls and tokens, not by the values of logits."""

    def __init__(self, name, at=0, error=""):
        self.name, self.at, self.error = name, at, error
        self.calls = self.state = 0
        self.done = False

    def __call__(self, tokens, logits):
        self.calls += 1
        ids = mx.arange(logits.shape[-1])
        if self.name == "calls":
            return logits + 3.0 * (ids % 7 == self.calls % 7)
        if self.name == "automaton" and tokens is not None:
            return mx.where(ids % 5 == tokens[-1] % 5, logits - 20.0, logits)
        if self.name == "eager automaton" and tokens is not None:
            self.state = (3 * self.state + tokens[-1].item()) % 11
            return mx.where(ids % 11 == self.state, -float("inf"), logits)
        if self.name == "noise":
            return logits + mx.random.normal(logits.shape).astype(logits.dtype)
        if self.name == "done":
            self.done = self.calls >= self.at
        if self.name == "reader":  # which ends a loop when it has been fed often enough
            view = memoryview(logits).cast("B")
            fed = len(view) if self.error == "memoryview" else np.frombuffer(logits, "u1").size
            self.state += fed > 0
            self.done = self.state >= self.at
        if self.name == "raises" and self.calls == self.at + 1:
            raise ERRORS[self.error](f"planned, call {self.at}")
        return logits
