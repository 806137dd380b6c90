"""The small files of a repository for the `kernels` library, as they are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mctune.core.problem import Problem

OPS = '''"""The operators of this kernel, in a namespace that no other kernel and no other version of this one has."""

import torch

from .runtime.kernels.dispatch import NAMESPACE

ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The operator's full name: the namespace, two colons, the name."""
    return f"{NAMESPACE}::{op_name}"
'''
LAYERS = '''"""Layers whose forward can take the place of another layer's; see README.md."""

from .runtime.api.layers import MemoryCachingCore

__all__ = ["MemoryCachingCore"]
'''
IMPORTS = """from . import layers  # noqa: E402
from ._ops import add_op_namespace_prefix, ops  # noqa: E402
"""
EXPORTED = ("add_op_namespace_prefix", "layers", "ops")
ONE_DOWN = '''"""The kernel itself, for versions of `kernels` that look for it one folder down."""

import importlib.util as _util
import json as _json
import os as _os
import sys as _sys

_folder = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
with open(_os.path.join(_folder, "metadata.json"), encoding="utf-8") as _file:
    _name = _json.load(_file)["id"]
if _name not in _sys.modules:
    _spec = _util.spec_from_file_location(_name, _os.path.join(_folder, "__init__.py"))
    _sys.modules[_name] = _util.module_from_spec(_spec)
    try:
        _spec.loader.exec_module(_sys.modules[_name])
    except BaseException:
        del _sys.modules[_name]
        raise
__all__ = _sys.modules[_name].__all__
globals().update({name: getattr(_sys.modules[_name], name) for name in __all__})
'''
_BENCHMARK = '''"""The tuned kernels beside the PyTorch path: `kernels benchmark` runs this.

A workload is a problem that was tuned; one of a backward pass is a forward and a backward. Both paths are held to each
other first, in units of four times the RMS of the PyTorch path's result.
"""

import torch
from kernels.benchmark import Benchmark
from torch.nn.functional import normalize, softplus

PROBLEMS = {{
{problems}
}}
GATES = {{
    "g": lambda x: -0.05 * softplus(x),
    "beta": lambda x: 0.1 * x.sigmoid(),
    "lam": lambda x: x.sigmoid(),
    "eta": lambda x: 0.02 * x.sigmoid(),
    "mu": lambda x: 0.5 * x.sigmoid(),
}}


def inputs(B, T, H, Dk, Dv, E, dtype, gates, options, device):
    """Arguments of memory_caching: unit keys, queries and connectors, normal values, and what the memory takes."""
    made = {{name: normalize(torch.randn(B, T, H, Dk, device=device), dim=-1) for name in ("q", "k", "u")}}
    made["v"] = torch.randn(B, T, H, Dv, device=device)
    made = {{name: x.to(getattr(torch, dtype)) for name, x in made.items()}}
    made |= {{name: GATES[name](torch.randn(B, T, H, device=device)) for name in gates}}
    if E:
        made["W_up"] = torch.randn(H, Dk, E, device=device) * Dk**-0.5
        made["W_down"] = torch.randn(H, E, Dv, device=device) * E**-0.5
    return made | options


class MemoryCachingBenchmark(Benchmark):
    """One workload for each of PROBLEMS."""

    seed = 0

    def prepare(self, problem):
        self.backward = problem["backward"]
        self.call = inputs(*(problem[name] for name in (
            "B", "T", "H", "Dk", "Dv", "E", "dtype", "gates", "options")), self.device)  # fmt: skip
        self.call["q"].requires_grad_(self.backward)
        self.dy = torch.randn_like(self.call["v"])

    def run(self, backend):
        y = self.kernel.memory_caching(**self.call, backend=backend)
        return torch.autograd.grad(y, self.call["q"], self.dy)[0] if self.backward else y

    def measure(self):
        self.found = self.run("auto")

    def verify(self):
        expected = self.run("eager").detach().float()
        unit = 4 * expected.square().mean().sqrt()
        self.out = self.found.detach().float() / unit
        return expected / unit


def _add(name, problem):
    setattr(MemoryCachingBenchmark, f"setup_{{name}}", lambda self: self.prepare(problem))
    setattr(MemoryCachingBenchmark, f"benchmark_{{name}}", lambda self: self.measure())
    setattr(MemoryCachingBenchmark, f"verify_{{name}}", lambda self: self.verify())


for _name, _problem in PROBLEMS.items():
    _add(_name, _problem)
'''
_OPTIONS = ("recurrence", "aggregation", "segmentation", "segment_length", "state_init", "top_k", "inner_chunk")


def benchmark(tables: Sequence[dict[str, Any]]) -> str:
    """The script ``benchmarks/benchmark.py`` for the problems of tuned tables.

    A decoding kernel reads a cache that a prompt has filled; its problem is measured as the prompt.
    """
    problems = [Problem.from_dict(entry["problem"]) for table in tables for entry in table["entries"]]
    named: dict[str, dict[str, Any]] = {}
    for problem in problems:
        if problem.segmentation == "packed":
            problem = problem.replace(segmentation="constant")
        if problem.pass_ == "decode":
            problem = problem.replace(pass_="forward")
        named[re.sub(r"\W+", "_", str(problem))] = _described(problem)
    return _BENCHMARK.format(problems="\n".join(f"    {name!r}: {named[name]!r}," for name in sorted(named)))


def _described(problem: Problem) -> dict[str, Any]:
    sizes = {name: getattr(problem, name) for name in ("B", "T", "H", "Dk", "Dv", "E", "dtype")}
    options = {name: getattr(problem, name) for name in _OPTIONS}
    if problem.deep:
        options["memory_residual"] = problem.Dk == problem.Dv
    return sizes | {
        "backward": problem.pass_ == "backward",
        "gates": list(problem.writes.gates),
        "options": {name: value for name, value in options.items() if value is not None},
    }
