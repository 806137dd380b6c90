"""Constraints that the spaces of a GPU's passes share, of either family."""

from collections.abc import Callable

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Constraint
from mctune.core.target import Target

MANY = "only the products of sm_90 spread over so many warps"


def power(value: int) -> int:
    """The next power of two that products take."""
    return max(16, 1 << (value - 1).bit_length())


def longest(problem: Problem) -> int:
    """Tokens of the longest segment, as a piece holds them."""
    return power(problem.segment_length or 1 << problem.T.bit_length() - 1)


def unused(
    prefix: str,
    default: Config,
    names: tuple[str, ...],
    used: Callable[[Config, Problem], bool] = lambda c, p: p.routed,
) -> Constraint:
    """Parameters of an operation that a configuration does without keep one value: equal gates do without some."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return used(config, problem) or all(config[f"{prefix}_{name}"] == default[f"{prefix}_{name}"] for name in names)

    return Constraint(f"{prefix}_*", holds, f"there is no {prefix} kernel to tune")


def at_most(name: str, default: Config, limit: Callable[[Config, Problem], int], reason: str) -> Constraint:
    """One value of many that are cut down to the same, the default's, stays."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        return config.integer(name) <= limit(config, problem) or config[name] == default[name]

    return Constraint(name, holds, reason)


def operands(prefix: str, rows: str, width: Callable[[Problem], int]) -> Callable[[Config, Problem, Target], bool]:
    """A program keeps its rows as operands of products: float32 takes most of the registers."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        if problem.dtype != "float32" or config[f"{prefix}_{rows}"] == 16:
            return True
        size = config.integer(f"{prefix}_{rows}") * power(width(problem))
        return size <= 512 * config.integer(f"{prefix}_num_warps")

    return holds


def lists(config: Config, problem: Problem, target: Target) -> bool:
    """A tile of logits keeps the best at each of its places: in 128 registers a thread, or by the most warps."""
    places, warps = config.integer("gates_BN"), config.integer("gates_num_warps")
    segments = -(-problem.T // (problem.segment_length or problem.T))
    kept = 1 << (min(problem.top_k or 1, -(-segments // places)) - 1).bit_length()
    return not problem.reads.sparse or warps == 8 or 2 * kept * config.integer("gates_BT") * places <= 4096 * warps


def state_and_keys(config: Config, problem: Problem, target: Target) -> bool:
    """Where products are in flight, linear memories of 16 bits add up keys by products with 64 rows of ones."""
    keys = min(config.integer("states_BK"), power(problem.Dk))
    values = min(config.integer("states_BV"), power(problem.Dv))
    products = target.products_in_flight and not problem.writes.gated and problem.dtype != "float32"
    ones = 64 if products else 0
    threads = 32 * config.integer("states_num_warps")
    return keys * values <= 128 * threads and keys * (values + ones) <= 160 * threads
