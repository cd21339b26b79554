"""All that the command line takes of weights from the core, beside its public names and tables."""

from __future__ import annotations

from ..weights.fetching import weight_map
from ..weights.on_disk import is_pending, part, size_of, unused

__all__ = ["is_pending", "part", "size_of", "unused", "weight_map"]
