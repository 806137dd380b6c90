"""States of linear and SWLA memories at the end of every piece, and the mean keys of segments (Eq. 2, 9, 26-27).

    linear: M_t = M_{t-1} + k_t^T v_t          SWLA: M_t = e^{g_t} M_{t-1} + beta_t k_{t-1}^T v_{t-1} + lam_t k_t^T v_t

Inside a piece, with cum_t the sum of g up to t, the memory at t is sum_j w_tj k_j^T v_j + e^{cum_t} (what entered):

    w_tt = now_t = lam_t        w_tj = after_j e^{cum_t - cum_{j+1}},  after_j = lam_j e^{g_{j+1}} + beta_{j+1}    j < t

and the token before the piece writes once more, with the strength before = beta of the piece's first token.
"""

from typing import Any

from tvm.script import tirx as T

from ..copies import Rows
from ..kernel import (
    WARP,
    Kernel,
    add,
    kernel,
    lane_of,
    loop,
    named,
    pointers,
    registers,
    store,
    when,
)
from ..plan import Plan, origin_of, plan_of
from .outer import Outer

_BLOCK = 256
"""Elements of a state that a block of ``carry`` has."""


def build(problem: Any, config: Any, target: Any) -> list[Kernel]:
    """The kernels of the states."""
    plan = plan_of(problem, config)
    return [*([decays()] if plan.flags.gated else []), local(plan), carry(plan), means(plan)]


def decays() -> Kernel:
    """cum, now, after ``[B * H, T]`` and before ``[B * H, P]``, float32, from gates ``[B, T, H]``: a warp a piece."""
    arguments = pointers("float32", "g", "beta", "lam", "cum", "now", "after", "before")
    arguments |= pointers("int32", "begin", "end", "entering") | dict.fromkeys(("T", "H", "P"), "int32")
    return kernel("decays", 1, arguments, _decays)


def _decays(x: Any) -> None:
    piece, bh = x.block, x.row
    start, stop = named(x.begin[piece], "start"), named(x.end[piece], "stop")
    origin = named(origin_of(x, bh), "origin")
    carried = registers(1, name="carried")
    store(carried, 0, T.float32(0))
    with loop(start, stop, WARP, trips="piece 32") as first:
        t = named(first + x.lane, "t")
        total = registers(1, name="total")
        store(total, 0, T.float32(0))
        with when(t < stop):
            store(total, 0, x.g[origin + t * x.H])
        # Each lane adds what the lanes below it have, at doubling distances.
        for distance in (1, 2, 4, 8, 16):
            below = named(lane_of(total[0], x.lane - distance), "below")
            with when(x.lane >= distance):
                add(total, 0, below)
        add(total, 0, carried[0])
        store(carried, 0, lane_of(total[0], WARP - 1))
        with when(t < stop):
            strength = named(x.lam[origin + t * x.H], "strength")
            place = bh * x.T + t
            store(x.cum, place, total[0])
            store(x.now, place, strength)
            store(x.after, place, T.float32(0))
            with when(t + 1 < stop):
                later = origin + (t + 1) * x.H
                store(x.after, place, strength * T.exp(x.g[later]) + x.beta[later])
    with when(x.lane == 0):
        store(x.before, bh * x.P + piece, T.float32(0))
        with when(x.entering[piece] >= 0):
            store(x.before, bh * x.P + piece, x.beta[origin + start * x.H])


def local(plan: Plan) -> Kernel:
    """What a piece writes, a block of its state a program; those of the first value columns add up the keys too.

    ``to_ends``, ``to_operand``, ``to_means``, ``to_sums``: 1 for what is written of float32 ``ends``, of ``operand`` in
    k's dtype (both ``[B * H, P, SK, SV]``), of means and of sums of the pieces' keys. Where gates are learned,
    ``running`` ``[B * H, T / BT + P, SK]`` gets the sum of a piece's keys before each of its steps, at row
    ``token / BT + piece``.
    """
    stored = plan.number.stored
    arguments = pointers(stored, "k", "v", "operand") | pointers("float32", "ends", "means", "sums")
    if plan.flags.gated:
        arguments |= pointers("float32", "cum", "now", "after", "before")
    if plan.flags.routed:
        arguments |= pointers("float32", "running")
    arguments |= pointers("int32", "begin", "end", "entering")
    arguments |= dict.fromkeys(("to_ends", "to_operand", "to_means", "to_sums", "T", "H", "P"), "int32")
    return kernel("local", plan["states_warps"], arguments, lambda x: _local(plan, x))


