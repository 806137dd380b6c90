"""Gradient of the read of a linear or SWLA Memory Caching layer on a GPU (Eq. 6-17), to q and to learned gates.

    P_t^(i) = dy_t M^(i)T                            of the cached states, and of the online memory
    dq_t = scale sum_i gamma_t^(i) P_t^(i)
    dgamma_t^(i) = scale <q_t, P_t^(i)>
    delta_t = sum_i gamma_t^(i) dgamma_t^(i) = <q_t, dq_t>

Blocks that share a tile of tokens have key columns each; what they add to ``own``, ``dgamma`` and ``delta`` is summed
up by who reads it.
"""

from typing import Any

from tvm.script import tirx as T

from ..kernel import Kernel, kernel, named, pointers, store, when
from ..plan import Plan, plan_of
from .read_forward import SPANS
from .reading import GRADIENT, Reading


def build(problem: Any, config: Any, target: Any) -> list[Kernel]:
    """The kernel of the read's gradient."""
    plan = plan_of(problem, config)
    stored = plan.number.stored
    arguments = pointers(stored, "q", "k", "v", "dy", "operand", "dq") | pointers("float32", "own")
    if plan.flags.gated:
        arguments |= pointers("float32", "cum", "now", "after", "before")
    if plan.flags.routed:
        arguments |= pointers("float32", "logits", "lse", "dgamma", "delta")
    else:
        arguments |= pointers(stored, "past")
    arguments |= pointers("int32", *SPANS)
    arguments |= {"scale": "float32", **dict.fromkeys(("heads", "T", "H", "N", "P"), "int32")}
    return [kernel("read_backward", plan["dq_warps"], arguments, lambda x: _read(plan, x))]


def _read(plan: Plan, x: Any) -> None:
    work = Reading(plan, x, GRADIENT, "dq", plan["dq_BK"])
    at, frag = work.at, work.frag
    work.online()
    # The thread's elements of q, where it has those of what it reads.
    q, rows = frag.accumulators(work.BO, "q_of_rows"), work.rows(x.q, plan.DK)
    for place, slot, col in frag.elements(work.BO):
        token, column = work.token(slot), work.column + col
        store(q, place, T.float32(0))
        with when(T.And(token < at.stop, column < plan.DK)):
            store(q, place, rows.load(token, column))
    line = named((work.part * x.heads + at.bh) * x.T, "line_of_part")
    _write(work, x.own, line, frag.row_sums("own_sum", lambda place, *_: q[place] * work.acc[place], work.BO))
    if plan.flags.routed:
        _gated(work, q, line)
    else:
        work.read_past()
    work.store(x.dq, x.scale)


def _write(work: Reading, array: Any, line: Any, sums: Any) -> None:
    """A number of each row of the warp, times ``scale``."""
    for slot in range(work.frag.slots):
        token = work.token(slot)
        with when(T.And(work.frag.leads, token < work.at.stop)):
            store(array, line + token, sums[slot] * work.x.scale)


def _gated(work: Reading, q: Any, line: Any) -> None:
    """Cached states with gates of their own, whose gradients are written."""
    x, at, frag, acc = work.x, work.at, work.frag, work.acc
    gates = work.gates()
    with work.cached(gates) as (i, gate, above):
        part = frag.accumulators(work.BO, "part_of_sum")
        frag.clear(part, work.BO)
        work.read_state(part, above)
        sums = frag.row_sums("dgamma_sum", lambda place, *_, part=part: q[place] * part[place], work.BO)
        _write(work, x.dgamma, (work.part * x.heads + at.bh) * x.N * x.T + i * x.T, sums)
        frag.add(acc, work.BO, part, lambda slot: gate[slot])
    _write(work, x.delta, line, frag.row_sums("delta_sum", lambda place, *_: q[place] * acc[place], work.BO))
