"""Gradients of the gates to logits, connectors and mean keys (Eq. 8-10, 16-17).

    dr_t^(i) = gamma_t^(i) (dgamma_t^(i) - sum_j gamma_t^(j) dgamma_t^(j))        the logits' gradient
    du_t = sum_{i < s} dr_t^(i) p_i + dr_t^(s) pbar_t          pbar_t: the mean of the segment's keys up to t
    dp_i = sum_t dr_t^(i) u_t                                  over the later tokens of the sequence

Mean keys have much in common while the dr of a token sum to zero: their products are of float32.
"""

from typing import Any

from tvm.script import tirx as T

from ..copies import Rows
from ..fragments import Operand
from ..instructions import Lanes
from ..kernel import WARP, Kernel, add, barrier, kernel, loop, named, pointers, registers, store, when
from ..numbers import Number
from ..plan import Place, Plan, origin_of, place_of, plan_of
from .gates import RunningKeys, mean_key

_ROWS = 16
"""Tokens of a warp."""
_FLOAT32 = Number("float32")


def build(problem: Any, config: Any, target: Any) -> list[Kernel]:
    """The kernels of the gates' gradients."""
    plan = plan_of(problem, config)
    return [connector(plan), descriptor(plan), pulls(plan)]


def connector(plan: Plan) -> Kernel:
    """du, and of a token the online segment's ``gate`` and its ``pull`` at the keys.

    The first part of ``dgamma`` becomes dr; gates of cached segments go to ``gammas``, which may be where their logits
    are.
    """
    stored = plan.number.stored
    arguments = pointers(stored, "k", "du")
    arguments |= pointers("float32", "means", "sums", "running", "logits", "gammas", "lse", "dgamma", "own", "delta")
    arguments |= pointers("float32", "gate", "pull")
    arguments |= pointers("int32", "begin", "end", "segment", "seg_begin", "seg_first", "seg_piece", "tiles")
    arguments |= dict.fromkeys(("many", "ahead", "parts", "heads", "T", "H", "N", "P"), "int32")
    return kernel("connector", plan["dgates_warps"], arguments, lambda x: _Connector(plan, x).run(), noalias=False)