def _local(plan: Plan, x: Any) -> None:
    outer, number = Outer(plan, x, "states"), plan.number
    piece, bh, BT, threads = outer.which, x.row, outer.BT, outer.threads
    start, stop = named(x.begin[piece], "start"), named(x.end[piece], "stop")
    keys, values = outer.rows(x.k, plan.DK), outer.rows(x.v, plan.DV)
    each = -(-outer.keys // threads)
    sums = registers(each, name="sums")
    for n in range(each):
        store(sums, n, T.float32(0))

    def add_keys(t0: Any) -> None:
        with when(outer.column == 0):
            for n in range(each):
                key = x.thread + n * threads
                if plan.flags.routed:
                    row = bh * (T.truncdiv(x.T, BT) + x.P) + T.truncdiv(t0, BT) + piece
                    with when(T.And(key < outer.keys, outer.first_key + key < plan.SK)):
                        store(x.running, row * plan.SK + outer.first_key + key, sums[n])
                with when(key < outer.keys), loop(0, BT) as t:
                    add(sums, n, number.load(outer.left.numbers[t * outer.left.cols + key]))

    last = named(x.cum[bh * x.T + stop - 1], "cum_end") if plan.flags.gated else None
    weight = None if last is None else lambda t: _left(x, bh * x.T, t, stop, last)
    outer.run(keys, values, start, stop, weight, f"piece {BT}", add_keys)
    if last is not None:
        _row_before(plan, x, outer, (keys, values), start, last)
    first = (bh * x.P + piece) * plan.SK

    def write(row: Any, value: Any, total: Any) -> None:
        to = (first + row) * plan.SV + value
        with when(x.to_ends != 0):
            store(x.ends, to, total)
        with when(x.to_operand != 0):
            store(x.operand, to, number.round(total))

    outer.each(write)
    with when(outer.column == 0):
        for n in range(each):
            key = outer.first_key + x.thread + n * threads
            with when(T.And(x.thread + n * threads < outer.keys, key < plan.SK)):
                with when(x.to_sums != 0):
                    store(x.sums, first + key, sums[n])
                with when(x.to_means != 0):
                    store(x.means, first + key, sums[n] / T.cast(stop - start, "float32"))


def _left(x: Any, line: Any, t: Any, stop: Any, last: Any) -> Any:
    """The weight of the write t of a piece in its end state."""
    weight = registers(1, name="weight")
    store(weight, 0, T.float32(0))
    with when(t + 1 < stop):
        store(weight, 0, x.after[line + t] * T.exp(last - x.cum[line + t + 1]))
    with when(t + 1 == stop):
        store(weight, 0, x.now[line + t])
    return weight[0]


def _row_before(plan: Plan, x: Any, outer: Outer, rows: tuple[Rows, Rows], start: Any, last: Any) -> None:
    """The token before the piece, where it is one of the same memory."""
    piece, bh, (keys, values) = outer.which, x.row, rows
    with when(x.entering[piece] >= 0):
        weight = named(x.before[bh * x.P + piece] * T.exp(last - x.cum[bh * x.T + start]), "weight_before")
        for place, slot, col in outer.frag.elements(outer.BV):
            key, value = outer.first_row + outer.frag.row(slot), outer.column + col
            with when(T.And(key < plan.DK, value < plan.DV)):
                add(outer.acc, place, weight * (keys.load(start - 1, key) * values.load(start - 1, value)))


def carry(plan: Plan) -> Kernel:
    """States from the first piece of a sequence to its last, an element a thread.

    ``past`` gets the sum of the states of the segments before, for every segment. ``to_carried``: 1 writes the states
    to ``ends``, 2 only those of the last pieces of segments. ``to_operand``, ``to_past``: 1 for what is written.
    """
    stored = plan.number.stored
    arguments = pointers(stored, "operand", "past") | pointers("float32", "ends", "cum")
    arguments |= pointers("int32", "end", "segment", "entering", "seg_last", "seq_begin", "seq_end")
    arguments |= dict.fromkeys(("to_carried", "to_operand", "to_past", "T", "N", "P"), "int32")
    return kernel("carry", _BLOCK // WARP, arguments, lambda x: _carry(plan, x))


def _carry(plan: Plan, x: Any) -> None:
    size, bh = plan.SK * plan.SV, x.plane
    place = named(x.block * _BLOCK + x.thread, "place")
    state, earlier = registers(1, name="state"), registers(1, name="earlier")
    store(state, 0, T.float32(0))
    store(earlier, 0, T.float32(0))
    with when(place < size), loop(x.seq_begin[x.row], x.seq_end[x.row], trips="pieces") as piece:
        at = named((bh * x.P + piece) * size + place, "at")
        entered = registers(1, name="entered")
        store(entered, 0, T.float32(0))
        with when(x.entering[piece] >= 0):
            store(entered, 0, state[0])
            if plan.flags.gated:
                store(entered, 0, state[0] * T.exp(x.cum[bh * x.T + x.end[piece] - 1]))
        store(state, 0, x.ends[at] + entered[0])
        s = named(x.segment[piece], "s")
        whole = named(x.seg_last[s] == piece, "whole")
        with when(T.Or(x.to_carried == 1, T.And(x.to_carried == 2, whole))):
            store(x.ends, at, state[0])
        with when(x.to_operand != 0):
            store(x.operand, at, plan.number.round(state[0]))
        with when(T.And(x.to_past != 0, whole)):
            store(x.past, (bh * x.N + s) * size + place, plan.number.round(earlier[0]))
            add(earlier, 0, state[0])


def means(plan: Plan) -> Kernel:
    """The mean key of a segment of several pieces, a column a thread."""
    warps = -(-plan.SK // WARP)
    arguments = pointers("float32", "sums", "means") | pointers(
        "int32", "seg_begin", "seg_end", "seg_piece", "seg_last"
    )
    return kernel("means", warps, arguments | dict.fromkeys(("N", "P"), "int32"), lambda x: _means(plan, x))


def _means(plan: Plan, x: Any) -> None:
    s, bh = x.block, x.row
    total = registers(1, name="total")
    store(total, 0, T.float32(0))
    with when(x.thread < plan.SK):
        with loop(x.seg_piece[s], x.seg_last[s] + 1, trips="pieces_of_segment") as piece:
            add(total, 0, x.sums[(bh * x.P + piece) * plan.SK + x.thread])
        length = T.cast(x.seg_end[s] - x.seg_begin[s], "float32")
        store(x.means, (bh * x.N + s) * plan.SK + x.thread, total[0] / length)
