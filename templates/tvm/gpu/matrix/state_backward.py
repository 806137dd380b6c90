"""Gradients of the memory's states: of cached ones (Eq. 6-17) and of the end state of every piece (Eq. 2, 26-27).

    dS_i = scale sum_t gamma_t^(i) q_t^T dy_t                      t in later segments of the sequence
    dA_p = scale sum_{t in p} gamma_t^(s) e^{cum_t} q_t^T dy_t     the state that enters piece p
    dEnd_p = [dS_i, if p is the last of segment i] + dA_next + e^{cum_end(next)} dEnd_next     next: entered by p's end

Where gates are equal, dS_i is the sum of the products of the segments after i.
"""

from typing import Any

from tvm.script import tirx as T

from ..copies import Rows
from ..kernel import (
    WARP,
    Kernel,
    add,
    barrier,
    kernel,
    loop,
    named,
    pointers,
    registers,
    store,
    sum_of_lanes,
    when,
)
from ..plan import Plan, origin_of, plan_of, share_of
from .outer import Outer

_BLOCK = 256
"""Elements of a state that a block of ``carry_backward`` has."""


def build(problem: Any, config: Any, target: Any) -> list[Kernel]:
    """The kernels of the states' gradients."""
    plan = plan_of(problem, config)
    found = [piece(plan), carry(plan)]
    if plan.flags.routed:
        found.append(cached(plan))
    if plan.flags.gated:
        found.append(lead(plan))
    return found


def cached(plan: Plan) -> Kernel:
    """The gradient of the state of a segment: float32 ``dstates``, or ``dends`` in q's dtype, of its last piece."""
    stored = plan.number.stored
    arguments = pointers(stored, "q", "dy", "dends") | pointers("float32", "gammas", "dstates")
    arguments |= pointers("int32", "seg_end", "seg_past_end", "seg_last")
    arguments |= {"scale": "float32", **dict.fromkeys(("to_dstates", "to_dends", "T", "H", "N", "P"), "int32")}
    return kernel("cached", plan["dstates_warps"], arguments, lambda x: _cached(plan, x))


def _cached(plan: Plan, x: Any) -> None:
    outer = Outer(plan, x, "dstates")
    i, bh = outer.which, x.row
    begin = named(x.seg_end[i], "left")
    end = named(x.seg_end[x.seg_past_end[i] - 1], "right")
    row = (bh * x.N + i) * x.T

    def gate(t: Any) -> Any:
        found = registers(1, name="gamma")
        store(found, 0, T.float32(0))
        with when(t < end):
            store(found, 0, x.gammas[row + t])
        return found[0]

    outer.run(outer.rows(x.q, plan.DK), outer.rows(x.dy, plan.DV), begin, end, gate, f"after {outer.BT}")
    first = (bh * x.P + x.seg_last[i]) * plan.SK

    def write(key: Any, value: Any, total: Any) -> None:
        to = (first + key) * plan.SV + value
        with when(x.to_dstates != 0):
            store(x.dstates, to, total * x.scale)
        with when(x.to_dends != 0):
            store(x.dends, to, plan.number.round(total * x.scale))

    outer.each(write)


def piece(plan: Plan) -> Kernel:
    """The sum of q_t^T dy_t over a piece, with gates and decays where ``with_gate`` and ``with_cum`` say so."""
    stored = plan.number.stored
    arguments = pointers(stored, "q", "dy") | pointers("float32", "gate", "cum", "products")
    arguments |= pointers("int32", "begin", "end", "segment", "seg_first")
    arguments |= {"scale": "float32", **dict.fromkeys(("with_gate", "with_cum", "T", "H", "P"), "int32")}
    return kernel("piece", plan["dstates_warps"], arguments, lambda x: _piece(plan, x))


def _piece(plan: Plan, x: Any) -> None:
    outer = Outer(plan, x, "dstates")
    p, line = outer.which, x.row * x.T
    stop = named(x.end[p], "stop")

    def weight(t: Any) -> Any:
        found = registers(1, name="weight")
        store(found, 0, T.float32(1))
        with when(t < stop):
            with when(x.with_gate != 0):
                store(found, 0, x.gate[line + t])
            with when(x.with_cum != 0):
                store(found, 0, found[0] * T.exp(x.cum[line + t]))
        return found[0]

    outer.run(outer.rows(x.q, plan.DK), outer.rows(x.dy, plan.DV), x.begin[p], stop, weight, f"piece {outer.BT}")
    share: Any = x.scale
    if plan.flags.averages:
        share = share_of(x, p, x.scale)
    first = (x.row * x.P + p) * plan.SK
    outer.each(lambda key, value, total: store(x.products, (first + key) * plan.SV + value, total * share))


