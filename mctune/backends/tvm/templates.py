"""Find the TVM templates, and turn a problem and a configuration into an IRModule."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from functools import cache
from types import ModuleType
from typing import Any

from mctune.backends.spaces import load_space
from mctune.core.config import Config
from mctune.core.paths import templates_dir
from mctune.core.problem import Problem
from mctune.core.target import Target
from mctune.runtime.kernels.tvm.arguments import ARGUMENTS
from mctune.runtime.traits import alike

OPERATIONS = {
    ("matrix", "forward"): ("segment_states", "read_forward"),
    ("matrix", "backward"): ("segment_states", "read_backward", "state_backward", "write_backward"),
    ("matrix", "decode"): ("decode_step",),
    ("deep", "forward"): ("deep_write", "deep_read"),
    ("deep", "backward"): (
        *("deep_write", "deep_gates", "deep_mix_backward", "deep_read_backward", "deep_write_backward"),
        "deep_gates_backward",
    ),
    ("deep", "decode"): ("deep_decode",),
}
"""The templates of each family and pass; one exported library holds them all."""
_PREFIXES = {"read_backward": "dq_", "state_backward": "dstates_", "write_backward": "dkv_"}
"""What the names of an operation's own parameters begin with in a configuration; the template knows them without."""


def templates_package() -> ModuleType:
    """The folder of templates, importable as a package wherever it stands."""
    name, folder = "mctune_templates", templates_dir()
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@cache
def source_hash() -> str:
    """SHA-256 of every TVM template, so that a change to one is a new kernel."""
    digest = hashlib.sha256()
    for path in sorted((templates_dir() / "tvm").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_arguments(operation: str, function: Any) -> None:
    """Hold a ``PrimFunc`` to the order in which launchers pass its arguments.

    Raises:
        TypeError: naming both orders.
    """
    takes = tuple(parameter.name for parameter in function.params)
    if takes != ARGUMENTS[operation]:
        raise TypeError(f"{operation} takes {', '.join(takes)}, and is passed {', '.join(ARGUMENTS[operation])}")


def parameters(operation: str, config: Config) -> Config:
    """What the template of an operation is given of a configuration, which has no more than what it reads."""
    prefix = _PREFIXES.get(operation)
    if prefix is None:
        return config
    own = {name.removeprefix(prefix): value for name, value in config.items if name.startswith(prefix)}
    return config.replace(**own)


def function_of(operation: str, problem: Problem, config: Config, target: Target) -> Any:
    """The ``PrimFunc`` of an operation, ``None`` where the configuration fuses it into another one.

    ``problem`` has padded widths, and ``config`` what the operation reads.
    """
    # One computation has one kernel, whatever the aggregation is called.
    problem = problem.replace(aggregation=alike(problem.aggregation, problem.writes.family))
    templates_package()
    template = importlib.import_module(f"mctune_templates.tvm.{problem.writes.family}.{operation}")
    function = template.build(problem, parameters(operation, config), target)
    if function is not None:
        check_arguments(operation, function)
    return function


def render(problem: Problem, config: Config, target: Target) -> Any:
    """The ``tvm.IRModule`` of a pass; ``problem`` has padded widths."""
    import tvm

    space = load_space("tvm", problem.writes.family, problem.pass_)
    functions = {}
    for operation in OPERATIONS[problem.writes.family, problem.pass_]:
        function = function_of(operation, problem, space.seen_by(operation, config), target)
        if function is not None:
            functions[operation] = function
    return tvm.IRModule(functions)
