"""The token share: every rank gets the ids that rank 0 sampled, with one collective a step.

A step on two ranks; brackets are collectives, which all ranks take part in:

    unpatched   rank 1   embed, layers, send     [hidden states]   norm, head, sample
                rank 0   receive, layers         [hidden states]   norm, head, sample

    plugin      rank 1   embed, layers, send      NaN, sample      [ids]
                rank 0   receive, layers    norm, head, sample     [ids]

To skip the head without sharing the ids would be wrong: every rank would sample from its own
logits, and the rank that embeds the next token is the last one, not rank 0. The share takes the
place of the hidden broadcast: as many collectives as upstream, and smaller.

A `Run` is one generation over a pipelined model, on one rank. While a step of it is being built,
the hidden broadcast of its model is left out and a worker's logits are NaN (head.py). Samplers and
logits processors run on every rank, as upstream, with what they give computed. Then `Run.share`
puts rank 0's ids in the place of what each rank sampled.

Words: the *head rank* is rank 0, which runs the last layers, the final norm and the head; a
*worker* is any other rank; the *hidden broadcast* is the ``all_gather`` by which upstream gives all
ranks the input of the head; the *stage* is the pipelined model, which has that ``all_gather``.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import mlx.core as mx

from ..patching.registry import during
from ..ranks import watch

log = logging.getLogger("mlx_lm_skiphead")

FINE, FAILED = 0x534B4950, 0x46410000
"""The word of a rank in a share: `FINE`; or, where a sampler or a logits processor has raised in
this step, `FAILED` and the number of that call within the step, in the lower 16 bits."""
FAILED_CALLS = 1 << 16

FAILED_ON_RANK_0 = (
    "A sampler or a logits processor failed on rank 0; the error is in the output of that rank."
)
NO_SHARE = (
    "Rank {} has sent something else than a token share. Either a collective of the program's own "
    "has come in between two steps (do it inside mx.stream(mlx_lm.generate.generation_stream), or "
    "when no generation is running), or the ranks were given prompts of different lengths, or "
    "mlx-lm-skiphead is off on that rank or of another version."
)
OTHER_PROMPT = (
    "Another prompt than rank 0's was given to rank {}, so the answer is to a mixture. Usually the "
    "program has chosen the prompt by values of logits or logprobs, which are NaN on all ranks but "
    "0 with mlx-lm-skiphead. Let rank 0 choose, and share its choice: choice = "
    "mlx_lm_skiphead.share_tokens(mx.array([choice]))."
)


@dataclass
class Step:
    """The step that a rank is building, or has in flight."""

    hidden: list[mx.array] = field(default_factory=list)
    """Hidden states ``(B, L, H)`` that were not broadcast, one of each forward pass."""
    gather: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    """The other arguments with which upstream would have broadcast them: a group, a stream."""
    vocabulary: int = 0
    """The width of the logits; 0 if it is not known."""
    calls: int = 0
    """How often a sampler or a logits processor has been called."""
    is_programs: bool = False
    """Whether one of them was not mlx-lm's own."""
    logits: list[mx.array] = field(default_factory=list)
    """What logits processors of the program's have given."""
    errors: dict[int, BaseException] = field(default_factory=dict)
    """The errors that they have raised, by the number of the call."""
    key: mx.array | None = None
    """The key of `mx.random` when the step began, or at the first of these errors."""


