"""Parameters and constraints that the spaces of TVM's passes on a GPU share."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Choice, Constraint, Int, Param, Pow2, SearchSpace
from mctune.core.target import Target

INSTRUCTIONS = ("simt", "m8n8k4", "m16n8k8", "m16n8k16")
INSTRUCTION = Choice("instruction", INSTRUCTIONS, "that multiplies: float32 lanes, or matrix units")
THROUGH_SHARED = ("simt", "m8n8k4")
"""Instructions whose sums are no operands as they are: they go through shared memory."""
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


PIECE = Pow2("piece", 64, 512, "tokens that a segment is cut into; products inside a piece grow with its square")
STATES = (
    Pow2("states_warps", 2, 8),
    Int("states_rows", (16, 32), "key columns of a warp"),
    Pow2("states_BT", 16, 64, "tokens of a step of a state's sum"),
    Pow2("states_BV", 32, 128, "value columns of a state's tile"),
)
GATES = (
    Pow2("gates_warps", 2, 8),
    Int("gates_rows", (16, 32), "tokens of a warp"),
    Pow2("gates_BN", 16, 64, "segments of a tile of logits"),
)


def walk(prefix: str) -> tuple[Param, ...]:
    """Parameters of a pass over cached states that come after its tile."""
    return (
        Int(f"{prefix}_stages", (1, 2), "states in shared memory: the one that is read, and the next"),
        Choice(f"{prefix}_prefetch", PREFETCH, "where the next state is meanwhile"),
    )


INSTRUCTION_RULE = Constraint("instruction", instruction, "the GPU has another instruction for this dtype")


def _longest(problem: Problem) -> int:
    """Tokens of the longest segment."""
    return problem.segment_length or 1 << problem.T.bit_length() - 1


PIECE_RULE = Constraint(
    "piece",
    lambda c, p, t: c["piece"] == 64 or c.integer("piece") < 2 * _longest(p),
    "a piece longer than a segment is the segment",
)


def narrow(name: str, width: str, what: str = "state") -> Constraint:
    """Tiles no wider than the state, but for the narrowest."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return config[name] == 32 or config.integer(name) < 2 * stored(getattr(problem, width))

    return Constraint(name, holds, f"the tile would be wider than the {what}")


def sums_of_states(prefix: str) -> tuple[Constraint, ...]:
    """Of a sum of outer products: warps have rows, no tile is wider than the state, and a thread holds its part."""

    def rows(config: Config, problem: Problem, target: Target) -> bool:
        return config.integer(f"{prefix}_warps") * config.integer(f"{prefix}_rows") <= max(32, stored(problem.Dk))

    def part(config: Config, problem: Problem, target: Target) -> bool:
        columns = min(config.integer(f"{prefix}_BV"), stored(problem.Dv))
        return config.integer(f"{prefix}_rows") * columns // 32 <= 64

    return (
        Constraint(f"{prefix} rows", rows, "warps would have no row of the state"),
        narrow(f"{prefix}_BV", "Dv"),
        Constraint(f"{prefix} registers", part, "the sums of a state would spill"),
    )


def measuring(space: SearchSpace) -> SearchSpace:
    """The space where candidates are measured: newer GPUs run the instructions of older ones."""
    older = Constraint(INSTRUCTION_RULE.name, instruction_or_older, INSTRUCTION_RULE.reason)
    return replace(space, constraints=tuple(older if one is INSTRUCTION_RULE else one for one in space.constraints))


def size_of(problem: Problem) -> int:
    """Bytes of a number."""
    return 4 if problem.dtype == "float32" else 2


Shared = Callable[[Config, Problem], int]
"""Bytes of shared memory of a block of an operation."""


def read_shared(config: Config, problem: Problem, prefix: str, inner: int, columns: int, state: tuple[int, int]) -> int:
    """Bytes of shared memory of a block that reads states, or of its gradient.

    Args:
        inner: the stored width of what multiplies states; columns: of what is read.
        state: rows and columns of the part of a state.
    """
    size, high = size_of(problem), config.integer(f"{prefix}_warps") * config.integer(f"{prefix}_rows")
    BJ = config.integer(f"{prefix}_BJ")
    own = tile(BJ, inner, size) + tile(BJ, columns, size)
    if config["instruction"] in THROUGH_SHARED:
        own += tile(high, BJ, size)
    return tile(high, inner, size) + max(own, tile(state[0] * config.integer(f"{prefix}_stages"), state[1], size))


def states_shared(prefix: str) -> Shared:
    """Of a block that has part of a sum of outer products."""

    def bytes_(config: Config, problem: Problem) -> int:
        keys = config.integer(f"{prefix}_warps") * config.integer(f"{prefix}_rows")
        BT, BV = config.integer(f"{prefix}_BT"), min(config.integer(f"{prefix}_BV"), stored(problem.Dv))
        return tile(BT, keys, size_of(problem)) + tile(BT, BV, size_of(problem))

    return bytes_


def gates_shared(config: Config, problem: Problem) -> int:
    """Of a block that computes gates; means of keys are two numbers each if keys are of 16 bits."""
    BT, BN = config.integer("gates_warps") * config.integer("gates_rows"), config.integer("gates_BN")
    SK, size = stored(problem.Dk), size_of(problem)
    means = tile(BN, SK, size) * (4 // size)
    return tile(BT, SK, size) + max(means + tile(BN, BT, 4) + 4 * BT, tile(16, SK, 4))


def fits(needed: Mapping[str, Shared]) -> Constraint:
    """Blocks of every operation have the shared memory that they need."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return all(bytes_(config, problem) <= target.shared_bytes for bytes_ in needed.values())

    return Constraint("shared memory", holds, "a block of the GPU has less shared memory")


def words_ahead(config: Config, problem: Problem, prefix: str, state: tuple[int, int]) -> int:
    """32-bit registers of a thread that hold its share of the next part of a state, of so many rows and columns."""
    if config[f"{prefix}_prefetch"] != "registers":
        return 0
    return state[0] * state[1] * size_of(problem) // (4 * 32 * config.integer(f"{prefix}_warps"))


def unused(prefix: str, default: Config) -> Constraint:
    """Parameters of an operation that equal gates do without keep one value."""
    names = [name for name in default.to_dict() if name.startswith(f"{prefix}_")]

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return problem.routed or all(config[name] == default[name] for name in names)

    return Constraint(f"{prefix}_*", holds, f"there is no {prefix} kernel to tune")


def tile(rows: int, width: int, size: int) -> int:
    """Bytes of a matrix in shared memory, with the room after each row."""
    return rows * (width * size + 16)
