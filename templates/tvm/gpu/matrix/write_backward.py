"""Gradients of the writes to k and v, and under SWLA to the strengths and decays of the writes (Eq. 2, 10, 26-27).

    dv_j = scale sum_t w_tj gamma_t <q_t, k_j> dy_t + we_j k_j dEnd            t >= j in the piece, gamma the online one
    dk_j = scale sum_t w_tj gamma_t <dy_t, v_j> q_t + we_j v_j dEnd^T
           + dp_i / len_i + sum_{t >= j} pull_t u_t                            through the mean keys (gates_backward)

w_tj is the weight of token j in the memory at t, we_j that in the piece's end state. SWLA's gates have gradients made
of sums of D_tj = scale gamma_t <q_t, k_j> <dy_t, v_j> and of E_j = k_j dEnd v_j^T.
"""

from typing import Any

from tvm.script import tirx as T

from ..copies import Rows
from ..fragments import Fragments, Operand
from ..instructions import fragments
from ..kernel import (
    WARP,
    Kernel,
    add,
    barrier,
    kernel,
    lane_of,
    loop,
    named,
    pointers,
    registers,
    store,
    sum_of_lanes,
    when,
)
from ..plan import Place, Plan, origin_of, place_of, plan_of, share_of
from .tokens import Tokens

_TURN = 16
"""Tokens whose pulls are added up at once."""


def build(problem: Any, config: Any, target: Any) -> list[Kernel]:
    """The kernels of the writes' gradients."""
    plan = plan_of(problem, config)
    return [write(plan), *([strength(plan)] if plan.flags.gated else [])]


def write(plan: Plan) -> Kernel:
    """dk and dv of some tokens of a head, and under SWLA what their gates' gradients add up."""
    stored = plan.number.stored
    arguments = pointers(stored, "q", "k", "v", "dy", "dends", "dk", "dv")
    if plan.flags.gated:
        arguments |= pointers("float32", "cum", "now", "after", "diagonal", "tail", "ending", "dk_lead", "dv_lead")
        arguments |= {"with_lead": "int32"}
    if plan.flags.routed:
        arguments |= pointers(stored, "u") | pointers("float32", "gate", "pull", "pulls", "dmeans")
        arguments |= {"many": "int32"}
    arguments |= pointers("int32", "begin", "end", "segment", "entering", "seg_first", "seg_last", "tiles")
    arguments |= {"scale": "float32", **dict.fromkeys(("T", "H", "N", "P"), "int32")}
    return kernel("write", plan["dkv_warps"], arguments, lambda x: _Write(plan, x).run())


