"""Which templates make a pass on a GPU, and the parameters that each is built with."""

from __future__ import annotations

import importlib
from typing import Any

from mctune.backends.tvm.templates import templates_package
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import Target

OPERATIONS = {
    ("matrix", "forward"): ("segment_states", "gates", "read_forward"),
    ("matrix", "backward"): (
        *("segment_states", "gates", "read_backward", "gates_backward", "state_backward", "write_backward"),
    ),
    ("matrix", "decode"): ("decode_step",),
}
"""By family and pass; gates only where they are learned."""
PARAMETERS = {
    "segment_states": ("instruction", "states_"),
    "gates": ("instruction", "gates_", "states_BT"),
    "read_forward": ("instruction", "formulation", "read_"),
    "read_backward": ("instruction", "dq_"),
    "gates_backward": ("dgates_", "states_BT"),
    "state_backward": ("instruction", "dstates_"),
    "write_backward": ("instruction", "dkv_"),
    "decode_step": ("decode_BV",),
}
"""What the names of the parameters begin with that an operation is built with."""


def operations(problem: Problem) -> tuple[str, ...]:
    """The operations of a problem, in order."""
    every = OPERATIONS[problem.writes.family, problem.pass_]
    return tuple(name for name in every if problem.routed or not name.startswith("gates"))


def parameters(operation: str, config: Config) -> dict[str, Any]:
    """Those of a configuration that the operation is built with."""
    return {name: value for name, value in config.to_dict().items() if name.startswith(PARAMETERS[operation])}


def build_kernels(operation: str, problem: Problem, config: Config, target: Target) -> list[Any]:
    """The kernels of an operation: ``templates.tvm.gpu.kernel.Kernel``."""
    templates_package()
    template = importlib.import_module(f"mctune_templates.tvm.gpu.{problem.writes.family}.{operation}")
    found: list[Any] = template.build(problem, config, target)
    return found
