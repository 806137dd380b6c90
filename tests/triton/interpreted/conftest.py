"""Triton chooses its interpreter when it is imported: `make test` runs these tests in a process of their own."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
