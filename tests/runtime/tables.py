"""Tuned kernels of four problems, and calls that they serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from calls import make_call
from torch import Tensor

from mctune.backends.tvm import TvmBackend
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.runtime.call import Call
from mctune.runtime.kernels.table import Entry, Table
from mctune.verify.inputs import make_inputs

LINEAR = Problem(T=43, B=2, H=2, Dk=12, Dv=20, segment_length=16)
SWLA = LINEAR.replace(recurrence="swla", aggregation="ssc", state_init="checkpoint", top_k=1)
PACKED = LINEAR.replace(segmentation="packed", B=1)
LOGARITHMIC = LINEAR.replace(segmentation="logarithmic", segment_length=None)
DLA = Problem(recurrence="dla", T=11, H=2, Dk=4, Dv=4, segment_length=4, inner_chunk=2, expansion=2)
TITANS = DLA.replace(recurrence="titans", aggregation="soup", state_init="checkpoint", B=2)
TUNED = (LINEAR, SWLA, PACKED, LOGARITHMIC, DLA, TITANS)
"""What the kernels of :func:`build_table` serve."""
PROBLEM = {
    "recurrence": "linear", "aggregation": "grm", "segmentation": "constant", "state_init": "independent",
    "pass": "forward", "B": 1, "T": 1024, "H": 4, "Dk": 4, "Dv": 4, "segment_length": 4, "dtype": "float32",
}  # fmt: skip
"""The problem of a table's entry, for tests that launch nothing."""


def entry(name: str = "a", backend: str = "tvm", **changes: Any) -> Entry:
    """An entry for :data:`PROBLEM` or one like it."""
    return Entry(PROBLEM | changes, backend, Path(f"{name}.so"), {})


def tuned(problem: Problem, folder: Path, **changes: Any) -> Entry:
    """The entry of a kernel of the default configuration."""
    backend, target = TvmBackend(), resolve("cpu")[0]
    space = backend.space(problem)
    config = space.first_valid(lambda c: space.valid(c, problem, target))
    assert config is not None
    config = config.replace(**changes)
    built = backend.build(problem, config, target, folder)
    return Entry(problem.to_dict(), "tvm", built.library, {"problem": problem.to_dict(), "config": config.to_dict()})


def build_table(folder: Path) -> Table:
    """Forward and backward kernels of LINEAR and DLA, whose backward wants the states saved, and of two others."""
    entries = []
    for problem, saved in ((LINEAR, "states"), (SWLA, "nothing"), (DLA, "states"), (TITANS, "nothing")):
        entries += [tuned(problem, folder), tuned(problem.replace(pass_="backward"), folder, saved=saved)]
    return Table(tuple(entries))


def decode_table(folder: Path, problem: Problem) -> Table:
    """The decode kernel of a problem."""
    return Table((tuned(problem.replace(pass_="decode"), folder),))


def problem_id(problem: Problem) -> str:
    """A short name for a parametrised test."""
    return f"{problem.recurrence}-{problem.aggregation}-{problem.segmentation}"


def draw(problem: Problem, seed: int = 0, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The leaves of a call, in ``dtype`` if one is given, and its options."""
    arguments = make_inputs(problem, seed).arguments(problem)
    options = {name: x for name, x in arguments.items() if not isinstance(x, Tensor) or name == "cu_seqlens"}
    leaves = {name: x if dtype is None else x.to(dtype) for name, x in arguments.items() if name not in options}
    return leaves, options


def checked(leaves: dict[str, Tensor], options: dict[str, Any]) -> Call:
    """The call that ``memory_caching`` makes of them."""
    return make_call(**(options | leaves))
