"""Constraints that the spaces of TVM's passes on a GPU share."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint
from mctune.core.target import Target

INSTRUCTIONS = ("simt", "m8n8k4", "m16n8k8", "m16n8k16")
INSTRUCTION = Choice("instruction", INSTRUCTIONS, "that multiplies: float32 lanes, or matrix units")
_OWN = {"sm_70": "m8n8k4", "sm_75": "m16n8k8"}
"""What an architecture has; from sm_80 on it is the largest."""
_SINCE = {"m8n8k4": 70, "m16n8k8": 75, "m16n8k16": 80, "cp.async": 80}


def own(problem: Problem, target: Target) -> str:
    """The instruction that is an architecture's own for a problem's dtype."""
    return "simt" if problem.dtype == "float32" else _OWN.get(target.arch, "m16n8k16")


def instruction(config: Config, problem: Problem, target: Target) -> bool:
    return config["instruction"] == own(problem, target)


def instruction_or_older(config: Config, problem: Problem, target: Target) -> bool:
    """Newer GPUs run the instructions of older ones, slower."""
    name = str(config["instruction"])
    if name == own(problem, target):
        return True
    return problem.dtype == "float16" and _since(name, target)


def stored(width: int) -> int:
    """The width of a state in memory."""
    return -(-width // 16) * 16


PREFETCH = ("none", "registers", "async")
"""Where the next state is, while one is read: still in memory, in registers, or on its way into shared memory."""


def _since(name: str, target: Target) -> bool:
    return int(target.arch.removeprefix("sm_")) >= _SINCE.get(name, 1000)


def ahead(prefix: str) -> tuple[Constraint, ...]:
    """Where states are, of a pass over them: ``stages`` in shared memory, ``prefetch``."""

    def one(config: Config, problem: Problem, target: Target) -> bool:
        return problem.routed or (config[f"{prefix}_stages"] == 1 and config[f"{prefix}_prefetch"] == "registers")

    def copied(config: Config, problem: Problem, target: Target) -> bool:
        if config[f"{prefix}_prefetch"] != "async":
            return True
        return config[f"{prefix}_stages"] == 2 and _since("cp.async", target)

    return (
        Constraint(f"{prefix}_stages", one, "one sum of states is read, and nothing after it"),
        Constraint(f"{prefix}_prefetch", copied, "copies to shared memory need sm_80, and room for a second state"),
    )


def unused(prefix: str, default: Config) -> Constraint:
    """Parameters of an operation that equal gates do without keep one value."""
    names = [name for name in default.to_dict() if name.startswith(f"{prefix}_")]

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return problem.routed or all(config[name] == default[name] for name in names)

    return Constraint(f"{prefix}_*", holds, f"there is no {prefix} kernel to tune")


def tile(rows: int, width: int, size: int) -> int:
    """Bytes of a matrix in shared memory, with the room after each row."""
    return rows * (width * size + 16)
