"""Gates of the read of a linear or SWLA Memory Caching layer, where they are learned (Eq. 8-10, 16-17).

    r_t^(i) = <u_t, p_i>        p_i the mean key of a cached segment; of the online one, the mean of its keys up to t
    gamma_t = softmax of r_t    over the segments up to t's; under ssc over t's and the top_k cached ones

What is written are logits, with -inf for what ssc does not choose, and the logarithm of the sum of their exponentials:
gamma = exp(logit - lse). Logits have float32 accuracy: the keys up to t are added up in float32, and mean keys are
split into two numbers of 16 bits, whose products with u are exact.

Some threads have the logits of one token each: what it has written of them it reads again without a barrier.
"""

from typing import Any

from tvm.script import tirx as T

from ..copies import Copy, Rows
from ..fragments import Fragments, Operand
from ..instructions import fragments
from ..kernel import (
    Kernel,
    Tile,
    add,
    barrier,
    infinity,
    kernel,
    loop,
    named,
    pointers,
    registers,
    store,
    sum_of_lanes,
    when,
)
from ..plan import Place, Plan, place_of, plan_of

_FIRST = 16
"""Tokens whose running sums of keys are held at once."""


def build(problem: Any, config: Any, target: Any) -> list[Kernel]:
    """The kernel of the gates."""
    plan = plan_of(problem, config)
    stored = plan.number.stored
    arguments = pointers(stored, "u", "k") | pointers("float32", "means", "sums", "running", "logits", "lse")
    arguments |= pointers("int32", "begin", "end", "segment", "seg_begin", "seg_first", "seg_piece", "tiles")
    arguments |= dict.fromkeys(("many", "ahead", "top_k", "T", "H", "N", "P"), "int32")
    return [kernel("gates", plan["gates_warps"], arguments, lambda x: _Gates(plan, x).run())]


