"""For a generation loop of the user's own: `rank_zero_head` and `share_tokens`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from .. import config
from ..patching.registry import during
from .sharing import Run


class _Own(threading.local):
    run: Run | None = None


_own = _Own()


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
    with during(run=_own_run()):
        yield


def share_tokens(tokens: mx.array) -> mx.array:
    """Give every rank rank 0's tokens, with one collective; for a loop of your own.

    All ranks must call it after each step, whether the plugin is on or off. The exchange begins at
    once, whether its result is used or not. On one rank it gives `tokens` itself. It also shares
    any other choice of rank 0's that is an array of integers.

    Args:
        tokens: ids, integers of any shape, which must be the same on all ranks. Only rank 0's ids
            count. They are computed on every rank: other ranks may take part in that.

    Returns:
        Rank 0's ids, in the shape and type of `tokens`, on every rank.

    Raises:
        TypeError: if `tokens` is no array of integers.
    """
    if not isinstance(tokens, mx.array) or not mx.issubdtype(tokens.dtype, mx.integer):
        given = tokens.dtype if isinstance(tokens, mx.array) else type(tokens).__name__
        raise TypeError(f"share_tokens() takes an array of token ids, integers, not {given}.")
    if mx.distributed.init().size() == 1:
        return tokens
    if tokens.itemsize == 8:  # a share has numbers of 4 bytes
        halves = share_tokens(tokens.flatten().view(mx.uint32))
        return halves.view(tokens.dtype).reshape(tokens.shape)
    run = _own_run()
    run.step.hidden = run.step.hidden or [tokens]
    run.step.is_programs = True
    shared = run.share(tokens, tokens.shape)
    run.shares.clear()
    mx.async_eval(shared)  # type: ignore[no-untyped-call]
    return shared


def _own_run() -> Run:
    if _own.run is None:
        _own.run = Run(None, mx.distributed.init().rank())
    return _own.run
