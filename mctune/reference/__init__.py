"""The oracle: Memory Caching (arXiv:2602.24281) token by token in float64, the judge of every kernel."""

from __future__ import annotations

from mctune.reference.aggregation import Cache
from mctune.reference.compare import error_ratio
from mctune.reference.oracle import memory_caching, segment_states

__all__ = ["Cache", "error_ratio", "memory_caching", "segment_states"]