class _Write(Tokens):
    """A block at work: its tile of tokens j, whose rows its warps share out."""

    def __init__(self, plan: Plan, x: Any) -> None:
        self.plan, self.x, number = plan, x, plan.number
        self.R, self.BT, self.threads = plan["dkv_rows"], plan["dkv_BT"], 32 * plan["dkv_warps"]
        self.BJ = plan["dkv_warps"] * self.R
        self.frag: Fragments = fragments(number, plan.instruction, self.R, x.lane)
        take = x.shared.take
        self.k, self.v = (take(self.BJ, width, number.stored) for width in (plan.SK, plan.SV))
        below = x.shared.bytes
        self.BK = min(plan["dkv_BK"], plan.SK)
        self.end = take(self.BK, plan.SV, number.stored)
        # Later tokens come when the end state is done with, then what is pulled.
        self.q = take(self.BT, plan.SK, number.stored, at=below)
        self.dy = take(self.BT, plan.SV, number.stored, at=self.q.end)
        self.direct = hasattr(self.frag, "hold_sums")
        self.weights = None if self.direct else take(self.BJ, self.BT, number.stored, at=self.dy.end)
        self.pulled = take(_TURN, plan.SK, "float32", at=below)
        x.shared.open()
        self.at: Place = place_of(x, x.block, self.BJ)
        self.stop = named(x.end[self.at.piece], "piece_end")
        self.above = named(x.warp * self.R, "above")
        self.line = named(self.at.bh * x.T, "line")
        self.dk, self.dv = self.frag.accumulators(plan.SK, "dk"), self.frag.accumulators(plan.SV, "dv")
        self.frag.clear(self.dk, plan.SK)
        self.frag.clear(self.dv, plan.SV)

    def run(self) -> None:
        plan, x, at = self.plan, self.x, self.at
        self.load(self.k, self.rows(x.k, plan.DK), at.first, at.stop)
        self.load(self.v, self.rows(x.v, plan.DV), at.first, at.stop)
        left_k, left_v = Operand(self.k, row=self.above), Operand(self.v, row=self.above)
        self._end(left_v)
        strength = self._ended() if plan.flags.gated else None
        self._later(left_k, left_v, strength)
        if plan.flags.gated:
            self._lead()
        self._store(x.dv, plan.DV, plan.SV, self.dv)
        if plan.flags.routed:
            self._pulls()
        self._store(x.dk, plan.DK, plan.SK, self.dk)

    def _end(self, left_v: Operand) -> None:
        """What the piece's end state says of keys and values, some of its rows at a time."""
        plan, x, at = self.plan, self.x, self.at
        state = Rows(x.dends, plan.number, plan.SV, (at.bh * x.P + at.piece) * plan.SK, 1)
        for first in range(0, plan.SK, self.BK):
            part = range(first, min(first + self.BK, plan.SK))
            if first:
                barrier()
            self.load(self.end, state, first, plan.SK)
            barrier()
            left_k = Operand(self.k, row=self.above, col=first)
            self.frag.product(self.dv, plan.SV, left_k, Operand(self.end), len(part))
            self.frag.product(self.dk, plan.SK, left_v, Operand(self.end, transposed=True), plan.SV, part)

    def _write(self, array: Any, sums: Any) -> None:
        for slot in range(self.frag.slots):
            with when(T.And(self.frag.leads, self.token(slot) < self.at.stop)):
                store(array, self.line + self.token(slot), sums[slot])

    def _ended(self) -> tuple[Any, Any, Any]:
        """E_j, and weights of the writes in the end state; cum_{j+1}, after_j and now_j of a thread's rows."""
        plan, x, frag = self.plan, self.x, self.frag
        number, k = plan.number, self.k

        def term(place: int, slot: int, col: Any) -> Any:
            return number.load(k.numbers[(self.above + frag.row(slot)) * k.cols + col]) * self.dk[place]

        self._write(x.ending, frag.row_sums("ending_sum", term, plan.SK))
        stop = self.stop
        cum_next = self.slots("cum_next", lambda j, _: x.cum[self.line + j + 1], stop - 1)
        after = self.slots("after_j", lambda j, _: x.after[self.line + j], stop - 1)
        now = self.slots("now_j", lambda j, _: x.now[self.line + j], stop)
        last = named(x.cum[self.line + stop - 1], "cum_end")
        left = registers(frag.slots, name="left_j")
        for slot in range(frag.slots):
            store(left, slot, now[slot])
            with when(self.token(slot) + 1 < stop):
                store(left, slot, after[slot] * T.exp(last - cum_next[slot]))
        frag.scale(self.dv, plan.SV, lambda slot: left[slot])
        frag.scale(self.dk, plan.SK, lambda slot: left[slot])
        return cum_next, after, now

    def _later(self, left_k: Operand, left_v: Operand, strength: Any) -> None:
        """What tokens from the tile's first on say of its keys and values."""
        plan, x, at, frag, BT = self.plan, self.x, self.at, self.frag, self.BT
        share: Any = x.scale
        if plan.flags.averages:
            share = named(x.scale / T.cast(at.segment - at.oldest + 1, "float32"), "share")
        own, others = registers(frag.slots, name="own"), registers(frag.slots, name="others")
        for slot in range(frag.slots):
            store(own, slot, T.float32(0))
            store(others, slot, T.float32(0))
        with loop(at.first, self.stop, BT, trips=f"later {self.BJ} {BT}") as t0:
            barrier()
            self.load(self.q, self.rows(x.q, plan.DK), t0, self.stop)
            self.load(self.dy, self.rows(x.dy, plan.DV), t0, self.stop)
            barrier()
            values, keys = frag.accumulators(BT, "for_values"), frag.accumulators(BT, "for_keys")
            frag.clear(values, BT)
            frag.clear(keys, BT)
            frag.product(values, BT, left_k, Operand(self.q, transposed=True), plan.SK)
            frag.product(keys, BT, left_v, Operand(self.dy, transposed=True), plan.SV)
            for place, slot, col in frag.elements(BT):
                self._weigh(values, keys, place, slot, t0 + col, share, strength, (own, others))
            for sums, right, acc, width in ((values, self.dy, self.dv, plan.SV), (keys, self.q, self.dk, plan.SK)):
                if self.direct:
                    left: Any = frag.hold_sums(sums, BT)
                else:
                    frag.put(sums, BT, self.weights, self.above)
                    left = Operand(self.weights, row=self.above)
                frag.product(acc, width, left, Operand(right), BT)
                if not self.direct:
                    # The next sums take the same place.
                    barrier()
        if strength is not None:
            for array, sums in ((x.diagonal, own), (x.tail, others)):
                for slot in range(frag.slots):
                    frag.share_row(sums, slot)
                self._write(array, sums)

    def _weigh(
        self, values: Any, keys: Any, place: int, slot: int, t: Any, share: Any, strength: Any, sums: Any
    ) -> None:
        """Both products of a pair of tokens times the weight of the write j in the memory at t."""
        plan, x = self.plan, self.x
        weight = registers(1, name="weight")
        j = self.token(slot)
        store(weight, 0, T.float32(0))
        with when(T.And(t >= j, t < self.stop)):
            gate = share * x.gate[self.line + t] if plan.flags.routed else share
            store(weight, 0, gate)
            if strength is not None:
                cum_next, after, now = strength
                own, others = sums
                both = named(values[place] * keys[place] * weight[0], "both")
                decay = named(T.exp(T.min(x.cum[self.line + t] - cum_next[slot], T.float32(0))), "decay")
                add(own, slot, T.Select(t == j, both, T.float32(0)))
                add(others, slot, T.Select(t > j, both * decay, T.float32(0)))
                store(weight, 0, weight[0] * T.Select(t == j, now[slot], after[slot] * decay))
        store(values, place, values[place] * weight[0])
        store(keys, place, keys[place] * weight[0])

    def _lead(self) -> None:
        """The piece's last token writes once more in the next piece, if the memory goes on there."""
        plan, x, at, frag = self.plan, self.x, self.at, self.frag
        enters = registers(1, "int32", "goes_on")
        store(enters, 0, T.int32(-1))
        with when(T.And(x.with_lead != 0, at.piece + 1 < x.P)):
            store(enters, 0, x.entering[at.piece + 1])
        with when(enters[0] >= 0):
            place = named(at.bh * x.P + at.piece + 1, "next_piece")
            for element, slot, col in frag.elements(plan.SV):
                with when(self.token(slot) == self.stop - 1):
                    add(self.dv, element, x.dv_lead[place * plan.SV + col])
            for element, slot, col in frag.elements(plan.SK):
                with when(self.token(slot) == self.stop - 1):
                    first = x.dk_lead[place * 2 * plan.SK + col]
                    add(self.dk, element, first + x.dk_lead[(place * 2 + 1) * plan.SK + col])

    def _pulls(self) -> None:
        """What comes through the mean keys: of the segment, of its later pieces, and of tokens from j on.

        A thread adds up columns from the last token to the first, 16 tokens at a time, those of a warp or half of it.
        """
        plan, x, at = self.plan, self.x, self.at
        each = -(-plan.SK // self.threads)
        rest, ahead = registers(each, name="rest"), registers(_TURN, name="ahead")
        connectors = self.rows(x.u, plan.DK)
        for n in range(each):
            column = named(x.thread + n * self.threads, "column")
            store(rest, n, T.float32(0))
            with when(column < plan.SK):
                store(rest, n, x.dmeans[(at.bh * x.N + at.segment) * plan.SK + column])
            with (
                when(T.And(x.many != 0, column < plan.SK)),
                loop(at.piece + 1, x.seg_last[at.segment] + 1, trips=f"behind {self.BJ}") as p,
            ):
                add(rest, n, x.pulls[(at.bh * x.P + p) * plan.SK + column])
            with when(column < plan.DK), loop(at.first + self.BJ, self.stop, trips=f"rest {self.BJ}") as t:
                add(rest, n, connectors.load(t, column) * x.pull[self.line + t])
        with loop(0, self.BJ // _TURN) as turn:
            row = named(self.BJ - _TURN - turn * _TURN, "row")
            barrier()
            for n in range(each):
                column = x.thread + n * self.threads
                for j in range(_TURN):
                    store(ahead, j, T.float32(0))
                    t = at.first + row + j
                    with when(T.And(column < plan.DK, t < self.stop)):
                        store(ahead, j, connectors.load(t, column) * x.pull[self.line + t])
                for j in reversed(range(_TURN)):
                    add(rest, n, ahead[j])
                    with when(column < plan.SK):
                        store(self.pulled.numbers, j * self.pulled.cols + column, rest[n])
            barrier()
            for place, slot, col in self.frag.elements(plan.SK):
                mine = named(self.above + self.frag.row(slot) - row, "mine")
                with when(T.And(mine >= 0, mine < _TURN)):
                    add(self.dk, place, self.pulled.numbers[mine * self.pulled.cols + col])

    def _store(self, array: Any, width: int, stored: int, acc: Any) -> None:
        out = self.rows(array, width)
        for place, slot, col in self.frag.elements(stored):
            inside = self.token(slot) < self.at.stop
            with when(T.And(inside, col < width) if width < stored else inside):
                store(out.array, out.at(self.token(slot), col), self.plan.number.round(acc[place]))


def strength(plan: Plan) -> Kernel:
    """The gates' gradients of a piece of SWLA, a warp a piece, from its last token to its first."""
    arguments = pointers("float32", "gate", "own", "g", "lam", "cum", "now", "after", "before", "diagonal", "tail")
    arguments |= pointers("float32", "ending", "dbefore", "crossing", "dg", "dbeta", "dlam")
    arguments |= pointers("int32", "begin", "end", "segment", "entering", "seg_first")
    return kernel(
        "strength", 1, arguments | dict.fromkeys(("with_lead", "T", "H", "P"), "int32"), lambda x: _strength(plan, x)
    )


def _strength(plan: Plan, x: Any) -> None:
    piece, bh = x.block, x.row
    start, stop = named(x.begin[piece], "start"), named(x.end[piece], "stop")
    line, origin = named(bh * x.T, "line"), named(origin_of(x, bh), "origin")
    enters = named(T.And(x.with_lead != 0, x.entering[piece] >= 0), "enters")
    last_cum = named(x.cum[line + stop - 1], "cum_end")

    def of_token(t: Any) -> tuple[Any, Any, Any]:
        """What a token's strength writes, what its gradient is made of, and that of the end."""
        strong, dstrong, ended = (registers(1, name=name) for name in ("strong", "dstrong", "ended"))
        for one in (strong, dstrong, ended):
            store(one, 0, T.float32(0))
        # For the token before t in the piece, or the row before the piece.
        with when(T.And(t < stop, t > start)):
            decay = T.exp(T.min(last_cum - x.cum[line + t], T.float32(0)))
            store(ended, 0, decay * x.ending[line + t - 1])
            store(strong, 0, x.after[line + t - 1])
            store(dstrong, 0, ended[0] + x.tail[line + t - 1])
        return strong, dstrong, ended

    last = registers(1, name="last")
    store(last, 0, T.float32(0))
    with loop(start, stop, WARP, trips=f"piece {WARP}") as first:
        strong, _, ended = of_token(named(first + x.lane, "t"))
        add(last, 0, strong[0] * ended[0])
    sum_of_lanes(last)
    with when(enters):
        add(last, 0, x.crossing[bh * x.P + piece])
    share: Any = T.float32(1)
    if plan.flags.averages:
        share = share_of(x, piece, T.float32(1))
    carried = registers(1, name="carried")
    store(carried, 0, T.float32(0))
    with loop(0, T.truncdiv(stop - start + WARP - 1, WARP), trips=f"piece {WARP}") as n:
        first = named(start + (T.truncdiv(stop - start + WARP - 1, WARP) - 1 - n) * WARP, "first_of_step")
        t = named(first + x.lane, "t_of_step")
        strong, dstrong, _ = of_token(t)
        with when(T.And(enters, t == start)):
            add(dstrong, 0, x.dbefore[bh * x.P + piece])
            add(strong, 0, x.before[bh * x.P + piece])
        dcum, dnow = registers(1, name="dcum"), registers(1, name="dnow")
        store(dcum, 0, T.float32(0))
        store(dnow, 0, T.float32(0))
        with when(t < stop):
            own = x.own[line + t] * share
            if plan.flags.routed:
                own = own * x.gate[line + t]
            store(dnow, 0, x.diagonal[line + t])
            store(dcum, 0, own - x.now[line + t] * dnow[0] - strong[0] * dstrong[0])
            with when(t == stop - 1):
                add(dcum, 0, last[0])
        # Each lane adds what the lanes above it have, at doubling distances.
        for distance in (1, 2, 4, 8, 16):
            above = named(lane_of(dcum[0], x.lane + distance), "above")
            with when(x.lane + distance < WARP):
                add(dcum, 0, above)
        add(dcum, 0, carried[0])
        store(carried, 0, lane_of(dcum[0], 0))
        with when(t < stop):
            _gates_of(x, origin + t * x.H, line + t, (t, start, stop, enters, last_cum), dcum, dstrong, dnow)


def _gates_of(x: Any, place: Any, line: Any, at: tuple[Any, ...], dcum: Any, dstrong: Any, dnow: Any) -> None:
    """The gradients of one token's gates."""
    t, start, stop, enters, last_cum = at
    store(x.dbeta, place, dstrong[0])
    total = registers(1, name="total")
    store(total, 0, dcum[0])
    with when(t > start):
        add(total, 0, x.lam[place - x.H] * T.exp(x.g[place]) * dstrong[0])
    # What nothing enters does not decay; only rounding would say that it does.
    store(x.dg, place, T.float32(0))
    with when(T.Or(t > start, enters)):
        store(x.dg, place, total[0])
    dlam = registers(1, name="dlam_t")
    store(dlam, 0, dnow[0])
    with when(t + 1 < stop):
        ended = T.exp(T.min(last_cum - x.cum[line + 1], T.float32(0))) * x.ending[line]
        add(dlam, 0, (ended + x.tail[line]) * T.exp(x.g[place + x.H]))
    with when(t == stop - 1):
        add(dlam, 0, x.ending[line])
    store(x.dlam, place, dlam[0])
