"""The read of a linear or SWLA Memory Caching layer on a GPU (Eq. 6-17).

    y_t = scale [ gamma_t^(s) q_t M_t + sum_{i < s} gamma_t^(i) q_t M^(i) ]

A block has a tile of tokens of one head, and some value columns; a warp has some of the tile's rows. The online memory
at t is what enters the piece and what its tokens up to t write. Cached states are read one after another: with learned
gates each by a product of its own, whose rows are weighed (``per_segment``), or by a product of weighed rows of q
(``gated``), so that all are added up where products are; residual and mean read the sum of the states instead.
"""

from typing import Any

from ..kernel import Kernel, kernel, pointers
from ..plan import Plan, plan_of
from .reading import READ, Reading

SPANS = ("begin", "end", "segment", "entering", "seg_first", "seg_last", "tiles")


def build(problem: Any, config: Any, target: Any) -> list[Kernel]:
    """The kernel of the read."""
    plan = plan_of(problem, config)
    stored = plan.number.stored
    arguments = pointers(stored, "q", "k", "v", "operand", "y")
    if plan.flags.gated:
        arguments |= pointers("float32", "cum", "now", "after", "before")
    arguments |= pointers("float32", "logits", "lse") if plan.flags.routed else pointers(stored, "past")
    arguments |= pointers("int32", *SPANS)
    arguments |= {"scale": "float32", **dict.fromkeys(("T", "H", "N", "P"), "int32")}
    name = "read_gated" if plan.flags.routed else "read_summed"
    return [kernel(name, plan["read_warps"], arguments, lambda x: _read(plan, x))]


def _read(plan: Plan, x: Any) -> None:
    work = Reading(plan, x, READ, "read", plan["read_BV"])
    work.online()
    if plan.flags.routed:
        _gated(work)
    else:
        work.read_past()
    work.store(x.y, x.scale)


def _gated(work: Reading) -> None:
    """Every cached state with a gate of its own."""
    plan, frag, acc = work.plan, work.frag, work.acc
    gates = work.gates()
    held_q = frag.hold(work.left, plan.SK) if plan["formulation"] == "gated" else None
    with work.cached(gates) as (_, gate, above):
        if held_q is not None:
            work.read_state(acc, above, frag.scale_held(held_q, plan.SK, lambda slot: gate[slot]))
        else:
            part = frag.accumulators(work.BO, "part_of_sum")
            frag.clear(part, work.BO)
            work.read_state(part, above)
            frag.add(acc, work.BO, part, lambda slot: gate[slot])
