"""The token share: every rank gets the ids that rank 0 sampled, with one collective a step.

A `Run` is one generation over a pipelined model, on one rank. While a step of it is being built,
in its ``with`` block, the model's hidden broadcast is left out and a worker's logits are NaN
(head.py). Samplers and logits processors run on every rank, as upstream; `Run.share` then puts
rank 0's ids in the place of what each rank sampled, and MLX never computes what nobody uses.

To skip the head without sharing the ids would be wrong: every rank would sample from its own
logits, and the rank that embeds the next token is the last, not rank 0. The share takes the place
of the hidden broadcast: as many collectives as upstream, and smaller. What a worker adds to it
waits for its own send to the next rank, and so makes it happen.

Words: the *head rank* is rank 0, which runs the last layers and the head; a *worker* is any other
rank; the *hidden broadcast* is the ``all_gather`` by which upstream gives all ranks the input of
the head.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx

from ..ranks import watch

log = logging.getLogger("mlx_lm_skiphead")

Sampling = Callable[..., mx.array]
"""A sampler, which gives ids ``(B,)`` of logprobs ``(B, V)``, or a logits processor, which gives
logits ``(1, V)`` of the ids so far and logits."""

FINE, FAILED = 0x534B4950, 0x46410000
"""What a rank says of its sampling: no number that a rank without the plugin would send. To the
second it adds which call of a sampler or a logits processor failed, below `CALLS`."""
CALLS = 1 << 16
COMPUTED_EVERY = 32
"""Steps after which a worker computes what it sampled itself, so that the graph of a sampler's own
state (a random key, say) does not grow for ever."""


class _PerThread(threading.local):
    run: Run | None = None
    """The run whose step this thread is building."""
    forward: Any = None
    """The forward pass of a pipelined model that is being built (head.py)."""


this_thread = _PerThread()


@contextmanager
def during(**values: Any) -> Iterator[None]:
    """Inside the ``with`` block `this_thread` has these attributes."""
    before = {name: getattr(this_thread, name) for name in values}
    vars(this_thread).update(values)
    try:
        yield
    finally:
        vars(this_thread).update(before)


class Run:
    """A generation over a pipelined model, on one rank.

    Its steps are built inside ``with run.step()``.

    Args:
        owner: the head owner within the model (`Family.owner_of`), or None for any model.
        rank: this rank. Any but 0 is a worker.
        ranks: how many there are.
    """

    def __init__(self, owner: Any, rank: int, ranks: int) -> None:
        self.owner = owner
        self.rank = rank
        self.ranks = ranks
        self.is_worker = rank != 0
        self.sent: list[mx.array] = []
        """What was left out of the hidden broadcast since the last share, ``(B, L, H)`` each: on a
        worker its sends."""
        self.broadcast: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        """How upstream calls the hidden broadcast: a group or a stream, if it gives one."""
        self.inputs: mx.array | None = None
        """Ids that the last forward pass was given, ``(B, L)``."""
        self.vocabulary = 0
        """The width of its logits."""
        self.failures: dict[int, BaseException] = {}
        """What samplers and logits processors have raised on this rank, by number of the call. It
        is raised if rank 0 has failed in that call."""
        self._past: dict[int, BaseException] = {}
        """On a worker, that of the step before, whose share `check` has yet to look at."""
        self.has_failed = False
        """Whether all have."""
        self.shares: deque[Share] = deque()
        """Those that `check` has yet to look at."""
        self.last: mx.array | None = None
        """The last share."""
        self._is_sampling = False
        self._call = 0
        """The number of the last call of a sampler or a logits processor."""
        self._leaves_at: int | None = None
        """That of a call to come in which rank 0 has failed, and all are to leave."""
        self._busy_with = ""
        """What of the program's is being called, if anything."""
        self.key: mx.array | None = None
        """Of `mx.random`, when the step began or when this rank failed in it."""
        self._given: mx.array | None = None
        """What a worker got from the last share."""
        self._early: mx.array | None = None
        """Of this step, where a failure has shared it already."""
        self.fails_at_once = True
        """Whether what all ranks raise leaves at that call, as upstream, or at the step's share."""
        self._steps = 0
        self._batch = 0
        self._has_warned = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """In this thread calls of the model are of this run. Where it does not end, it is told."""
        with watch.watched(self.describe), during(run=self):
            yield

    def describe(self, seconds: float) -> str:
        """What this rank is doing for `seconds`, in words."""
        behind = f"hidden states of rank {self.rank + 1}" if self.rank + 1 < self.ranks else ""
        token = "rank 0's token" if self.is_worker else ""
        where = f"step {self._steps}, batch {self._batch}" if self._steps else "prompt"
        what = self._busy_with or " or ".join(filter(None, (behind, token if self._steps else "")))
        what = what or f"rank {self.rank - 1} to take its hidden states"
        return f"rank {self.rank} of {self.ranks}, {where}: {seconds:.0f} s for {what}"

    @property
    def is_extra(self) -> bool:
        """Whether a call of the model now is not the loop's one call for a token."""
        return self.owner is None or self._is_sampling

    def begin_forward(self) -> None:
        """A forward pass follows. What is left of an earlier one that was not shared is ordered.

        Ranks must send and receive in one order. Within a graph MLX may choose; so what came first
        is begun first. A loop's own calls without a share are its prefill, which it evaluates.
        """
        if self.sent and self.is_extra:
            mx.async_eval(self.sent)  # type: ignore[no-untyped-call]
        elif self.sent:
            self.sent.clear()
        if not self._is_sampling:
            self._early = None
            if self.is_worker and self.fails_at_once:
                self._past, self.failures = self.failures, {}
            self.key = self.key if self.failures else _random_key()

    def share(self, tokens: mx.array, compare: mx.array | None = None) -> mx.array:
        """Give every rank the ids that rank 0 sampled: the token share.

        What a worker adds depends on its own sends and on nothing else, so that they happen. Each
        rank adds at which call it failed to sample, if it did. Where all did, all leave at the call
        that failed on rank 0, as upstream would, each with its own error of that call; where only
        rank 0 and some others did, `check` raises in the next step; where only workers did, they go
        on, since the ids are rank 0's anyway.

        Args:
            tokens: ids, of a shape that is the same on all ranks; only rank 0's count.
            compare: ids of shape ``(M,)`` that must be the same on all ranks; see `Share.rows`.

        Returns:
            Rank 0's ids on every rank, in the shape and type of `tokens`.
        """
        if self._early is not None:
            early, self._early = self._early, None
            if self._leaves_at is not None:
                self._raise(self.shares[-1])
            return early.reshape(tokens.shape).astype(tokens.dtype)
        if not self.sent:
            raise RuntimeError(
                "A loop of mlx-lm sampled without a step of its pipelined model: another patch has "
                "taken the place of mlx-lm-skiphead's. Unset MLX_LM_SKIPHEAD on all ranks, or "
                "import that package first."
            )
        size, first = tokens.size, next(iter(self.failures), None)
        word = FINE if first is None else FAILED + first % CALLS
        sent, self.sent = self.sent, []
        # On the CPU's stream: the GPU is waited for once, as for upstream's broadcast.
        with mx.stream(mx.cpu):
            if self.is_worker or self.failures:
                mine = mx.depends(mx.array([0] * size + [word], mx.uint32), sent)
            else:
                # Also where a sampler's ids do not come from logits: first the receive, then this.
                ids = mx.depends(tokens.flatten().astype(mx.uint32), sent)
                mine = mx.concatenate([ids, mx.array([FINE], mx.uint32)])
            if compare is not None:
                mine = mx.concatenate([mine, compare.astype(mx.uint32)])
        spins = self.is_worker and _waits_by_spinning()
        if spins and self._given is not None:
            mx.eval(self._given)  # of the step before; what is built since then is not begun
        args, kwargs = self.broadcast
        # On the stream that upstream's sends and receives take too: their order is the protocol.
        everyone = self.last = mx.distributed.all_gather(mine, *args, **kwargs)
        self.shares.append(Share(everyone, size, mine.size, self.key))
        if self.failures:
            self._settle(self.shares[-1])
        self._steps, self._batch = self._steps + 1, size
        if not self.is_worker and self.owner is not None:
            # Its own ids. The exchange ends before the loop does (`finish`).
            mx.async_eval(everyone)  # type: ignore[no-untyped-call]
            return tokens
        if self.is_worker and self._steps % COMPUTED_EVERY == 0:
            mx.async_eval(tokens)  # type: ignore[no-untyped-call]
        with mx.stream(mx.cpu) if spins else nullcontext():
            ids = everyone[:size]
            # A lost peer leaves random memory in the place of its ids, and on a CPU embedding that
            # would end this process before MLX raises.
            if self.vocabulary and mx.default_device() == mx.cpu:
                ids = mx.minimum(ids, self.vocabulary - 1)
            self._given = ids.reshape(tokens.shape).astype(tokens.dtype)
        return self._given

    def sampler(self, sampler: Sampling) -> Sampling:
        """`sampler`, whose failure waits for the share."""
        return self._guarded(sampler, lambda logprobs: mx.zeros(logprobs.shape[:1], mx.uint32))

    def processor(self, processor: Sampling) -> Sampling:
        """`processor`, whose failure waits for the share."""
        return self._guarded(processor, lambda tokens, logits: logits)

    def _guarded(self, function: Sampling, otherwise: Sampling) -> Sampling:
        """`function`; if it raises, a `failure`, and what `otherwise` gives.

        The other ranks must not wait for what never comes: the step is shared first. If all have
        failed, the error goes on. What comes after a failure is not called on rank 0, as upstream;
        a worker's failure may be its own (it looked at NaN), and what counts calls must count them
        all the same.
        """

        def call(*args: mx.array) -> mx.array:
            self._call += 1
            if self.failures and not self.is_worker:
                return otherwise(*args)
            error: BaseException | None = None
            before, self._is_sampling = self._is_sampling, True
            try:
                with self._calling("a sampler or a logits processor"):
                    result = function(*args)
            except BaseException as why:
                error, result = why, otherwise(*args)
            finally:
                self._is_sampling = before
            if error is not None:
                self.key = self.key if self.failures else _random_key()
                self.failures[self._call] = error
            if self._call == self._leaves_at:
                self._raise(self.shares[-1]._replace(key=None))
            if error is not None and self.fails_at_once and self.sent:
                self._early = self.share(mx.zeros(self.sent[-1].shape[:1], mx.uint32))
            return result

        return call

    def callback(self, callback: Callable[..., None] | None) -> Callable[..., None] | None:
        """A user's callback in a loop: a model that it calls is not a step of the loop."""

        def call(*args: Any) -> None:
            with during(run=None), self._calling("a callback"):
                callback and callback(*args)

        return callback and call

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        before, self._busy_with = self._busy_with, f"{what} of the program"
        try:
            yield
        finally:
            self._busy_with = before

    def _settle(self, share: Share) -> None:
        """This rank failed to sample: raise if all did, go on if rank 0 did not. Waits for that."""
        words = share.words()
        if FINE not in words:
            ahead = (words[0] - FAILED - self._call) % CALLS
            if not 0 < ahead < CALLS // 2:
                self._raise(share)
            self._leaves_at = self._call + ahead
        elif words[0] == FINE:
            if not self._has_warned:
                log.warning(
                    "A sampler or a logits processor failed on this rank only, where the logits "
                    "are NaN (%r). That changes nothing: the tokens are rank 0's.",
                    next(iter(self.failures.values())),
                )
            self._has_warned = True
            self.failures.clear()

    def _raise(self, share: Share) -> None:
        if self.is_worker and share.key is not None:
            numbers: Any = share.key.tolist()  # rank 0 has drawn no more since then
            mx.random.seed(numbers[0] << 32 | numbers[1])
        call = share.words()[0] - FAILED
        raised = self._past | self.failures
        errors = [error for number, error in raised.items() if number % CALLS == call]
        self.shares.clear()
        self.failures.clear()
        self._leaves_at, self.has_failed = None, True
        if errors:
            raise errors[0]
        raise RuntimeError(
            "A sampler or a logits processor failed on rank 0; the error is in the output of that "
            "rank."
        )

    def check(self, in_flight: int) -> None:
        """Raise what made rank 0 fail, on all ranks, before its ids are given out.

        Args:
            in_flight: how many of the last shares are not to be waited for.
        """
        while len(self.shares) > in_flight:
            share = self.shares[0]
            if (self.is_worker or self.failures) and share.words()[0] != FINE:
                self._raise(share)
            self.shares.popleft()
        if not self.shares:
            self.failures.clear()

    def finish(self, stream: Any) -> None:
        """Wait for the last step, so that no rank leaves while another is still sending.

        mlx-lm's loops have a step in flight when they return.

        Args:
            stream: what the loop computes on.
        """
        if self.last is not None:
            with watch.watched(self.describe):
                mx.eval(self.last)
                self.last = None
                mx.synchronize(stream)


