"""The gates of a workload, which are no normal numbers: a safetensors file, the same bytes each time."""

from __future__ import annotations

import array
import json
import random
import sys
from math import prod

from mctune.core.problem import Problem

_RANGES = {"g": (-0.2, 0.0), "beta": (0.0, 1.0), "lam": (0.5, 1.5)}
"""Between what values a gate is drawn, evenly."""


def gates_file(problem: Problem, identity: str) -> bytes:
    """The bytes of a safetensors file with each gate of the problem, float32; its numbers follow from ``identity``."""
    shape = [problem.B, problem.H] if problem.pass_ == "decode" else [problem.B, problem.T, problem.H]
    header, parts, end = {}, [], 0
    for name in problem.writes.gates:
        draw = random.Random(f"{identity} {name}")
        low, high = _RANGES[name]
        numbers = array.array("f", (low + (high - low) * draw.random() for _ in range(prod(shape))))
        if sys.byteorder == "big":
            numbers.byteswap()
        parts.append(numbers.tobytes())
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *parts))
