"""All that the command line takes of weights from the core, beside its public names and tables."""

from __future__ import annotations

from ..weights.fetching import unpatched, weight_map
from ..weights.on_disk import is_pending, part, size_of, unused

__all__ = ["is_pending", "part", "size_of", "unpatched", "unused", "weight_map"]
