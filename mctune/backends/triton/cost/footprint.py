"""How large the arrays are that a launch of a Triton template touches, by its parameters' names."""

from __future__ import annotations

from mctune.backends.protocol import Launch
from mctune.backends.triton.cost.walk import Walk
from mctune.core.config import Config
from mctune.core.problem import Problem

_ITEM = {"i1": 1, "i8": 1, "fp8": 1, "bf16": 2, "fp16": 2, "i16": 2, "fp32": 4, "i32": 4, "fp64": 8, "i64": 8}
_KEYS = ("q", "k", "u", "dq", "dk", "du")
_VALUES = ("v", "y", "dy", "dv")
_PIECE_STATES = ("ends", "carried", "operand", "dends", "dentered", "products")
_SEGMENT_STATES = ("past", "dpast", "dstates", "states")
_SEGMENT_KEYS = ("means", "dmeans", "descriptors")
_PIECE_KEYS = ("sums", "pulls", "dk_lead", "dv_lead")
_GATE_ROWS = ("logits", "gammas", "dgamma", "dr")
_TOKENS = (
    "g", "beta", "lam", "cum", "now", "after", "lse", "own", "gate", "pull", "dg", "dbeta", "dlam", "diagonal", "tail",
    "ending", "own_logit", "eta", "mu",
)  # fmt: skip
_DEEP = ("W_up", "W_down", "partials", "error")
_HIDDEN = ("hidden", "z", "back")
_WEIGHTS = ("pairs", "state")
_LAYERS = {"up": 0, "up_operand": 0, "down": 1, "down_operand": 1}
_CHOICES = ("chosen", "picked", "order", "chosen_dr")
_IN_PLACE = {("step_kernel", "online"), ("connector_kernel", "dgamma")}
"""(kernel, parameter) of arrays that are read and written."""


def footprint(launch: Launch, problem: Problem, config: Config, cache: float = 0.0) -> float:
    """Bytes of the arrays that ``launch`` reads or writes, each once; arrays of unknown names count nothing.

    A launch that is one of several for shares of the heads and tokens has its share. What such launches leave for one
    another in at most ``cache`` bytes, counts nothing either.
    """
    walk = Walk(problem, config, dict(launch.values))
    heads, tokens = problem.B * problem.H, 1 if problem.pass_ == "decode" else problem.T
    if "first_head" in walk.values:
        whole = heads * tokens
        heads = launch.grid[1] * int(walk.values.get("together", 1))
        tokens = walk["span"] if "span" in walk.values else tokens // walk["blocks"]
        cache = cache if heads * tokens < whole else 0.0
    else:
        cache = 0.0
    total = 0.0
    for name, kind in launch.arguments:
        if kind.startswith("*"):
            size = _elements(name, walk, heads, tokens) * _ITEM.get(kind.lstrip("*k"), 4)
            total += 0.0 if name == "partial" and size <= cache else _times(launch.name, name, problem) * size
    return total


def _elements(name: str, walk: Walk, heads: int, tokens: int) -> float:
    p = walk.problem
    Dk, Dv = (-(-width // 16) * 16 for width in (p.Dk, p.Dv))
    top_k = min(p.top_k or 1, walk.segments)
    if name in _KEYS:
        return heads * tokens * p.Dk
    if name in _VALUES:
        return heads * tokens * p.Dv
    if name in _PIECE_STATES:
        return heads * len(walk.pieces) * Dk * Dv
    if name in _SEGMENT_STATES:
        # A decode step reads only the chosen states.
        read = min(top_k, walk.segments) if p.pass_ == "decode" and p.top_k else walk.segments
        return heads * read * Dk * Dv
    if name in _SEGMENT_KEYS:
        return heads * walk.segments * Dk
    if name in _PIECE_KEYS:
        return heads * len(walk.pieces) * Dk
    if name == "dgamma" and walk.has("formulation", "grouped"):
        return heads * tokens * top_k
    if name in _GATE_ROWS:
        # A token's row of logits ends with its own segment.
        rows = sum((past + 1) * (end - begin) for past, (begin, end) in enumerate(p.spans()))
        return heads * rows * tokens / p.T
    if name in _TOKENS:
        return heads * tokens
    if name in _CHOICES:
        return heads * tokens * top_k
    if p.deep and (name in _HIDDEN + _WEIGHTS + _DEEP or name in _LAYERS):
        return _of_deep(name, walk, heads, tokens)
    if name == "partial":
        return heads * tokens * top_k * (p.Dk if p.pass_ == "backward" else p.Dv)
    if name == "parts":
        return heads * tokens * (int(walk.values.get("SPLITS", 1)) + 1) * p.Dv
    return heads * Dk * Dv if name == "online" else 0.0


def _of_deep(name: str, walk: Walk, heads: int, tokens: int) -> float:
    """Of deep memories' arrays: rows of hidden units and their weights, layers of states, parts of reads."""
    p = walk.problem
    Dk, Dv, E = (-(-width // 16) * 16 for width in (p.Dk, p.Dv, p.E))
    if name in _HIDDEN:
        return heads * tokens * E
    if name in _LAYERS:
        return heads * walk.segments * E * (Dk, Dv)[_LAYERS[name]]
    if name == "error":
        return heads * tokens * Dv
    if name in _WEIGHTS:
        return heads * tokens if name == "state" else heads * tokens * _pairs(p) / p.T
    if name == "partials":
        parts = int(walk.values.get("parts", 0)) or (1 if p.writes.momentum else -(-E // walk["EB"]))
        return heads * tokens * p.Dv * parts
    return p.H * p.E * (p.Dk if name == "W_up" else p.Dv)


def _times(kernel: str, name: str, problem: Problem) -> float:
    """How often a kernel touches an array: once as a rule."""
    if (kernel, name) in _IN_PLACE:
        return 2.0
    if name == "pairs" and kernel == "write_rows_kernel":
        return 1 / (problem.inner_chunk or 1)  # the row in front of every chunk
    if name == "pairs" and kernel == "row_states_kernel":
        return problem.T / _pairs(problem)  # the last row of every segment
    return 1.0


def _pairs(problem: Problem) -> float:
    """Weights of every token for itself and those before it in its segment."""
    return sum((end - begin) * (end - begin + 1) / 2 for begin, end in problem.spans())
