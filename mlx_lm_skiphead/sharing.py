"""One run of a generation loop over a pipelined model: its scope, and the token share.

While a loop builds a step of its model (`Run.building`), the model's forward pass ends before
the head on workers and leaves out the hidden broadcast on all ranks (head.py). After sampling,
`Run.share` gives every rank rank 0's tokens, with the one collective of the step.

Words: the *head rank* is rank 0, which runs the last layers and the head and samples; a
*worker* is any other rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


class _PerThread(threading.local):
    run: Run | None = None
    """The run whose step this thread is building."""

    forward: Any = None
    """The forward pass that is to be cut short (head.py), while it is being built."""

    alone: str = ""
    """What runs on rank 0 only at the moment ("a sampler"), or ""."""


this_thread = _PerThread()


class Run:
    """One run of a generation loop over a pipelined model, on one rank.

    Args:
        owner: the head owner within the model (`Family.owner_of`).
        rank: this rank's ``pipeline_rank``.
        stream: what the loop computes on.
    """

    def __init__(self, owner: Any, rank: int, stream: Any) -> None:
        self.owner = owner
        self.is_worker = rank != 0
        self._stream = stream
        self.sent: mx.array | None = None
        """A worker's last send, not yet forced by a share."""
        self._random_key: mx.array | None = None
        self._thread = threading.get_ident()

    @contextmanager
    def building(self) -> Iterator[None]:
        """Where calls of this run's model, in this thread, are steps of the loop."""
        before, this_thread.run = this_thread.run, self
        try:
            yield
        finally:
            this_thread.run = before

    def share(self, tokens: mx.array | None, logprobs: mx.array) -> mx.array:
        """Give every rank the tokens that rank 0 sampled: the token share.

        Rank 0's key of `mx.random` travels with them, so that random numbers drawn on every
        rank after the loop agree, as they do when every rank samples.

        Args:
            tokens: ids of shape ``(B,)`` on rank 0, None on workers.
            logprobs: what they were, or would be, sampled from: ``(B, V)``.

        Returns:
            Rank 0's ids on every rank, uint32, shape ``(B,)``.
        """
        size = logprobs.shape[0]
        if tokens is not None:
            state: Any = mx.random.state
            mine = mx.concatenate([tokens.astype(mx.uint32), state[0]], stream=mx.cpu)
        else:
            # Evaluating a worker's share must force its send, and should wait for nothing else:
            # no work of the GPU, no wait of the GPU. Where the forward pass was not cut short (a
            # foreign patch took the place of ours) the whole step comes before the share.
            after = self.sent if self.sent is not None else logprobs
            mine = mx.depends(mx.zeros((size + 2,), mx.uint32, stream=mx.cpu), after)
        self.sent = None
        # On the stream that upstream's sends and receives take too: their order is the protocol.
        everyone = mx.distributed.all_gather(mine)
        self._random_key = everyone[size : size + 2]
        return everyone[:size]

    def sampler(self, sampler: Sampler) -> Sampler:
        """A sampler for the loop: `sampler` on rank 0, and its tokens on every rank."""
        if self.is_worker:
            return lambda logprobs: self.share(None, logprobs)
        sampler = _on_rank_zero_only(sampler, "a sampler")

        def sample_and_share(logprobs: mx.array) -> mx.array:
            tokens = sampler(logprobs)
            if tokens.shape != logprobs.shape[:1]:
                raise ValueError(
                    f"The sampler returned an array of shape {tokens.shape} for logprobs of shape "
                    f"{logprobs.shape}; mlx-lm-skiphead shares one token per sequence, "
                    f"{logprobs.shape[:1]}."
                )
            return self.share(tokens, logprobs)

        return sample_and_share

    def processors(self, processors: list[LogitsProcessor] | None) -> list[LogitsProcessor] | None:
        """Logits processors for the loop: none on workers, whose logits are never computed."""
        if self.is_worker or not processors:
            return None
        return [_on_rank_zero_only(p, "a logits processor") for p in processors]

    def callback(self, callback: Callable[..., None] | None) -> Callable[..., None] | None:
        """A user's callback for the loop; a model that it calls is not a step of the loop."""
        if callback is None:
            return None

        def outside(*args: Any) -> None:
            before, this_thread.run = this_thread.run, None
            try:
                callback(*args)
            finally:
                this_thread.run = before

        return outside

    def finish(self) -> None:
        """Wait for the last step, so that no rank leaves while another is still sending.

        mlx-lm's loops always have a step in flight when they return.
        """
        if self._random_key is None:
            return
        key: Any = self._random_key.tolist()
        mx.synchronize(self._stream)
        if self.is_worker and threading.get_ident() == self._thread:
            mx.random.seed(key[0] << 32 | key[1])


def _on_rank_zero_only(function: Callable[..., mx.array], what: str) -> Callable[..., mx.array]:
    """`function`, unless it calls a pipelined model: the other ranks would never join in."""

    def guarded(*args: mx.array) -> mx.array:
        before, this_thread.alone = this_thread.alone, what
        try:
            return function(*args)
        finally:
            this_thread.alone = before

    return guarded
