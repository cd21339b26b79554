"""The token share: every rank gets the ids that rank 0 sampled, with one collective a step.

A `Run` is one generation over a pipelined model, on one rank. While a step of it is being built,
in its ``with`` block, the model's hidden broadcast is left out and a worker's logits are NaN
(head.py). Samplers and logits processors run on every rank, as upstream; `Run.share` then puts
rank 0's ids in the place of what each rank sampled, and MLX never computes what nobody uses.

Words: the *head rank* is rank 0, which runs the last layers and the head; a *worker* is any other
rank; the *hidden broadcast* is the ``all_gather`` by which upstream gives all ranks the input of
the head.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from . import config

log = logging.getLogger("mlx_lm_skiphead")

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

COMPUTED_EVERY = 32
"""Steps after which a worker computes what it sampled itself, so that the graph of a sampler's own
state (a random key, say) does not grow for ever."""


class _PerThread(threading.local):
    run: Run | None = None
    """The run whose step this thread is building."""
    forward: Any = None
    """The forward pass of a pipelined model that is being built (head.py)."""
    unshared: Run | None = None
    """What `rank_zero_head` has called, until `share_tokens`."""


this_thread = _PerThread()


class Run:
    """A generation over a pipelined model, on one rank. Its steps are built in its ``with`` block.

    Args:
        owner: the head owner within the model (`Family.owner_of`), or None for any model.
        is_worker: whether this is any rank but 0.
    """

    def __init__(self, owner: Any, is_worker: bool) -> None:
        self.owner = owner
        self.is_worker = is_worker
        self.sent: list[mx.array] = []
        """What was left out of the hidden broadcast since the last share, ``(B, L, H)`` each: on a
        worker its sends."""
        self.broadcast: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        """How upstream calls the hidden broadcast: a group or a stream, if it gives one."""
        self.inputs: mx.array | None = None
        """Ids that the last forward pass was given, ``(B, L)``."""
        self.vocabulary = 0
        """The width of its logits."""
        self.is_sampling = False
        """Whether a sampler or a logits processor is being called."""
        self.failure: BaseException | None = None
        """What one of them has raised on this rank, in the step that is being built."""
        self.has_failed = False
        """Whether all ranks have raised."""
        self.shares: deque[tuple[mx.array, int, mx.array | None]] = deque()
        """Those that `check` has yet to look at: the share, how many ids, `mx.random`'s key before
        the step."""
        self.last: mx.array | None = None
        """The last share."""
        self._before: Run | None = None
        self._key: mx.array | None = None
        """Of `mx.random`, when the step began or, on a worker, when it failed."""
        self._steps = 0
        self._has_warned = False

    def __enter__(self) -> None:
        """From here on calls of this run's model, in this thread, are steps of the loop."""
        self._before, this_thread.run = this_thread.run, self

    def __exit__(self, *_: Any) -> None:
        this_thread.run, self._before = self._before, None

    @property
    def is_extra(self) -> bool:
        """Whether a call of the model is not the loop's one call for a token."""
        return self.owner is None or self.is_sampling

    def begin_forward(self) -> None:
        """A forward pass follows. What is left of an earlier one that was not shared is ordered.

        Ranks must send and receive in one order. Within a graph MLX may choose; so what came first
        is begun first. A loop's own calls without a share are its prefill, which it evaluates.
        """
        if self.sent and self.is_extra:
            mx.async_eval(self.sent)  # type: ignore[no-untyped-call]
        elif self.sent:
            self.sent.clear()
        if not self.is_sampling and self.failure is None:
            self._key = _random_key()

    def share(
        self, tokens: mx.array | None, size: int, compare: mx.array | None = None
    ) -> mx.array:
        """Give every rank the ids that rank 0 sampled: the token share.

        What a worker adds depends on its own sends and on nothing else, so that they happen. Each
        rank adds whether it failed to sample (`attempt`); where all did, each raises its own error
        here, as upstream would. Where only rank 0 and some others did, `check` raises in the next
        step; where only workers did, they go on, since the ids are rank 0's anyway.

        Args:
            tokens: ids of shape ``(size,)``; only rank 0's count. None if sampling failed.
            size: the same on all ranks.
            compare: ids of shape ``(M,)`` that must be the same on all ranks; `differing` tells.

        Returns:
            Rank 0's ids on every rank, shape ``(size,)``, in the type of `tokens`.
        """
        if not self.sent:
            raise RuntimeError(
                "A loop of mlx-lm sampled without a step of its pipelined model: another patch has "
                "taken the place of mlx-lm-skiphead's. Unset MLX_LM_SKIPHEAD on all ranks, or "
                "import that package first."
            )
        if self.failure is None and (not isinstance(tokens, mx.array) or tokens.shape != (size,)):
            self.failure = ValueError(
                f"The sampler returned {_described(tokens)} where mlx-lm shares one token for each "
                f"of {size} rows of logprobs: an array of shape ({size},)."
            )
        failed = self.failure is not None
        sent, self.sent = self.sent, []
        if self.is_worker or failed:
            nothing = mx.array([0] * size + [int(failed)], mx.uint32)
            mine = _after(nothing, sent)
        else:
            assert tokens is not None
            ids = tokens.astype(mx.uint32)
            if len(sent) > 1:
                ids = mx.depends(ids, sent)
            # On the CPU's stream: the GPU is waited for once, as for upstream's broadcast.
            mine = mx.concatenate([ids, mx.array([0], mx.uint32)], stream=mx.cpu)
        if compare is not None:
            mine = mx.concatenate([mine, compare.astype(mx.uint32)], stream=mx.cpu)
        args, kwargs = self.broadcast
        # On the stream that upstream's sends and receives take too: their order is the protocol.
        everyone = self.last = mx.distributed.all_gather(mine, *args, **kwargs)
        self.shares.append((everyone, size, self._key))
        if failed:
            self._settle(everyone, size, mine.size)
        self._steps += 1
        if self.is_worker and tokens is not None and self._steps % COMPUTED_EVERY == 0:
            mx.async_eval(tokens)  # type: ignore[no-untyped-call]
        shared = self.valid(everyone[:size])
        return shared.astype(tokens.dtype) if isinstance(tokens, mx.array) else shared

    def attempt(self, function: Callable[..., mx.array], *args: mx.array) -> mx.array | None:
        """What a sampler or a logits processor gives; None, and a `failure`, if it raises.

        The other ranks must not wait for what never comes: the step is finished first. What comes
        after a failure is not called on rank 0, as upstream; a worker's failure may be its own (it
        looked at NaN), and what counts calls must count them all the same.
        """
        if self.failure is not None and not self.is_worker:
            return None
        before, self.is_sampling = self.is_sampling, True
        try:
            return function(*args)
        except BaseException as error:
            if self.failure is None:
                self.failure, self._key = error, _random_key()
            return None
        finally:
            self.is_sampling = before

    def sampling(self, sampler: Sampler) -> Sampler:
        """`sampler`, which gives every rank rank 0's ids, ``(B,)`` of logprobs ``(B, V)``."""

        def sample(logprobs: mx.array) -> mx.array:
            return self.share(self.attempt(sampler, logprobs), logprobs.shape[0])

        return sample

    def processing(self, processor: LogitsProcessor) -> LogitsProcessor:
        """`processor`, whose failure waits until the step has been shared."""

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            processed = self.attempt(processor, tokens, logits)
            return logits if processed is None else processed

        return process

    def _settle(self, everyone: mx.array, size: int, width: int) -> None:
        """This rank failed to sample: raise if all did, go on if rank 0 did not. Waits for that."""
        numbers: Any = everyone.tolist()
        failed = numbers[size::width]
        if all(failed):
            self._raise(self._key)
        if not failed[0]:
            self._go_on()

    def _go_on(self) -> None:
        """Rank 0 has sampled, so what this worker's sampler or processor raised is no error."""
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "A sampler or a logits processor failed on this rank only, where the logits are "
                "NaN (%r). That changes nothing: the tokens are rank 0's.",
                self.failure,
            )
        self.failure = None

    def _raise(self, key: mx.array | None) -> None:
        if self.is_worker and key is not None:
            _set_random_key(key)  # rank 0 has drawn no more since then
        self.shares.clear()
        self.has_failed = True
        error, self.failure = self.failure, None
        raise error or RuntimeError(
            "A sampler or a logits processor failed on rank 0; the error is in the output of that "
            "rank."
        )

    def check(self, in_flight: int) -> None:
        """Raise what made rank 0 fail, on all ranks, before its ids are given out.

        Args:
            in_flight: how many of the last shares are not to be waited for.
        """
        while len(self.shares) > in_flight:
            share, size, key = self.shares[0]
            if self.is_worker or self.failure is not None:
                numbers: Any = share.tolist()
                if numbers[size]:
                    self._raise(key)
            self.shares.popleft()
        if self.failure is not None and not self.shares:
            self._go_on()

    def differing(self) -> str:
        """In what the ranks differ of what the last share compared, or ""; waits for it."""
        share, size, _ = self.shares[-1]
        ranks = mx.distributed.init().size()
        numbers: Any = share.reshape(ranks, -1).tolist()
        rows = [row[size + 1 :] for row in numbers]
        if all(row == rows[0] for row in rows):
            return ""
        return "; ".join(f"{row} on rank {rank}" for rank, row in enumerate(rows))

    def valid(self, tokens: mx.array) -> mx.array:
        """`tokens` within the vocabulary.

        They are, unless a peer was lost: then MLX leaves random memory in the place of what it
        did not receive, and on a CPU, embedding that would end this process before its error is
        raised. With a GPU nothing is done: ranks of 4 GPUs stood still with more work of the CPU
        between their steps.
        """
        if self.vocabulary and mx.default_device() == mx.cpu:
            return mx.minimum(tokens, self.vocabulary - 1)
        return tokens

    def finish(self, stream: Any) -> None:
        """Wait for the last step, so that no rank leaves while another is still sending.

        mlx-lm's loops have a step in flight when they return.

        Args:
            stream: what the loop computes on.
        """
        if self.last is not None:
            mx.eval(self.last)
            self.last = None
            mx.synchronize(stream)


