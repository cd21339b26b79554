"""Pieces of programs that those of `programs` and of the fuzzer have in common."""

from __future__ import annotations

import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np


class Scaled(nn.Module):
    """A head in another one's clothes: no `weight`."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, x):
        return self.inner(x) * 1.5


def exchange(file: Path, ids: mx.array, rank: int) -> mx.array:
    """Rank 0's ids, by a new file for which the other ranks wait, but not for ever."""
    if rank == 0:
        part = file.with_suffix(".part")
        with part.open("wb") as written:
            np.save(written, np.array(ids))
        part.replace(file)
        return ids
    until = time.monotonic() + 20
    while not file.exists():
        if time.monotonic() > until:
            raise TimeoutError(file.name)
        time.sleep(0.0005)
    return mx.array(np.load(file))
