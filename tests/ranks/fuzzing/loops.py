"""Steps that generate: the loops of mlx-lm, and loops of a program's own."""

from __future__ import annotations

import importlib
import itertools
import math

import mlx.core as mx
import tiny_models
from mlx_lm.models.cache import make_prompt_cache

from fuzzing.lab import WIDE_HEADS, checksum, tokens_of
from fuzzing.samplers import Planned
from mlx_lm_skiphead import rank_zero_head, share_tokens

# As a program has them that imports them by name before the plugin.
EARLY = dict(vars(importlib.import_module("mlx_lm.generate")))


class Loops:
    """Those steps of a session."""

    def by_turns(self, steps, n, cache):
        """Each step is asked for in the next thread, and the end where the generator has begun.

        Each evaluates the caches: unpatched leaves lazy arrays to the next thread.
        """

        def ask():
            step = next(steps, None)
            mx.eval([c.state for c in cache if not c.empty()])
            return step

        for number in range(n):
            yield self.lab.turns[number % 2].submit(ask).result()
        self.lab.turns[0].submit(ask).result()

    def follow(self, steps, leave, draws, ends, change=None):
        for number, step in enumerate(steps, 1):
            if change is not None and number == change["at"]:
                self.changed(change["processors"], change["how"], change["to"])
            if isinstance(step, tuple):
                token, logprobs, *rest = step
            else:
                token, logprobs = step.token, step.logprobs
                rest = [step.text, step.from_draft, step.finish_reason, step.generation_tokens]
            self.see_token(token, logprobs, *rest)
            if draws:
                self.see("drawn", mx.random.uniform().item())
            if number == leave or any(end.done for end in ends):
                break

    def see_token(self, token, logprobs, *rest):
        told = logprobs[token].item() if self.lab.rank == 0 else None
        if self.lab.rank and self.way == "plugin":
            self.counts["tokens"] += 1
            self.counts["without a head"] += math.isnan(logprobs[token].item())
        self.see("token", token, told, logprobs.shape, str(logprobs.dtype), *rest)

    def generate(
        self,
        prompt,
        n,
        sampler=None,
        processors=None,
        stream=False,
        leave=None,
        keep=False,
        draws=False,
        cache=None,
        other=False,
        draft=None,
        callback=None,
        early=False,
        change=None,
        **options,
    ):
        self.ends_to_watch = []
        which = int(other)
        model, ids = self.model_of[which], mx.array(tokens_of(prompt))
        if "kv_bits" in options:
            options |= {"kv_group_size": 32, "quantized_kv_start": 4}
        options |= {"sampler": self.sampler(sampler), "max_tokens": n}
        options["logits_processors"] = self.processors(processors)
        if change is not None:
            change = {**change, "processors": options["logits_processors"]}
        elif not processors:
            options["logits_processors"] = None
        if callback is not None:
            options["prompt_progress_callback"] = self.callback(callback, model)
        if draft is not None:
            small = self.drafts[draft]
            if cache is not None:
                if f"{cache}-draft" not in self.caches:
                    self.caches[f"{cache}-draft"] = make_prompt_cache(model)
                    self.caches[f"{cache}-draft"] += make_prompt_cache(small)
                options["prompt_cache"] = self.caches[f"{cache}-draft"]
        else:
            small = None
            size = options.get("max_kv_size")
            options["prompt_cache"] = self.cache_of(cache, which, max_kv_size=size)
        if "turns" in self.program:
            options["prompt_cache"] = make_prompt_cache(model)
        if stream:
            tokenizer = self.lab.tokenizer
            steps = self.loops.stream_generate(model, tokenizer, ids, draft_model=small, **options)
        else:
            name = "generate_step" if small is None else "speculative_generate_step"
            loop = EARLY[name] if early else getattr(self.loops, name)
            steps = loop(ids, model, *([] if small is None else [small]), **options)
        if keep:
            self.kept.append((steps, self.ends_to_watch))
        ends = self.ends_to_watch
        if "turns" in self.program:
            steps, ends = self.by_turns(steps, n, options["prompt_cache"]), []
        self.follow(steps, leave, draws, ends, change)

    speculate = generate

    def drafted(self):
        return sorted({s["draft"] for s in self.program["steps"] if "draft" in s})

    def draft(self, name):
        case = self.program["case"] if name == "same" else name
        mx.random.seed(1)
        changes = WIDE_HEADS if "heads" in self.program else {}
        key = ("draft", case, changes, self.program.get("thread"))
        return self.lab.kept(key, lambda: tiny_models.make(case, **changes))

    def callback(self, kind, model):
        calls = itertools.count()

        def called(done, total):
            self.see("progress", done, total)
            if kind == "draw":
                self.see("drawn", mx.random.uniform().item())
            elif kind == "model":
                self.see("called", self.visible(model(mx.array([[1, 2]]))))
            elif next(calls) == 1:
                raise Planned("planned, callback")

        return called

    def visible(self, logits):
        """What a direct call gives; on workers in mode "hidden" that is something else."""
        hidden = self.program.get("mode") == "hidden" and self.lab.rank
        told = checksum(logits)  # computed in any case: others wait for what this rank sends
        return None if hidden else told

    def resume(self, which, leave=None):
        if self.kept:
            steps, ends = self.kept[which % len(self.kept)]
            self.follow(steps, leave, False, ends)

    def own(
        self,
        prompt,
        many,
        n,
        sampler=None,
        how="",
        cache=None,
        other=False,
    ):
        model = self.model_of[int(other)]
        sample = self.sampler(sampler) or (lambda logprobs: mx.argmax(logprobs, axis=-1))
        one = many == 1 and self.cache_of(cache, int(other))
        one = one or make_prompt_cache(model)
        two = make_prompt_cache(model)
        inputs = mx.array([tokens_of(prompt)] * many)
        if how == "chunks" and inputs.shape[1] > 1:
            with rank_zero_head():
                model(inputs[:, :-1], cache=one)
            mx.eval([c.state for c in one])
            inputs = inputs[:, -1:]
        for _ in range(n):
            with rank_zero_head():
                logits = model(inputs, cache=one)[:, -1]
                if self.way == "unpatched" and how in ("guidance", "two blocks"):
                    mx.eval(logits)  # upstream's sends have no order within a graph
                if how == "guidance":
                    logits = 2 * logits - model(inputs[:, -1:], cache=two)[:, -1]
            if how == "two blocks":
                with rank_zero_head():
                    logits = 2 * logits - model(inputs[:, -1:], cache=two)[:, -1]
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            token = share_tokens(sample(logprobs))
            self.see("shared", token.tolist(), checksum(logprobs) if not self.lab.rank else None)
            inputs = token[:, None]
        if how == "forgets":
            with rank_zero_head():
                model(inputs, cache=one)
            mx.eval([c.state for c in one])

    def direct(self, prompt, cache=None, other=False):
        model = self.model_of[int(other)]
        ids = mx.array([tokens_of(prompt)])
        self.see("logits", self.visible(model(ids, cache=self.cache_of(cache, int(other)))))