@contextmanager
def rank_zero_head() -> Iterator[None]:
    """Skip the head on workers in a generation loop of your own.

    A pipelined model that is called in the ``with`` block gives its logits ``(B, L, V)`` on rank 0,
    and on the other ranks NaN of that shape. Sample, and give the tokens to `share_tokens`: every
    rank goes on with rank 0's. There may be several calls for a token, in one block or in more. A
    call that only fills the cache needs no sharing; evaluate the cache then, as mlx-lm's loops do.

    All ranks must do the same. Where the plugin is off or the model is not patched, a call is
    upstream's. A loop of mlx-lm needs none of this, and is not affected by it.
    """
    if config.active == "off":
        yield
        return
    run = this_thread.unshared or Run(None, mx.distributed.init().rank() != 0)
    with run:
        yield
    this_thread.unshared = run if run.sent else None


def share_tokens(tokens: mx.array) -> mx.array:
    """Give every rank rank 0's tokens, with one collective; for a loop of your own.

    On one rank, `tokens` itself. Otherwise all ranks must call it, after each step, whether the
    plugin is on or off. The exchange begins at once, whether its result is used or not.

    Args:
        tokens: ids, integers of any shape. The shape must be the same on all ranks; of the ids
            only rank 0's count, those of the others are not even computed.

    Returns:
        Rank 0's ids, in the shape and type of `tokens`, on every rank.

    Raises:
        TypeError: if `tokens` is no array of integers.
        ValueError: if it has another batch size than the model call before it.
        RuntimeError: inside a loop of mlx-lm, which shares tokens itself.
    """
    if not isinstance(tokens, mx.array) or not mx.issubdtype(tokens.dtype, mx.integer):
        given = tokens.dtype if isinstance(tokens, mx.array) else type(tokens).__name__
        raise TypeError(f"share_tokens() takes an array of token ids, integers, not {given}.")
    if this_thread.run is not None:
        raise RuntimeError(
            "share_tokens() was called inside a rank_zero_head() block or a loop of mlx-lm. Call "
            "it behind the block; loops of mlx-lm share their tokens themselves."
        )
    group = mx.distributed.init()
    if group.size() == 1:
        return tokens
    run, sent = this_thread.unshared, []
    if run is not None and run.sent:
        batch = run.sent[-1].shape[0]
        if tokens.ndim == 0 or tokens.shape[0] != batch:
            raise ValueError(
                f"share_tokens() got tokens of shape {tokens.shape} after a model call with a "
                f"batch of {batch}. The shape must be the same on all ranks, the batch first."
            )
        sent, this_thread.unshared = run.sent, None
    if group.rank() == 0:
        mine = tokens.astype(mx.uint32).flatten()
        mine = mx.depends(mine, sent) if sent else mine
    else:
        mine = _after(mx.zeros((tokens.size,), mx.uint32, stream=mx.cpu), sent or [tokens])
    everyone = mx.distributed.all_gather(mine)[: tokens.size]
    if run is not None:
        everyone = run.valid(everyone)
    shared = everyone.reshape(tokens.shape).astype(tokens.dtype)
    mx.async_eval(shared)  # type: ignore[no-untyped-call]
    return shared


def outside(callback: Callable[..., None] | None) -> Callable[..., None] | None:
    """A user's callback in a loop: a model that it calls is not a step of the loop."""
    if callback is None:
        return None

    def called(*args: Any) -> None:
        before, this_thread.run = this_thread.run, None
        try:
            callback(*args)
        finally:
            this_thread.run = before

    return called


def _after(nothing: mx.array, sent: list[mx.array]) -> mx.array:
    """`nothing`, once `sent` has been sent: no work of the GPU, and no wait for it."""
    with mx.stream(mx.cpu):
        after: mx.array = mx.depends(nothing, sent)
    return after


def _random_key() -> Any:
    state: Any = mx.random.state
    return state[0]


def _set_random_key(key: mx.array) -> None:
    numbers: Any = key.tolist()
    mx.random.seed(numbers[0] << 32 | numbers[1])


def _described(tokens: Any) -> str:
    return f"an array of shape {tokens.shape}" if isinstance(tokens, mx.array) else repr(tokens)
