"""The scope in which heads are skipped, and the token share that makes it right.

A `Run` is open in a thread while a loop builds a step of a pipelined model. In it the model's
forward pass ends before the head on workers, and leaves out the hidden broadcast on all ranks
(head.py). After sampling, `Run.share` gives every rank rank 0's tokens, with the one collective
of the step.

Words: the *head rank* is rank 0, which runs the last layers and the head and samples; a *worker*
is any other rank.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .rest import rest

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


FAILED = [0xFFFFFFFF, 0xFFFFFFFF]
"""In the place of the random key: rank 0 could not sample, and the ids are not to be used."""


class _PerThread(threading.local):
    run: Run | None = None
    """The run whose step this thread is building."""

    forward: Any = None
    """The forward pass that is to be cut short (head.py), while it is being built."""

    alone: str = ""
    """What runs on rank 0 only at the moment ("a sampler"), or ""."""

    unshared: Run | None = None
    """What `rank_zero_head` opened last, until `share_tokens`."""

    embeds_for_shape: bool = False
    """Whether a forward pass is being built (dead_weights.py)."""

    loading: Any = None
    """The call of `sharded_load` for a pipeline (dead_weights.py), while it lasts."""

    batch_run: Run | None = None
    """Of the last step of a batch, while one goes on."""

    last_share: tuple[mx.array, int, bool] | None = None
    """The last share, where in it rank 0's random key is, and whether this rank has yet to take
    that over."""


this_thread = _PerThread()


class Run:
    """A loop over a pipelined model, on one rank. Its steps are built in its ``with`` block.

    Args:
        owner: the head owner within the model (`Family.owner_of`), or None for any model.
        is_worker: whether this is any rank but 0.
        stage: the pipelined model within `owner`, if that is one.
    """

    def __init__(self, owner: Any, is_worker: bool, stage: Any = None) -> None:
        self.owner = owner
        self.is_worker = is_worker
        self.stage = stage
        self._before: Run | None = None
        self._nothing: mx.array | None = None
        """What a worker adds to a share: zeros, made once."""
        self._rest = rest() if is_worker else None
        self.sent: mx.array | None = None
        """What the last forward pass left out of the hidden broadcast, ``(B, L, H)``: on a worker
        its send. None once it has been shared."""
        self.vocabulary = 0
        """The width of its logits."""
        self.placeholder: mx.array | None = None
        """A worker's logits, which are the same in each step."""
        self.logsumexp: mx.array | None = None
        """Of those."""
        self.model: Any = None
        """The whole model, where the run is of a batch."""
        self.then_alone = ""
        """What runs on rank 0 only as soon as the forward pass is built, or ""."""
        self.failure: Exception | None = None
        """What a sampler or a logits processor has raised, on rank 0."""
        self.failed = False
        """Whether `check` has raised."""
        self.shares: deque[tuple[mx.array, int]] = deque()
        """Those that have yet to be looked at, and how many ids they have (`check`)."""

    def __enter__(self) -> None:
        """From here on calls of this run's model, in this thread, are steps of the loop."""
        self._before, this_thread.run = this_thread.run, self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        this_thread.run, self._before = self._before, None
        if kind is not None and issubclass(kind, Exception):
            # What is in flight may never arrive: nobody is to wait for it (`finish`).
            this_thread.last_share = None

    def share(self, tokens: mx.array | None, size: int) -> mx.array:
        """Give every rank the tokens that rank 0 sampled: the token share.

        Rank 0's key of `mx.random` travels with them, so that random numbers drawn on every
        rank after the loop agree, as they do when every rank samples (`finish`).

        If rank 0 has failed to sample, it shares that; `check` raises it on all ranks. Where ranks
        share the cores of a CPU, a worker first evaluates its send and sleeps (rest.py).

        Args:
            tokens: ids of shape ``(size,)`` on rank 0, ignored on workers.
            size: the same on all ranks.

        Returns:
            Rank 0's ids on every rank, uint32, shape ``(size,)``.
        """
        if self.sent is None:
            raise RuntimeError(
                "A loop of mlx-lm sampled without a step of its pipelined model: another patch has "
                "taken the place of mlx-lm-skiphead's. Unset MLX_LM_SKIPHEAD on all ranks, or "
                "import that package first."
            )
        if self.is_worker:
            if self._rest is not None:
                last, of_size = self.shares[-1] if self.shares else (None, 0)
                self._rest.take(last if of_size == size else None, self.sent)
            nothing = self._nothing
            if nothing is None or nothing.size != size + 2:
                nothing = self._nothing = mx.zeros((size + 2,), mx.uint32, stream=mx.cpu)
            # Evaluating a worker's share must force its send, and should wait for nothing else:
            # no work of the GPU, no wait of the GPU.
            mine = mx.depends(nothing, self.sent)
        else:
            if self.failure is None and (tokens is None or tokens.shape != (size,)):
                self.failure = ValueError(
                    f"The sampler returned {_shape(tokens)} where mlx-lm-skiphead shares one token "
                    f"for each of {size} rows of logprobs: an array of shape ({size},)."
                )
            if self.failure is None:
                assert tokens is not None
                state: Any = mx.random.state
                # Where they have been computed: one wait of the CPU for the GPU, as upstream's.
                mine = mx.concatenate([tokens.astype(mx.uint32), state[0]])
            else:
                # What the other ranks send in this step must be received all the same.
                mine = mx.depends(mx.array([0] * size + FAILED, mx.uint32), self.sent)
        self.sent = None
        # On the stream that upstream's sends and receives take too: their order is the protocol.
        everyone = mx.distributed.all_gather(mine)
        this_thread.last_share = (everyone, size, self.is_worker)
        self.shares.append((everyone, size))
        return self.valid(everyone[:size])

    def attempt(self, function: Callable[..., mx.array], *args: mx.array) -> mx.array | None:
        """What `function` gives; None, and a `failure`, if it raises or something has before.

        The other ranks must not wait for what never comes: the step is finished, then `check`
        raises on all of them.
        """
        if self.failure is None:
            try:
                return function(*args)
            except Exception as error:
                self.failure = error
        return None

    def check(self, in_flight: int) -> None:
        """Raise what made rank 0 fail, on all ranks, before its ids are given out.

        Args:
            in_flight: how many of the last shares are not to be waited for.
        """
        while len(self.shares) > in_flight:
            share, size = self.shares.popleft()
            if self.failure is None and not self.is_worker:
                continue
            numbers: Any = share.tolist()
            if numbers[size : size + 2] == FAILED:
                self.shares.clear()
                self.failed = True
                raise self.failure or RuntimeError(
                    "A sampler or a logits processor failed on rank 0, where mlx-lm-skiphead runs "
                    "them; the error is in the output of that rank."
                )

    def valid(self, tokens: mx.array) -> mx.array:
        """`tokens` within the vocabulary.

        They are, unless a peer was lost: then MLX leaves random memory in the place of what it
        did not receive, and on a CPU, embedding that would end this process before its error is
        raised. With a GPU nothing is done: ranks of 4 GPUs stood still with more work of the CPU
        between their steps.
        """
        if mx.default_device() == mx.cpu:
            return mx.minimum(tokens, self.vocabulary - 1)
        return tokens


