"""All that the command line takes of weights from the core, beside its public names and tables."""

from __future__ import annotations

from ..dead_weights import dead, is_pending, part, size_of
from ..fetching import unpatched, weight_map

__all__ = ["dead", "is_pending", "part", "size_of", "unpatched", "weight_map"]
