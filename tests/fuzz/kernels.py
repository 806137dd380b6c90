"""Tuned kernels for the fuzzers: a table as a package has one, compiled once, and what its kernels serve."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from mctune.backends.tvm import TvmBackend
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.runtime.kernels.table import Entry, Table

WIDTHS = 3, 5
"""Dk and Dv: no kernel's own widths, so that what they pad is met too."""
_LINEAR = Problem(T=40, B=2, H=2, Dk=WIDTHS[0], Dv=WIDTHS[1], segment_length=4)
_SWLA = _LINEAR.replace(recurrence="swla", aggregation="ssc", state_init="checkpoint", top_k=2)
_PASSES = ("forward", "backward", "decode")


def table(folder: Path) -> Table:
    """Kernels of every pass of the two problems."""
    backend, target, entries = TvmBackend(), resolve("cpu")[0], []
    for base in (_LINEAR, _SWLA):
        for pass_ in _PASSES:
            problem = base.replace(pass_=pass_)
            space = backend.space(problem)
            config = space.first_valid(lambda c, s=space, p=problem: s.valid(c, p, target))
            assert config is not None
            built = backend.build(problem, config, target, folder)
            record = {"problem": problem.to_dict(), "config": config.to_dict()}
            entries.append(Entry(problem.to_dict(), "tvm", built.library, record))
    return Table(tuple(entries))


def call_served(draw: random.Random) -> dict[str, Any]:
    """Options of ``memory_caching`` that the kernels serve, and the widths."""
    base = draw.choice((_LINEAR, _SWLA))
    names = ("recurrence", "aggregation", "state_init")
    return {"widths": WIDTHS} | {name: getattr(base, name) for name in names}


def layer_served(draw: random.Random) -> dict[str, Any]:
    """Options of a layer that the kernels serve."""
    given = call_served(draw)
    Dk, Dv = given.pop("widths")
    return given | {"head_dim": Dk, "expand_v": Dv / Dk, "memory_residual": False, "backend": "auto"}