def carry(plan: Plan) -> Kernel:
    """From the last piece of a sequence to its first, an element a thread: ``dends`` from what enters and is cached.

    ``with_products``: gates are equal, and cached states have the sums of later pieces' products; ``with_dstates``:
    they have ``dstates``. ``with_entered``: pieces are entered, and ``dentered`` is theirs. Of swla ``crossing``
    ``[B * H, P, blocks]`` gets the block's part of what the end state says of the decay of what enters.
    """
    stored = plan.number.stored
    arguments = pointers(stored, "dends") | pointers("float32", "dentered", "products", "dstates")
    if plan.flags.gated:
        arguments |= pointers("float32", "ends", "cum", "crossing")
    arguments |= pointers("int32", "end", "segment", "entering", "seg_last", "seq_begin", "seq_end")
    names = ("with_products", "with_dstates", "with_entered", "blocks", "T", "P")
    arguments |= dict.fromkeys(names, "int32")
    return kernel("carry_backward", _BLOCK // WARP, arguments, lambda x: _carry(plan, x))


def _carry(plan: Plan, x: Any) -> None:
    size, bh = plan.SK * plan.SV, x.plane
    place = named(x.block * _BLOCK + x.thread, "place")
    sums = x.shared.take(1, _BLOCK // WARP, "float32", room=0)
    x.shared.open()
    low, high = named(x.seq_begin[x.row], "low"), named(x.seq_end[x.row], "high")
    carried, later, grad = (registers(1, name=name) for name in ("carried", "later", "grad"))
    store(carried, 0, T.float32(0))
    store(later, 0, T.float32(0))
    with loop(0, high - low, trips="pieces") as n:
        p = named(high - 1 - n, "p")
        at = named((bh * x.P + p) * size + place, "at")
        enters = named(x.entering[p], "enters")
        store(grad, 0, carried[0])
        with when(place < size):
            whole = named(x.seg_last[x.segment[p]] == p, "whole")
            with when(T.And(x.with_products != 0, whole)):
                add(grad, 0, later[0])
            with when(x.with_products != 0):
                add(later, 0, x.products[at])
            with when(T.And(x.with_dstates != 0, whole)):
                add(grad, 0, x.dstates[at])
            store(x.dends, at, plan.number.round(grad[0]))
        store(carried, 0, T.float32(0))
        with when(T.And(x.with_entered != 0, enters >= 0)):
            if plan.flags.gated:
                _cross(x, plan, grad, p, enters, place, sums)
            with when(place < size):
                store(carried, 0, x.dentered[at] + grad[0])


def _cross(x: Any, plan: Plan, grad: Any, p: Any, enters: Any, place: Any, sums: Any) -> None:
    """What the end state says of the decay of what enters; ``grad`` is decayed."""
    size, bh = plan.SK * plan.SV, x.plane
    decay = named(T.exp(x.cum[bh * x.T + x.end[p] - 1]), "decay")
    part = registers(1, name="part")
    store(part, 0, T.float32(0))
    with when(place < size):
        store(part, 0, grad[0] * x.ends[(bh * x.P + enters) * size + place])
    sum_of_lanes(part)
    with when(x.lane == 0):
        store(sums.numbers, x.warp, part[0])
    barrier()
    with when(x.thread == 0):
        total = registers(1, name="total")
        store(total, 0, T.float32(0))
        for warp in range(_BLOCK // WARP):
            add(total, 0, sums.numbers[warp])
        store(x.crossing, (bh * x.P + p) * x.blocks + x.block, decay * total[0])
    barrier()
    store(grad, 0, grad[0] * decay)


_LEAD = 128
"""Threads of a block of ``lead``, and tokens that it looks at together."""


def lead(plan: Plan) -> Kernel:
    """What a piece that is entered says of the row before it, which its first token writes once more.

    ``dk_lead`` ``[B * H, P, 2, SK]``, ``dv_lead`` ``[B * H, P, SV]``, ``dbefore`` ``[B * H, P]``; ``crossing``
    ``[B * H, P]`` gets the row's share too.
    """
    stored = plan.number.stored
    arguments = pointers(stored, "q", "k", "v", "dy", "dends")
    arguments |= pointers("float32", "gate", "cum", "before", "crossing", "dk_lead", "dv_lead", "dbefore")
    arguments |= pointers("int32", "begin", "end", "segment", "entering", "seg_first")
    arguments |= {"scale": "float32", **dict.fromkeys(("T", "H", "P"), "int32")}
    return kernel("lead", _LEAD // WARP, arguments, lambda x: _Lead(plan, x).run())


class _Lead:
    """A block at work: a piece of a head."""

    def __init__(self, plan: Plan, x: Any) -> None:
        self.plan, self.x = plan, x
        take = x.shared.take
        self.key, self.value = take(1, plan.SK, "float32", room=0), take(1, plan.SV, "float32", room=0)
        self.of_key, self.of_value = (take(1, _LEAD, "float32", room=0) for _ in range(2))
        self.sums = take(2, _LEAD // WARP, "float32", room=0)
        x.shared.open()
        self.piece, self.bh = x.block, x.row
        origin = named(origin_of(x, self.bh), "origin")
        number = plan.number
        self.q, self.k = (Rows(array, number, plan.DK, origin, x.H) for array in (x.q, x.k))
        self.v, self.dy = (Rows(array, number, plan.DV, origin, x.H) for array in (x.v, x.dy))
        self.start, self.stop = named(x.begin[self.piece], "start"), named(x.end[self.piece], "stop")
        self.since = named(x.cum[self.bh * x.T + self.start], "since")

    def run(self) -> None:
        plan, x = self.plan, self.x
        with when(x.entering[self.piece] >= 0):
            for tile, rows, width, stored in (
                (self.key, self.k, plan.DK, plan.SK),
                (self.value, self.v, plan.DV, plan.SV),
            ):
                with when(x.thread < stored):
                    store(tile.numbers, x.thread, T.float32(0))
                    with when(x.thread < width):
                        store(tile.numbers, x.thread, rows.load(self.start - 1, x.thread))
            barrier()
            dk, dv = registers(1, name="dk_row"), registers(1, name="dv_row")
            strength, ended = registers(1, name="strength"), registers(1, name="ended")
            for one in (dk, dv, strength, ended):
                store(one, 0, T.float32(0))
            self._tokens(dk, dv, strength)
            self._end(dv, ended)
            self._write(dk, dv, strength, ended)

    def _tokens(self, dk: Any, dv: Any, strength: Any) -> None:
        """What the piece's tokens say: a token a thread, then a column a thread."""
        plan, x = self.plan, self.x
        share: Any = x.scale
        if plan.flags.averages:
            share = share_of(x, self.piece, x.scale)
        with loop(self.start, self.stop, _LEAD, trips=f"piece {_LEAD}") as t0:
            t = named(t0 + x.thread, "t")
            of_key, of_value = registers(1, name="of_key"), registers(1, name="of_value")
            store(of_key, 0, T.float32(0))
            store(of_value, 0, T.float32(0))
            with when(t < self.stop):
                with loop(0, plan.DK) as d:
                    add(of_key, 0, self.q.load(t, d) * self.key.numbers[d])
                with loop(0, plan.DV) as d:
                    add(of_value, 0, self.dy.load(t, d) * self.value.numbers[d])
                weight = registers(1, name="weight")
                store(weight, 0, T.exp(x.cum[self.bh * x.T + t] - self.since) * share)
                if plan.flags.routed:
                    store(weight, 0, weight[0] * x.gate[self.bh * x.T + t])
                add(strength, 0, weight[0] * of_key[0] * of_value[0])
                store(of_key, 0, of_key[0] * weight[0])
                store(of_value, 0, of_value[0] * weight[0])
            barrier()
            store(self.of_key.numbers, x.thread, of_key[0])
            store(self.of_value.numbers, x.thread, of_value[0])
            barrier()
            count = named(T.min(self.stop - t0, _LEAD), "count")
            for total, rows, width, weights in (
                (dk, self.q, plan.DK, self.of_value), (dv, self.dy, plan.DV, self.of_key),
            ):  # fmt: skip
                with when(x.thread < width), loop(0, count, trips=f"times {_LEAD}") as j:
                    add(total, 0, rows.load(t0 + j, x.thread) * weights.numbers[j])

    def _end(self, dv: Any, ended: Any) -> None:
        """What the gradient of the piece's end state says: dk's part is written."""
        plan, x = self.plan, self.x
        left = named(T.exp(x.cum[self.bh * x.T + self.stop - 1] - self.since), "left")
        strong = named(x.before[self.bh * x.P + self.piece], "strong")
        first = named((self.bh * x.P + self.piece) * plan.SK, "first")
        with when(x.thread < plan.SV), loop(0, plan.SK) as r:
            state = plan.number.load(x.dends[(first + r) * plan.SV + x.thread])
            add(dv, 0, state * self.key.numbers[r] * left)
        with when(x.thread < plan.SK):
            of_value = registers(1, name="of_value_of_end")
            store(of_value, 0, T.float32(0))
            with loop(0, plan.SV) as c:
                state = plan.number.load(x.dends[(first + x.thread) * plan.SV + c])
                add(of_value, 0, state * self.value.numbers[c])
            store(of_value, 0, of_value[0] * left)
            store(ended, 0, self.key.numbers[x.thread] * of_value[0])
            store(x.dk_lead, (self.bh * x.P + self.piece) * 2 * plan.SK + x.thread, strong * of_value[0])

    def _write(self, dk: Any, dv: Any, strength: Any, ended: Any) -> None:
        plan, x = self.plan, self.x
        place = named(self.bh * x.P + self.piece, "place")
        strong = named(x.before[place], "strong_again")
        with when(x.thread < plan.SK):
            store(x.dk_lead, (place * 2 + 1) * plan.SK + x.thread, strong * dk[0])
        with when(x.thread < plan.SV):
            store(x.dv_lead, place * plan.SV + x.thread, strong * dv[0])
        for number, value in enumerate((strength, ended)):
            sum_of_lanes(value)
            with when(x.lane == 0):
                store(self.sums.numbers, number * self.sums.cols + x.warp, value[0])
        barrier()
        with when(x.thread == 0):
            for number, value in enumerate((strength, ended)):
                store(value, 0, T.float32(0))
                for warp in range(_LEAD // WARP):
                    add(value, 0, self.sums.numbers[number * self.sums.cols + warp])
            store(x.dbefore, place, strength[0] + ended[0])
            store(x.crossing, place, x.crossing[place] + strong * ended[0])
