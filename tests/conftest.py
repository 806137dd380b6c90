"""One hypothesis profile for every test: few examples, the same ones in each run, no stop-watch."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("mctune", max_examples=10, deadline=None, derandomize=True, database=None)
settings.load_profile("mctune")