class _Gates:
    """A block at work: a token a thread; threads that are left over take part in what all of them do."""

    def __init__(self, plan: Plan, x: Any) -> None:
        self.plan, self.x, number = plan, x, plan.number
        self.R, self.BN, self.threads = plan["gates_rows"], plan["gates_BN"], 32 * plan["gates_warps"]
        self.BT = plan["gates_warps"] * self.R
        self.frag: Fragments = fragments(number, plan.instruction, self.R, x.lane)
        self.u = x.shared.take(self.BT, plan.SK, number.stored)
        below = x.shared.bytes
        self.high = x.shared.take(self.BN, plan.SK, number.stored)
        self.low = None if number.wide else x.shared.take(self.BN, plan.SK, number.stored)
        self.scores = x.shared.take(self.BN, self.BT, "float32", room=16)
        self.owns = x.shared.take(1, self.BT, "float32", room=0)
        # Before the means of segments come, the running sums of keys.
        self.running = x.shared.take(_FIRST, plan.SK, "float32", room=16, at=below)
        x.shared.open()
        self.at: Place = place_of(x, x.block, self.BT)
        self.t = named(self.at.first + x.thread, "t")
        mine = self.t < self.at.stop
        self.valid = named(mine if self.BT == self.threads else T.And(x.thread < self.BT, mine), "valid")
        self.own = registers(1, name="own")
        self.top, self.size = registers(1, name="top"), registers(1, name="size")

    def run(self) -> None:
        plan, x, at = self.plan, self.x, self.at
        copy = Copy(self.BT, plan.SK, self.threads, plan.number)
        held = copy.room("rows_of_u")
        copy.fetch(x.thread, Rows(x.u, plan.number, plan.DK, at.origin, x.H), at.first, at.stop, 0, held)
        copy.put(x.thread, held, self.u)
        self._online()
        store(self.top, 0, self.own[0])
        store(self.size, 0, T.float32(1))
        with loop(at.oldest, at.segment, self.BN, trips=f"cached {self.BT} {self.BN}") as i0:
            self._cached(i0)
        line = at.bh * x.N * x.T
        if plan.flags.sparse:
            with when(self.valid):
                self._choose(line)
        with when(self.valid):
            store(x.lse, at.bh * x.T + self.t, self.top[0] + T.log(self.size[0]))
            store(x.logits, line + at.segment * x.T + self.t, self.own[0])

    def _online(self) -> None:
        """<u_t, p_s> with the mean of the online segment's keys up to t: keys are added up, some tokens at a time."""
        plan, x, at = self.plan, self.x, self.at
        keys = RunningKeys(plan, x, at, self.running, self.threads, self.BT)
        with loop(at.first, at.stop, _FIRST, trips=f"times {self.BT // _FIRST}") as first:
            barrier()
            keys.put(first)
            barrier()
            self._products(first - at.first)
        barrier()
        begin = named(x.seg_begin[at.segment], "segment_begin")
        store(self.own, 0, T.float32(0))
        with when(self.valid):
            store(self.own, 0, self.owns.numbers[x.thread] / T.cast(self.t - begin + 1, "float32"))

    def _products(self, base: Any) -> None:
        """Products of rows of u with the sums of keys up to them, by some threads each."""
        plan, x = self.plan, self.x
        parts = self.threads // _FIRST
        row, part = named(T.truncdiv(x.thread, parts), "row"), named(T.truncmod(x.thread, parts), "part")
        product = registers(1, name="product")
        store(product, 0, T.float32(0))
        with loop(0, plan.SK // parts) as i:
            d = i * parts + part
            u = plan.number.load(self.u.numbers[(base + row) * self.u.cols + d])
            add(product, 0, u * self.running.numbers[row * self.running.cols + d])
        sum_of_lanes(product, parts)
        with when(part == 0):
            store(self.owns.numbers, base + row, product[0])

    def _cached(self, i0: Any) -> None:
        """The logits of BN cached segments, and their part of the softmax."""
        plan, x, at, frag, BN = self.plan, self.x, self.at, self.frag, self.BN
        barrier()
        self._load_means(i0)
        barrier()
        acc = frag.accumulators(BN, "logits_acc")
        frag.clear(acc, BN)
        rows = Operand(self.u, row=named(x.warp * self.R, "above"))
        if self.low is not None:
            frag.product(acc, BN, rows, Operand(self.low, transposed=True), plan.SK)
        frag.product(acc, BN, rows, Operand(self.high, transposed=True), plan.SK)
        for place, slot, col in frag.elements(BN):
            store(self.scores.numbers, col * self.scores.cols + x.warp * self.R + frag.row(slot), acc[place])
        barrier()
        with when(self.valid), loop(i0, T.min(i0 + BN, at.segment), trips=f"share {self.BT} {BN}") as i:
            score = named(self.scores.numbers[(i - i0) * self.scores.cols + x.thread], "score")
            store(x.logits, (at.bh * x.N + i) * x.T + self.t, score)
            if not plan.flags.sparse:
                self._soften(score)

    def _load_means(self, i0: Any) -> None:
        """Mean keys, split into two numbers whose sum they are."""
        plan, x, at, BN = self.plan, self.x, self.at, self.BN
        with loop(x.thread, BN * plan.SK, self.threads, trips=f"times {BN * plan.SK // self.threads}") as index:
            row, d = named(T.truncdiv(index, plan.SK), "mean_row"), named(T.truncmod(index, plan.SK), "d")
            mean = mean_key(plan, x, at, i0 + row, d)
            if self.low is None:
                store(self.high.numbers, row * self.high.cols + d, mean)
            else:
                high = named(plan.number.round(mean), "high")
                store(self.high.numbers, row * self.high.cols + d, high)
                rest = plan.number.round(mean - plan.number.load(high))
                store(self.low.numbers, row * self.low.cols + d, rest)

    def _soften(self, score: Any) -> None:
        """The softmax goes on with one more logit."""
        higher = named(T.max(self.top[0], score), "higher")
        store(self.size, 0, self.size[0] * T.exp(self.top[0] - higher) + T.exp(score - higher))
        store(self.top, 0, higher)

    def _choose(self, line: Any) -> None:
        """The softmax over the best top_k; -inf for the logits of the others. Of equal ones the earlier is better."""
        x, at = self.x, self.at
        least, latest = registers(1, name="least"), registers(1, "int32", "latest")
        store(least, 0, infinity())
        store(latest, 0, T.int32(-1))
        with loop(0, T.min(x.top_k, at.segment - at.oldest), trips="top_k"):
            best, which = registers(1, name="best"), registers(1, "int32", "which")
            store(best, 0, -infinity())
            store(which, 0, T.int32(-1))
            with loop(at.oldest, at.segment, trips=f"cached {self.BT} 1") as i:
                score = named(x.logits[line + i * x.T + self.t], "candidate")
                # After the last one that was taken, in the order of logits.
                after = T.Or(score < least[0], T.And(score == least[0], i > latest[0]))
                with when(T.And(after, score > best[0])):
                    store(best, 0, score)
                    store(which, 0, i)
            with when(which[0] >= 0):
                self._soften(best[0])
                store(least, 0, best[0])
                store(latest, 0, which[0])
        with loop(at.oldest, at.segment, trips=f"cached {self.BT} 1") as i:
            score = named(x.logits[line + i * x.T + self.t], "left")
            with when(T.Or(score < least[0], T.And(score == least[0], i > latest[0]))):
                store(x.logits, line + i * x.T + self.t, -infinity())


def mean_key(plan: Plan, x: Any, at: Place, i: Any, d: Any) -> Any:
    """A number of the mean key of a segment; 0 for those that are not cached yet."""
    mean = registers(1, name="mean_key")
    store(mean, 0, T.float32(0))
    with when(i < at.segment):
        store(mean, 0, x.means[(at.bh * x.N + i) * plan.SK + d])
    return mean[0]


class RunningKeys:
    """Sums of the online segment's keys up to each token, for as many tokens at once as ``tile`` has rows.

    Args:
        tile: in shared memory, ``[tokens, SK]`` of float32.
        threads: of the block, which share out the columns.
        tokens: of the block.
    """

    def __init__(self, plan: Plan, x: Any, at: Place, tile: Tile, threads: int, tokens: int) -> None:
        self.plan, self.x, self.at, self.tile, self.threads = plan, x, at, tile, threads
        self.keys = Rows(x.k, plan.number, plan.DK, at.origin, x.H)
        self.each = -(-plan.SK // threads)
        self.total = registers(self.each, name="keys_so_far")
        self.ahead = registers(tile.rows, name="keys_ahead")
        for n in range(self.each):
            _keys_before(plan, x, at, self.total, n, threads, self.keys, tokens)

    def put(self, first: Any) -> None:
        """The sums of the next tokens, from ``first`` on, into the tile; others see them after a barrier."""
        plan, tile, total, ahead = self.plan, self.tile, self.total, self.ahead
        for n in range(self.each):
            column = self.x.thread + n * self.threads
            for j in range(tile.rows):
                store(ahead, j, T.float32(0))
                with when(T.And(column < plan.DK, first + j < self.at.stop)):
                    store(ahead, j, self.keys.load(first + j, column))
            for j in range(tile.rows):
                add(total, n, ahead[j])
                with when(column < plan.SK):
                    store(tile.numbers, j * tile.cols + column, total[n])


def _keys_before(plan: Plan, x: Any, at: Place, total: Any, n: int, threads: int, keys: Rows, tile: int) -> None:
    """A column of the segment's keys before a tile: of pieces before, of steps of the states, and the rest."""
    step = plan["states_BT"]
    column = named(x.thread + n * threads, "column")
    store(total, n, T.float32(0))
    known = registers(1, "int32", "known")
    store(known, 0, at.start)
    with when(T.And(x.ahead != 0, column < plan.SK)):
        store(known, 0, at.start + T.truncdiv(at.first - at.start, step) * step)
        row = at.bh * (T.truncdiv(x.T, step) + x.P) + T.truncdiv(known[0], step) + at.piece
        add(total, n, x.running[row * plan.SK + column])
    with (
        when(T.And(x.many != 0, column < plan.SK)),
        loop(x.seg_piece[at.segment], at.piece, trips=f"before {tile}") as p,
    ):
        add(total, n, x.sums[(at.bh * x.P + p) * plan.SK + column])
    with when(column < plan.DK), loop(known[0], at.first, trips=f"beyond {tile} {step}") as j:
        add(total, n, keys.load(j, column))