@contextmanager
def rank_zero_head() -> Iterator[None]:
    """Skip the head on workers in a generation loop of your own.

    A pipelined model that is called in the ``with`` block gives its logits ``(B, L, V)`` on rank 0,
    and on the other ranks NaN of that shape. Sample, and give the tokens to `share_tokens`: every
    rank goes on with rank 0's. A call that only fills the cache needs no sharing; evaluate the
    cache then, as mlx-lm's loops do.

    All ranks must do the same. Where the plugin is off or the model is not patched, a call is
    upstream's. A loop of mlx-lm needs none of this, and is not affected by it.
    """
    from . import config

    if config.active == "off":
        yield
        return
    run = Run(None, mx.distributed.init().rank() != 0)
    with run:
        yield
    this_thread.unshared = run if run.sent is not None else None


def share_tokens(tokens: mx.array) -> mx.array:
    """Give every rank rank 0's tokens, with one collective; for a loop of your own.

    On one rank, `tokens` itself. Otherwise all ranks must call it, after each step, whether the
    plugin is on or off.

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
    if this_thread.run is not None or this_thread.alone:
        raise RuntimeError(
            "share_tokens() was called inside a rank_zero_head() block or a loop of mlx-lm. Call "
            "it behind the block; loops of mlx-lm share their tokens themselves."
        )
    group = mx.distributed.init()
    if group.size() == 1:
        return tokens
    run, this_thread.unshared = this_thread.unshared, None
    after = tokens
    if run is not None and run.sent is not None:
        batch = run.sent.shape[0]
        if tokens.ndim == 0 or tokens.shape[0] != batch:
            raise ValueError(
                f"share_tokens() got tokens of shape {tokens.shape} after a model call with a "
                f"batch of {batch}. The shape must be the same on all ranks, the batch first."
            )
        after = run.sent
    if group.rank() == 0:
        mine = tokens.astype(mx.uint32).flatten()
    else:
        mine = mx.depends(mx.zeros((tokens.size,), mx.uint32, stream=mx.cpu), after)
    everyone = mx.distributed.all_gather(mine)[: tokens.size]
    if run is not None:
        everyone = run.valid(everyone)
    return everyone.reshape(tokens.shape).astype(tokens.dtype)


def take_over_random_key() -> None:
    """On a worker: draw on from where rank 0's sampling has got to. Waits for the last share."""
    if this_thread.last_share is None:
        return
    share, place, pending = this_thread.last_share
    this_thread.last_share = (share, place, False)
    if pending:
        numbers: Any = share.tolist()
        key = numbers[place : place + 2]
        if key != FAILED:
            mx.random.seed(key[0] << 32 | key[1])


def finish(stream: Any) -> None:
    """Wait for the last step, so that no rank leaves while another is still sending.

    mlx-lm's loops have a step in flight when they return.

    Args:
        stream: what the loop computes on.
    """
    if this_thread.last_share is None:
        return
    take_over_random_key()
    mx.eval(this_thread.last_share[0])
    mx.synchronize(stream)
    this_thread.last_share = None


def on_rank_zero_only(function: Callable[..., mx.array], what: str) -> Callable[..., mx.array]:
    """`function`, unless it calls a pipelined model: the other ranks would never join in."""

    def guarded(*args: mx.array) -> mx.array:
        before, this_thread.alone = this_thread.alone, what
        try:
            return function(*args)
        finally:
            this_thread.alone = before

    return guarded


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


def _shape(tokens: Any) -> str:
    return f"an array of shape {tokens.shape}" if isinstance(tokens, mx.array) else repr(tokens)