class Run:
    """A generation over a pipelined model, on one rank.

    Args:
        stage: the pipelined model; None for a loop of the user's own, which may have several.
        rank: this rank. Any but 0 is a worker.
        prompt: a checksum of the ids of the prompt, which the ranks compare.
        chunks: how many forward passes compute what comes before the prompt's last token.
    """

    def __init__(self, stage: Any, rank: int, prompt: int = 0, chunks: int = 0) -> None:
        self.stage = stage
        self.rank = rank
        self.step = Step()
        """The step that is being built."""
        self.skips = False
        """Whether the last forward pass of the loop's own went without its hidden broadcast."""
        self.shares: deque[Share] = deque()
        """Shares in flight, which `check` has yet to look at."""
        self.last: mx.array | None = None
        """The last share, until `finish` has waited for it."""
        self.has_failed = False
        """Whether all ranks have left this run with an error."""
        self.chunk, self.chunks = 0, chunks
        """The forward passes so far, and how many of them are chunks of the prompt."""
        self._prompt = prompt
        self._ids: mx.array | None = None
        """The ids that the last share gave."""
        self._thread = threading.get_ident()
        self._steps = self._batch = 0
        self._has_warned = False

    @property
    def is_worker(self) -> bool:
        return self.rank != 0

    @contextmanager
    def building(self) -> Iterator[None]:
        """Inside the ``with`` block this thread's calls of the model belong to this run."""
        with self.watched(), during(run=self):
            if self._thread != threading.get_ident() and self.last is not None:
                # Each thread has streams of its own, and nothing orders two of them: a receive of
                # this step would take what is sent for the share of the step before.
                mx.eval(self.last)
            self._thread = threading.get_ident()
            try:
                yield
            except Exception:
                # What MLX could not compute, as of a lost rank, is not waited for: MLX may crash.
                self.last = self.last if self.has_failed else None
                raise

    def watched(self, program: str = "") -> AbstractContextManager[None]:
        """A ``with`` block that waits for other ranks, or else for what `program` says."""
        describe = functools.partial(self.describe, program)
        return watch.watched(describe, is_slow=not self._steps, is_programs=bool(program))

    def describe(self, program: str, seconds: float) -> str:
        """What this rank has been waiting for since `seconds`, in words."""
        ranks = self.stage.pipeline_size
        behind = f"hidden states of rank {self.rank + 1}" if self.rank + 1 < ranks else ""
        token = "rank 0's token" if self.is_worker and self._steps else ""
        chunk = f", chunk {self.chunk} of {self.chunks}" if 0 < self.chunk <= self.chunks else ""
        where = f"step {self._steps}, batch {self._batch}" if self._steps else f"prompt{chunk}"
        what = program or " or ".join(filter(None, (behind, token)))
        what = what or f"rank {self.rank - 1} to take its hidden states"
        return f"rank {self.rank} of {ranks}, {where}: {seconds:.0f} s for {what}"

    def leave_out(self, hidden: mx.array, *gather: Any, **options: Any) -> bool:
        """A forward pass has come to its hidden broadcast: whether that is to be left out.

        Not in a call that MLX only traces (`mx.compile`): what is left out there could not be
        begun, and the share, which takes its place, not be had.

        Args:
            hidden: the hidden states ``(B, L, H)``: on a worker its send.
            gather, options: the other arguments of the broadcast.
        """
        watch.goes_on()
        self.chunk += 1
        if self.stage is not None:
            self.step.hidden.clear()  # of the prompt, which needs no share
            if not self.step.errors:
                self.step.key = random_key()
        self.step.hidden.append(hidden)
        self.step.gather, self.skips = (gather, options), True
        if self.stage is None:
            # What follows is the program's, perhaps a second forward pass. MLX computes only what
            # somebody asks for, in an order of its own; ranks must send and receive in one order.
            try:
                self.begin()
            except ValueError:
                self.step.hidden.pop()
                return False
        return True

    def begin(self) -> None:
        """Begin the forward passes that have been built.

        Before anything of the program's is called: it may wait for another rank, which waits for
        what this rank sends.
        """
        if self.step.hidden:
            self._wait_on_host()
            mx.async_eval(self.step.hidden)  # type: ignore[no-untyped-call]

    def _wait_on_host(self) -> None:
        """Where a GPU would spin for the ids of the step before, this thread waits for them."""
        if self.is_worker and waits_by_spinning() and self._ids is not None:
            mx.eval(self._ids)

    def share(
        self, tokens: mx.array, shape: tuple[int, ...] = (), drafts: Sequence[mx.array] = ()
    ) -> mx.array:
        """Give every rank the ids that rank 0 sampled: the token share, which ends the step.

        Where the hidden states were broadcast after all, as upstream does, all ranks have sampled
        from the same logits, and nothing is shared.

        Args:
            tokens: the ids that this rank has sampled; only rank 0's count.
            shape: the shape that they must have; by default ``(B,)`` of the forward pass. A
                worker's sampler may give another one, having seen NaN.
            drafts: ids ``(1,)``, which should be the same on all ranks (`Note.drafts`).

        Returns:
            Rank 0's ids on every rank, in the type of `tokens`.
        """
        step, self.step = self.step, Step()
        if not step.hidden:
            self.skips = False
            for error in step.errors.values():
                raise error
            return tokens
        if self.is_worker:
            # As upstream: other ranks may wait for a collective in it. mlx-lm's own samplers have
            # none, and no state but the random key, which is not to become a long chain.
            mx.async_eval([tokens, *step.logits] if step.is_programs else mx.random.state)  # type: ignore[no-untyped-call]
        shape = shape or step.hidden[-1].shape[:1]
        if tokens.size == math.prod(shape):
            shape = tokens.shape
        else:
            if not self.is_worker and not step.errors:
                text = (
                    f"A sampler gave ids of shape {tokens.shape} where {shape} were to be sampled."
                )
                step.errors[step.calls] = ValueError(text)
            tokens = mx.zeros(shape, mx.uint32)
        word = FAILED + next(iter(step.errors)) % FAILED_CALLS if step.errors else FINE
        # On the CPU's stream, where the collective is: a GPU is waited for once, as for upstream's
        # broadcast.
        with mx.stream(mx.cpu):
            if self.is_worker or step.errors:
                # Made anew: `mx.depends` of an array that has been computed runs on the GPU.
                ids = mx.array([0] * tokens.size, mx.uint32)
            else:
                ids = tokens.flatten().astype(mx.uint32)
            note = mx.array([word, self._prompt], mx.uint32)
            parts = [ids, note, *(draft.astype(mx.uint32) for draft in drafts)]
            # A worker waits for its own sends and for nothing else. Rank 0 waits for what it
            # receives, and for collectives in processed logits: its ids need not come from them.
            first = step.hidden if self.is_worker else [*step.hidden, *step.logits]
            mine = mx.depends(mx.concatenate(parts), first)
        step.hidden, step.logits = [], []
        self._wait_on_host()
        args, options = step.gather
        # On the stream that upstream's sends and receives take too: their order is the protocol.
        everyone = self.last = mx.distributed.all_gather(mine, *args, **options)
        share = Share(everyone, tokens.size, mine.size, step)
        self.shares.append(share)
        self._steps, self._batch, self._prompt = self._steps + 1, tokens.size, 0
        if step.errors and all(note.word != FINE for note in share.notes()):
            self._leave(step, share.notes()[0].word)
        # Where only this rank has failed it goes on with the step: all ranks must take the same
        # number of shares, and the others learn of it when they look at this one.
        if not self.is_worker and self.stage is not None:
            # Rank 0 goes on with its own ids; `finish` waits for the exchange. In a loop of one's
            # own it is who looks at the ids that waits, lest rank 0 exits before that.
            mx.async_eval(everyone)  # type: ignore[no-untyped-call]
            return tokens
        with mx.stream(mx.cpu) if waits_by_spinning() else nullcontext():
            ids = everyone[: tokens.size]
            # A lost peer leaves random memory in the place of its ids, and on a CPU embedding that
            # would end this process before MLX raises.
            if step.vocabulary and mx.default_device() == mx.cpu:
                ids = mx.minimum(ids, step.vocabulary - 1)
            self._ids = ids.reshape(shape).astype(tokens.dtype)
        return self._ids

    def goes_on(self, step: Step) -> None:
        """The ids of `step` are shared, and further ones of its forward pass are to be sampled."""
        assert self.last is not None
        self.step = Step([self.last], step.gather, step.vocabulary, is_programs=True)
        self.step.key = random_key()

    def check(self, in_flight: int) -> None:
        """Raise on all ranks if rank 0 has failed, before its ids are given out.

        Args:
            in_flight: how many of the last shares are not to be waited for.
        """
        if not self.is_worker and not self.has_errors():
            in_flight += 2  # rank 0 has nothing to wait for: what it looks at is there by then
        while len(self.shares) > in_flight:
            share = self.shares.popleft()
            notes, step = share.notes(), share.step
            _compare_prompts(notes)
            if notes[0].word != FINE:
                self._leave(step, notes[0].word)
            if step.errors and not self._has_warned:
                self._has_warned = True
                log.warning(
                    "A sampler or a logits processor failed on this rank only, where the logits "
                    "are NaN (%r). That changes nothing: the tokens are rank 0's.",
                    next(iter(step.errors.values())),
                )

    def _leave(self, step: Step, word: int) -> NoReturn:
        """Raise the error of the call that failed on rank 0; `mx.random` is what it was there.

        Args:
            step: the step in which it failed.
            word: rank 0's of that step.
        """
        error = step.errors.get(word % FAILED_CALLS)
        if self.is_worker and step.key is not None:
            key: Any = step.key.tolist()
            mx.random.seed(key[0] << 32 | key[1])
        self.shares.clear()
        self.has_failed = True
        raise error or next(iter(step.errors.values()), None) or RuntimeError(FAILED_ON_RANK_0)

    def has_errors(self) -> bool:
        """Whether a function of the program's has failed here, and no rank has left for it yet."""
        return bool(self.step.errors) or any(share.step.errors for share in self.shares)

    def finish(self, stream: Any) -> None:
        """Wait for the last step, so that no rank leaves while another is still sending.

        mlx-lm's loops have a step in flight when they return.

        Args:
            stream: what the loop computes on.
        """
        if self.last is not None:
            with self.watched():
                mx.eval(self.last)
                self.last = None
                mx.synchronize(stream)
            for share in self.shares:
                _compare_prompts(share.notes())


