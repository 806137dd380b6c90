"""How much what is known of one problem, or of one machine, says about another: a distance.

Of problems: 1/4 for each factor of 2 in T and in B H, 1/2 in the segment length, Dk, Dv, the expansion, the inner chunk
and top_k; 1 for each trait in which the aggregations differ, and for another recurrence of the family; 1/2 for another
segmentation or state init; 1/4 for another dtype that is as wide, 2 for one of another width.

Of machines: 1/4 for each factor of 2 in the cores of a CPU, and 1/2 if its instruction set is another; of GPUs 1/2 for
another one of the architecture, 1 for another architecture of the vendor.

Another pass, family of memories or vendor is no neighbour at all.
"""

from __future__ import annotations

import math

from mctune.core.known import Machine
from mctune.core.problem import Problem

_TRAITS = ("routed", "sparse", "averages", "mixes_parameters")
_BY_HALVES = ("Dk", "Dv", "segment_length", "expansion", "inner_chunk", "top_k")


def distance(here: Problem, there: Problem) -> float | None:
    """How far apart two problems are, by the module's terms; ``None`` if one's kernels say nothing about the other's.

    Examples:
        >>> here = Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=256)
        >>> distance(here, here.replace(T=16384)), distance(here, here.replace(pass_="backward"))
        (0.5, None)
    """
    if (here.pass_, here.writes.family) != (there.pass_, there.writes.family):
        return None
    away: float = 0.25 * (doublings(here.T, there.T) + doublings(here.B * here.H, there.B * there.H))
    for name in _BY_HALVES:
        one, other = getattr(here, name), getattr(there, name)
        away += 0.5 * (doublings(one, other) if one and other else one != other)
    away += sum(getattr(here.reads, trait) != getattr(there.reads, trait) for trait in _TRAITS)
    away += here.recurrence != there.recurrence
    away += 0.5 * ((here.segmentation != there.segmentation) + (here.state_init != there.state_init))
    if here.dtype != there.dtype:
        away += 2.0 if "float32" in (here.dtype, there.dtype) else 0.25
    return away


def between(here: Machine, there: Machine) -> float | None:
    """How far apart two machines are; ``None`` for another vendor's, and between a CPU and a GPU.

    Examples:
        >>> between(Machine("h100-sxm", arch="sm_90"), Machine("a100-80g", arch="sm_80"))
        1.0
    """
    if here.kind != there.kind:
        return None
    if here.kind == "cpu":
        return 0.25 * doublings(here.cores or 1, there.cores or 1) + 0.5 * (here.arch != there.arch)
    if here.name == there.name:
        return 0.0
    return 0.5 if here.arch == there.arch else 1.0


def doublings(one: float, other: float) -> float:
    """How many factors of 2 are between two sizes."""
    return abs(math.log2(one / other))