class _Connector:
    """A block at work: 16 tokens a warp, of a head."""

    def __init__(self, plan: Plan, x: Any) -> None:
        self.plan, self.x = plan, x
        self.BT, self.threads, self.BI = plan["dgates_warps"] * _ROWS, plan["dgates_warps"] * WARP, plan["dgates_BI"]
        self.frag = Lanes(_FLOAT32, _ROWS, x.lane)
        self.dr = x.shared.take(self.BI, self.BT, "float32")
        self.means = x.shared.take(self.BI, plan.SK, "float32")
        self.running = x.shared.take(_ROWS, plan.SK, "float32", at=0)
        # What a token's thread says to the warp that has its row.
        self.owns = x.shared.take(1, self.BT, "float32", room=0)
        x.shared.open()
        self.at: Place = place_of(x, x.block, self.BT)
        self.t = named(self.at.first + x.thread, "t")
        self.valid = named(T.And(x.thread < self.BT, self.t < self.at.stop), "valid")
        self.line = named(self.at.bh * x.T + self.t, "line")
        self.stride = named(x.heads * x.T, "stride")

    def _parts(self, array: Any, place: Any, stride: Any, name: str) -> Any:
        """The sum over the blocks of the read's gradient."""
        total = registers(1, name=name)
        store(total, 0, T.float32(0))
        with when(self.valid), loop(0, self.x.parts, trips="times 1") as p:
            add(total, 0, array[p * stride + place])
        return total[0]

    def run(self) -> None:
        plan, x, at = self.plan, self.x, self.at
        lse, own = registers(1, name="lse_t"), registers(1, name="own_logit")
        store(lse, 0, T.float32(0))
        store(own, 0, T.float32(0))
        with when(self.valid):
            store(lse, 0, x.lse[self.line])
            store(own, 0, x.logits[(at.bh * x.N + at.segment) * x.T + self.t])
        delta = self._parts(x.delta, self.line, self.stride, "delta_t")
        gate = named(T.exp(own[0] - lse[0]), "gate_t")
        acc = self.frag.accumulators(plan.SK)
        self.frag.clear(acc, plan.SK)
        with loop(at.oldest, at.segment, self.BI, trips=f"cached {self.BT} {self.BI}") as i0:
            self._segments(acc, i0, lse[0], delta)
        dgamma = self._parts(x.own, self.line, self.stride, "dgamma_t")
        count = self.t - x.seg_begin[at.segment] + 1
        pull = registers(1, name="pull_t")
        store(pull, 0, T.float32(0))
        with when(self.valid):
            store(pull, 0, gate * (dgamma - delta) / T.cast(count, "float32"))
            store(x.gate, self.line, gate)
            store(x.pull, self.line, pull[0])
        with when(x.thread < self.BT):
            store(self.owns.numbers, x.thread, pull[0])
        self._running(acc)
        out = Rows(x.du, plan.number, plan.DK, at.origin, x.H)
        for place, slot, col in self.frag.elements(plan.SK):
            token = at.first + x.warp * _ROWS + self.frag.row(slot)
            with when(T.And(token < at.stop, col < plan.DK)):
                store(out.array, out.at(token, col), plan.number.round(acc[place]))

    def _segments(self, acc: Any, i0: Any, lse: Any, delta: Any) -> None:
        """The cached segments from ``i0`` on: their dr, a token a thread, then products with their mean keys."""
        plan, x, at, BI = self.plan, self.x, self.at, self.BI
        barrier()
        with when(x.thread < self.BT), loop(0, BI) as r:
            i, dr = named(i0 + r, "i"), registers(1, name="dr_t")
            store(dr, 0, T.float32(0))
            with when(T.And(self.valid, i < at.segment)):
                place = named((at.bh * x.N + i) * x.T + self.t, "place_of_gate")
                gamma = named(T.exp(x.logits[place] - lse), "gamma")
                total = self._parts(x.dgamma, place, x.N * self.stride, "dgamma_of_parts")
                store(dr, 0, gamma * (total - delta))
                store(x.dgamma, place, dr[0])
                store(x.gammas, place, gamma)
            store(self.dr.numbers, r * self.dr.cols + x.thread, dr[0])
        with loop(x.thread, BI * plan.SK, self.threads, trips=f"times {BI * plan.SK // self.threads}") as index:
            r, d = named(T.truncdiv(index, plan.SK), "mean_row"), named(T.truncmod(index, plan.SK), "d")
            store(self.means.numbers, r * self.means.cols + d, mean_key(plan, x, at, i0 + r, d))
        barrier()
        left = Operand(self.dr, col=x.warp * _ROWS, transposed=True)
        self.frag.product(acc, plan.SK, left, Operand(self.means), BI)

    def _running(self, acc: Any) -> None:
        """Sums of the segment's keys up to a token, times its pull: 16 tokens at a time, those of one warp."""
        plan, x, at = self.plan, self.x, self.at
        keys = RunningKeys(plan, x, at, self.running, self.threads, self.BT)
        with loop(0, self.BT // _ROWS) as turn:
            first = named(at.first + turn * _ROWS, "first_of_turn")
            barrier()
            keys.put(first)
            barrier()
            with when(x.warp == turn):
                for place, slot, col in self.frag.elements(plan.SK):
                    row = self.frag.row(slot)
                    pull = self.owns.numbers[turn * _ROWS + row]
                    add(acc, place, pull * self.running.numbers[row * self.running.cols + col])


_STEP = 32
"""Tokens of a step of ``descriptor``."""


def descriptor(plan: Plan) -> Kernel:
    """The gradient of mean keys, of 16 segments a block and one of ``splits`` parts of the tokens after them."""
    arguments = pointers(plan.number.stored, "u") | pointers("float32", "dr", "dmeans")
    arguments |= pointers("int32", "seg_begin", "seg_end", "seg_past_end")
    arguments |= dict.fromkeys(("splits", "heads", "T", "H", "N"), "int32")
    return kernel("descriptor", -(-plan.SK // 32), arguments, lambda x: _descriptor(plan, x))


def _descriptor(plan: Plan, x: Any) -> None:
    number, warps = plan.number, -(-plan.SK // 32)
    threads, wide = warps * WARP, warps * 32
    frag = Lanes(_FLOAT32, _ROWS, x.lane)
    dr, u = x.shared.take(_ROWS, _STEP, "float32"), x.shared.take(_STEP, wide, "float32")
    x.shared.open()
    split, i0 = named(T.truncmod(x.block, x.splits), "split"), named(T.truncdiv(x.block, x.splits) * _ROWS, "i0")
    bh = x.row
    rows = Rows(x.u, number, plan.DK, origin_of(x, bh), x.H)
    acc = frag.accumulators(32)
    frag.clear(acc, 32)
    # Gates that read a segment are those of the tokens from its end to the end of its sequence.
    last = named(T.min(i0 + _ROWS, x.N) - 1, "last")
    right = named(x.seg_end[x.seg_past_end[last] - 1], "right")
    low = named(x.seg_end[i0], "low")
    span = named(T.truncdiv(T.truncdiv(right - low + x.splits - 1, x.splits) + _STEP - 1, _STEP) * _STEP, "span")
    begin = named(low + split * span, "first_token")
    end = named(T.min(begin + span, right), "last_token")
    with loop(begin, end, _STEP, trips=f"split {_ROWS} {_STEP}") as t0:
        barrier()
        with loop(x.thread, _ROWS * _STEP, threads, trips=f"times {_ROWS * _STEP // threads}") as index:
            r, c = named(T.truncdiv(index, _STEP), "r"), named(T.truncmod(index, _STEP), "c")
            found, i, t = registers(1, name="found"), named(i0 + r, "i"), named(t0 + c, "t")
            store(found, 0, T.float32(0))
            with when(T.And(i < x.N, t < end)), when(t >= x.seg_end[i]), when(t < x.seg_end[x.seg_past_end[i] - 1]):
                store(found, 0, x.dr[(bh * x.N + i) * x.T + t])
            store(dr.numbers, r * dr.cols + c, found[0])
        with loop(x.thread, _STEP * wide, threads, trips=f"times {_STEP}") as index:
            r, c = named(T.truncdiv(index, wide), "r"), named(T.truncmod(index, wide), "c")
            found = registers(1, name="found")
            store(found, 0, T.float32(0))
            with when(T.And(t0 + r < end, c < plan.DK)):
                store(found, 0, rows.load(t0 + r, c))
            store(u.numbers, r * u.cols + c, found[0])
        barrier()
        frag.product(acc, 32, Operand(dr), Operand(u, col=x.warp * 32), _STEP)
    for place, slot, col in frag.elements(32):
        i, column = i0 + frag.row(slot), x.warp * 32 + col
        with when(T.And(i < x.N, column < plan.SK)):
            length = T.cast(x.seg_end[i] - x.seg_begin[i], "float32")
            store(x.dmeans, ((split * x.heads + bh) * x.N + i) * plan.SK + column, acc[place] / length)


def pulls(plan: Plan) -> Kernel:
    """How the tokens of a piece pull at the keys of earlier pieces of their segment, a column a thread."""
    arguments = (
        pointers(plan.number.stored, "u") | pointers("float32", "pull", "pulls") | pointers("int32", "begin", "end")
    )
    return kernel(
        "pulls", -(-plan.SK // WARP), arguments | dict.fromkeys(("T", "H", "P"), "int32"), lambda x: _pulls(plan, x)
    )


def _pulls(plan: Plan, x: Any) -> None:
    piece, bh = x.block, x.row
    rows = Rows(x.u, plan.number, plan.DK, origin_of(x, bh), x.H)
    total = registers(1, name="total")
    store(total, 0, T.float32(0))
    with when(x.thread < plan.DK), loop(x.begin[piece], x.end[piece], trips="piece 1") as t:
        add(total, 0, rows.load(t, x.thread) * x.pull[bh * x.T + t])
    with when(x.thread < plan.SK):
        store(x.pulls, (bh * x.P + piece) * plan.SK + x.thread, total[0])