class Note(NamedTuple):
    """What a rank gives in a share beside its ids."""

    word: int
    """`FINE`, or `FAILED` and the number of a call."""
    prompt: int
    """The checksum of its prompt in the first share of a generation, then 0."""
    drafts: list[int]
    """The ids that its draft model has proposed in this step (speculation.py)."""


class Share(NamedTuple):
    """A token share in flight: of each rank its ids and its note."""

    everyone: mx.array
    size: int
    """How many ids a rank gives."""
    width: int
    """How many numbers a rank gives, with those of its note."""
    step: Step

    def notes(self) -> list[Note]:
        """The note of each rank. Waits for them.

        Raises:
            RuntimeError: if a rank has sent something else.
        """
        # No operation of MLX, which would wait behind the step that has been begun since then.
        numbers: Any = self.everyone.tolist()
        notes: list[Note] = []
        for start in range(0, len(numbers), self.width):
            word, prompt, *drafts = numbers[start + self.size : start + self.width]
            if word != FINE and word // FAILED_CALLS != FAILED // FAILED_CALLS:
                raise RuntimeError(NO_SHARE.format(len(notes)))
            notes.append(Note(word, prompt, drafts))
        return notes


def _compare_prompts(notes: list[Note]) -> None:
    others = [str(rank) for rank, note in enumerate(notes) if note.prompt != notes[0].prompt]
    if others:
        log.warning(OTHER_PROMPT.format(" and ".join(others)))


def not_computed(array: mx.array) -> mx.array:
    """In the place of `array`, without its memory: NaN, or zeros where its type has no NaN.

    NaN since a number that was never computed must not look like one; in full shape since MLX
    checks no bounds and every rank indexes its logprobs by token.
    """
    is_float = mx.issubdtype(array.dtype, mx.inexact)
    one = mx.array(float("nan") if is_float else 0, array.dtype)
    return mx.contiguous(mx.broadcast_to(one, array.shape))  # for who reads its buffer


def waits_by_spinning() -> bool:
    """Whether this GPU waits for a CPU's result in a kernel that spins: on CUDA.

    Two GPUs stood still with such kernels, and were slower with them. So there a worker's calling
    thread waits instead, with the next step built, and not begun.
    """
    return mx.default_device() == mx.gpu and not mx.metal.is_available()


def random_key() -> mx.array:
    """The key that `mx.random` draws from next."""
    state: Any = mx.random.state
    return state[0]  # type: ignore[no-any-return]