class Share(NamedTuple):
    """A token share: of each rank `size` ids, whether it failed, and what is compared."""

    everyone: mx.array
    size: int
    width: int
    key: mx.array | None
    """Of `mx.random`, before the step."""

    def rows(self) -> list[list[int]]:
        """What each rank has put into it. Waits for it.

        Raises:
            RuntimeError: if a rank has put something else into it.
        """
        # No operation of MLX, which would wait behind the step that has been begun since then.
        numbers: Any = self.everyone.tolist()
        rows = [numbers[at : at + self.width] for at in range(0, len(numbers), self.width)]
        words = [row[self.size] for row in rows]
        odd = [
            i for i, word in enumerate(words) if word != FINE and word // CALLS * CALLS != FAILED
        ]
        if odd:
            raise RuntimeError(
                f"What rank {odd[0]} has sent is no token share: mlx-lm-skiphead is off there, or "
                "of another version. All ranks must have the same MLX_LM_SKIPHEAD, mlx-lm and "
                "mlx-lm-skiphead."
            )
        return rows

    def words(self) -> list[int]:
        """What each rank says of its sampling. Waits for it."""
        return [row[self.size] for row in self.rows()]


def not_computed(array: mx.array, after: list[mx.array] | None = None) -> mx.array:
    """In the place of `array`, without its memory: NaN, or zeros where its type has no NaN.

    NaN since a number that was never computed must not look like one; in full shape since MLX
    checks no bounds and every rank indexes its logprobs by token.
    """
    is_float = mx.issubdtype(array.dtype, mx.inexact)
    one = mx.array(float("nan") if is_float else 0, array.dtype)
    return mx.broadcast_to(mx.depends(one, after) if after else one, array.shape)


@functools.cache
def _waits_by_spinning() -> bool:
    """Whether this GPU waits for a CPU's result in a kernel that spins: on CUDA.

    Two GPUs stood still with such kernels, and were slower with them. So there a worker's calling
    thread waits instead, with the next step built, and not begun.
    """
    return mx.default_device() == mx.gpu and not mx.metal.is_available()


def _random_key() -> Any:
    state: Any = mx.random.state
    return state[0]
