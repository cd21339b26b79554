"""Steps of `BatchGenerator`."""

from __future__ import annotations

import copy

import mlx.core as mx

from fuzzing.lab import tokens_of


class Batches:
    """Those steps of a session."""

    def insert(
        self,
        batch,
        requests,
        sampler=None,
        narrow=False,
        cache=None,
        other=False,
        **options,
    ):
        if batch not in self.batches:
            if narrow:
                options |= {"completion_batch_size": 2, "prefill_batch_size": 1}
            self.batches[batch] = self.loops.BatchGenerator(
                self.model_of[int(other)],
                sampler=self.sampler(sampler),
                stop_tokens=[[t] for t in range(240, 256)],
                **options,
            )
        caches = lists = None
        if cache is not None and f"{cache}{int(other)}" in self.caches:
            self.settle()
            caches = [copy.deepcopy(self.cache_of(cache, int(other))) for _ in requests]
        if any("processors" in r for r in requests):
            lists = [self.processors(r.get("processors")) for r in requests]
            self.lists[batch] += lists
        samplers = [self.sampler(r.get("sampler")) for r in requests]
        self.uids[batch] += self.batches[batch].insert(
            [tokens_of(r["prompt"]) for r in requests],
            max_tokens=[r["n"] for r in requests],
            caches=caches,
            samplers=samplers if any(samplers) else None,
            logits_processors=lists,
        )

    def next(self, batch, times, progress=False):
        for _ in range(times):
            if batch not in self.batches:
                break
            if progress:
                prompts, responses = self.batches[batch].next()
                self.see("progress", [[r.uid, r.progress, r.end_of_prompt] for r in prompts])
            else:
                responses = self.batches[batch].next_generated()
            for r in responses:
                kept = offsets(r.prompt_cache or [])
                self.see_token(r.token, r.logprobs, r.uid, r.finish_reason, r.all_tokens, kept)
            self.see("responses", len(responses))

    def change(self, batch, which, how, to):
        if self.lists[batch]:
            self.changed(self.lists[batch][which % len(self.lists[batch])], how, to)

    def remove(self, batch, which, cache=None):
        if not self.uids[batch] or batch not in self.batches:
            return
        uid = self.uids[batch][which % len(self.uids[batch])]
        gone = self.batches[batch].remove([uid], return_prompt_caches=cache is not None)
        for cached, tokens in gone.values():
            self.see("removed", tokens)
            if cached:
                self.caches[f"{cache}0"] = cached

    def close(self, batch):
        if batch in self.batches:
            self.batches.pop(batch).close()
            self.uids.pop(batch, None)


def offsets(cache):
    told = [getattr(c, "offset", None) for c in cache]
    return [o.tolist() if isinstance(o, mx.array) else o for o in told]
