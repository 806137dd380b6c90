"""The read of a linear or SWLA Memory Caching layer on a GPU (Eq. 6-17).

    y_t = scale [ gamma_t^(s) q_t M_t + sum_{i < s} gamma_t^(i) q_t M^(i) ]

A block has a tile of tokens of one head, and some value columns; a warp has some of the tile's rows. The online memory
at t is what enters the piece and what its tokens up to t write. Cached states are read one after another: with learned
gates each by a product of its own, whose rows are weighed (``per_segment``), or by a product of weighed rows of q
(``gated``), so that all are added up where products are; residual and mean read the sum of the states instead.
"""

from typing import Any

from tvm.script import tirx as T

from ..copies import Copy, Rows
from ..fragments import Fragments, Operand, fragments
from ..kernel import Tile, barrier, choose, kernel, loop, named, pointers, registers, store, when
from ..plan import Place, Plan, place_of, plan_of

_SPANS = ("begin", "end", "segment", "entering", "seg_first", "seg_last", "tiles")


def build(problem: Any, config: Any, target: Any) -> list[Any]:
    """The kernel of the read."""
    plan = plan_of(problem, config)
    return [read(plan)]


def read(plan: Plan) -> Any:
    """One kernel for all aggregations: flags decide."""
    stored = plan.number.stored
    arguments = pointers(stored, "q", "k", "v", "operand", "y")
    if plan.flags.gated:
        arguments |= pointers("float32", "cum", "now", "after", "before")
    arguments |= pointers("float32", "logits", "lse") if plan.flags.routed else pointers(stored, "past")
    arguments |= pointers("int32", *_SPANS)
    arguments |= {"scale": "float32", **dict.fromkeys(("T", "H", "N", "P"), "int32")}
    name = "read_gated" if plan.flags.routed else "read_summed"
    return kernel(name, plan["read_warps"], arguments, lambda x: _read(plan, x))


class _Work:
    """A block at work: its tile of tokens, its shared memory, and the rows of its warps."""

    def __init__(self, plan: Plan, x: Any) -> None:
        self.plan, self.x = plan, x
        number, self.warps, self.R = plan.number, plan["read_warps"], plan["read_rows"]
        self.BT, self.BJ, self.BV = self.warps * self.R, plan["read_BJ"], min(plan["read_BV"], plan.SV)
        self.threads = 32 * self.warps
        self.frag: Fragments = fragments(number, plan.instruction, self.R, x.lane)
        shared = x.shared
        self.q = shared.take(self.BT, plan.SK, number.stored)
        below = shared.bytes
        self.k = shared.take(self.BJ, plan.SK, number.stored)
        self.v = shared.take(self.BJ, self.BV, number.stored)
        self.direct = hasattr(self.frag, "hold_sums")
        self.scores = None if self.direct else shared.take(self.BT, self.BJ, number.stored)
        # States are read when the piece's own tokens are done with.
        self.stages = plan["read_stages"]
        self.m = shared.take(plan.SK * self.stages, self.BV, number.stored, at=below)
        shared.open()
        blocks = -(-plan.DV // self.BV)
        self.column = named(T.truncmod(x.block, blocks) * self.BV, "column") if blocks > 1 else 0
        self.at: Place = place_of(x, T.truncdiv(x.block, blocks) if blocks > 1 else x.block, self.BT)
        self.above = named(x.warp * self.R, "above")
        self.state = Copy(plan.SK, self.BV, self.threads, number)
        self.acc = self.frag.accumulators(self.BV)

    def token(self, slot: int) -> Any:
        """The token of a thread's row."""
        return self.at.first + self.above + self.frag.row(slot)

    def slots(self, name: str, value: Any) -> Any:
        """Registers with ``value(token, slot)`` for each of a thread's rows; 0 beyond the tile."""
        held = registers(self.frag.slots, "float32", name)
        for slot in range(self.frag.slots):
            token = self.token(slot)
            store(held, slot, T.float32(0))
            with when(token < self.at.stop):
                store(held, slot, value(token, slot))
        return held

    def rows(self, array: Any, width: int) -> Rows:
        """The rows of the block's head."""
        return Rows(array, self.plan.number, width, self.at.origin, self.x.H)

    def states(self, array: Any, index: Any) -> Rows:
        """The rows of a state."""
        return Rows(array, self.plan.number, self.plan.SV, index * self.plan.SK, 1)

    def load(self, tile: Tile, source: Rows, first: Any, stop: Any, column: Any, cols: int) -> None:
        """Rows into a tile; all threads have part in it, and see them after a barrier."""
        copy = Copy(tile.rows, cols, self.threads, self.plan.number)
        held = copy.room("loaded")
        copy.fetch(self.x.thread, source, first, stop, column, held)
        copy.put(self.x.thread, held, tile)

    @property
    def query(self) -> Operand:
        """The rows of q of a warp."""
        return Operand(self.q, row=self.above)


def _read(plan: Plan, x: Any) -> None:
    work = _Work(plan, x)
    at, frag, acc, BV = work.at, work.frag, work.acc, work.BV
    frag.clear(acc, BV)
    work.load(work.q, work.rows(x.q, plan.DK), at.first, at.stop, 0, plan.SK)
    decays = _entered(work)
    _online(work, decays)
    if plan.flags.routed:
        _gated(work)
    else:
        _summed(work)
    _store(work)


def _entered(work: _Work) -> Any:
    """What enters the piece, decayed; for SWLA the sums of g, and lam, of a thread's rows."""
    plan, x, at, frag = work.plan, work.x, work.at, work.frag
    cum = now = None
    if plan.flags.gated:
        cum = work.slots("cum_t", lambda token, _: x.cum[at.bh * x.T + token])
        now = work.slots("now_t", lambda token, _: x.now[at.bh * x.T + token])
    enters = named(x.entering[at.piece], "enters")
    with when(enters >= 0):
        source = work.states(x.operand, at.bh * x.P + enters)
        held = work.state.room("entering_state")
        work.state.fetch(x.thread, source, 0, plan.SK, work.column, held)
        work.state.put(x.thread, held, work.m)
        barrier()
        frag.product(work.acc, work.BV, work.query, Operand(work.m), plan.SK)
        if plan.flags.gated:
            frag.scale(work.acc, work.BV, lambda slot: T.exp(cum[slot]))
            _row_before(work, cum)
    return cum, now


def _row_before(work: _Work, cum: Any) -> None:
    """What the token before the piece writes once more, with the strength of the piece's first token."""
    plan, x, at, frag = work.plan, work.x, work.at, work.frag
    strength = named(x.before[at.bh * x.P + at.piece], "strength")
    keys, values = work.rows(x.k, plan.DK), work.rows(x.v, plan.DV)
    score = registers(frag.slots, "float32", "score")
    since = named(x.cum[at.bh * x.T + at.start], "since")
    for slot in range(frag.slots):
        store(score, slot, T.float32(0))
    with loop(0, plan.DK) as d:
        key = named(keys.load(at.start - 1, d), "key")
        for slot in range(frag.slots):
            bits = work.q.numbers[(work.above + frag.row(slot)) * work.q.cols + d]
            store(score, slot, score[slot] + plan.number.load(bits) * key)
    for slot in range(frag.slots):
        store(score, slot, score[slot] * (strength * T.exp(cum[slot] - since)))
    for place, slot, col in frag.elements(work.BV):
        column = work.column + col
        with when(column < plan.DV):
            store(work.acc, place, work.acc[place] + score[slot] * values.load(at.start - 1, column))


def _online(work: _Work, decays: Any) -> None:
    """The piece's own tokens, BJ at a time: scores of q and k, causal and decayed, times v."""
    plan, x, at, frag, BJ = work.plan, work.x, work.at, work.frag, work.BJ
    keys, values = work.rows(x.k, plan.DK), work.rows(x.v, plan.DV)
    with loop(at.start, at.stop, BJ, trips=f"online {work.BT} {BJ}") as first:
        barrier()
        stop = named(T.min(first + BJ, at.stop), "tokens_end")
        work.load(work.k, keys, first, stop, 0, plan.SK)
        work.load(work.v, values, first, stop, work.column, work.BV)
        barrier()
        # A warp whose tokens come before all of these has nothing to do.
        with when(first < at.first + work.above + work.R):
            scores = frag.accumulators(BJ, "scores")
            frag.clear(scores, BJ)
            frag.product(scores, BJ, work.query, Operand(work.k, transposed=True), plan.SK)
            _weigh(work, scores, first, decays)
            if work.direct:
                left: Any = frag.hold_sums(scores, BJ)
            else:
                frag.put(scores, BJ, work.scores, work.above)
                left = Operand(work.scores, row=work.above)
            frag.product(work.acc, work.BV, left, Operand(work.v), BJ)
    barrier()


def _weigh(work: _Work, scores: Any, first: Any, decays: Any) -> None:
    """Scores times SWLA's weights of the writes, or 1; 0 for later tokens."""
    x, at = work.x, work.at
    cum, now = decays
    if cum is None:
        work.frag.each(
            scores,
            work.BJ,
            lambda score, slot, col: T.Select(work.token(slot) >= first + col, score, T.float32(0)),
        )
        return
    line = at.bh * x.T
    for place, slot, col in work.frag.elements(work.BJ):
        token, j = work.token(slot), first + col

        def earlier(place: int = place, slot: int = slot, j: Any = j) -> None:
            since = T.min(cum[slot] - x.cum[line + j + 1], T.float32(0))
            store(scores, place, scores[place] * (x.after[line + j] * T.exp(since)))

        def own(place: int = place, slot: int = slot, token: Any = token, j: Any = j) -> None:
            store(scores, place, scores[place] * T.Select(token == j, now[slot], T.float32(0)))

        choose(T.And(token > j, token < at.stop), earlier, own)


def _gated(work: _Work) -> None:
    """Every cached state with a gate of its own."""
    plan, x, at, frag, acc, BV = work.plan, work.x, work.at, work.frag, work.acc, work.BV
    row = at.bh * x.N * x.T
    lse = work.slots("lse", lambda token, _: x.lse[at.bh * x.T + token])

    def gates(i: Any, name: str) -> Any:
        return work.slots(name, lambda token, slot: T.exp(x.logits[row + i * x.T + token] - lse[slot]))

    own = gates(at.segment, "own_gate")
    frag.scale(acc, BV, lambda slot: own[slot])
    held_q = frag.hold(work.query, plan.SK) if plan["formulation"] == "gated" else None
    held = work.state.room("next_state")

    def fetch(i: Any) -> None:
        source = work.states(x.operand, at.bh * x.P + x.seg_last[i])
        work.state.fetch(x.thread, source, 0, plan.SK, work.column, held)

    ahead = plan["read_prefetch"] == "registers"
    if ahead:
        with when(at.oldest < at.segment):
            fetch(at.oldest)
    with loop(at.oldest, at.segment, trips=f"cached {work.BT} 1") as i:
        gate = gates(i, "gate")
        if not ahead:
            fetch(i)
        above: Any = 0
        if work.stages == 2:
            above = named(T.truncmod(i - at.oldest, 2) * plan.SK, "stage")
        else:
            barrier()
        work.state.put(x.thread, held, work.m, above)
        barrier()
        if ahead:
            with when(i + 1 < at.segment):
                fetch(i + 1)
        state = Operand(work.m, row=above)
        if held_q is not None:
            weighed = frag.scale_held(held_q, plan.SK, lambda slot: gate[slot])
            frag.product(acc, BV, weighed, state, plan.SK)
        else:
            part = frag.accumulators(BV, "part")
            frag.clear(part, BV)
            frag.product(part, BV, work.query, state, plan.SK)
            frag.add(acc, BV, part, lambda slot: gate[slot])


def _summed(work: _Work) -> None:
    """All cached states at once, by their sum; gates are equal."""
    plan, x, at, frag = work.plan, work.x, work.at, work.frag
    with when(at.segment > at.oldest):
        held = work.state.room("past_state")
        source = work.states(x.past, at.bh * x.N + at.segment)
        work.state.fetch(x.thread, source, 0, plan.SK, work.column, held)
        work.state.put(x.thread, held, work.m)
        barrier()
        frag.product(work.acc, work.BV, work.query, Operand(work.m), plan.SK)
    if plan.flags.averages:
        share = named(T.float32(1) / T.cast(at.segment - at.oldest + 1, "float32"), "share")
        frag.scale(work.acc, work.BV, lambda slot: share)


def _store(work: _Work) -> None:
    """y, of q's dtype."""
    plan, x, at, frag = work.plan, work.x, work.at, work.frag
    out = work.rows(x.y, plan.DV)
    pairs = not plan.number.wide and plan.DV % 2 == 0
    found = list(frag.elements(work.BV))
    for place, slot, col in found[:: 2 if pairs else 1]:
        token, column = work.token(slot), work.column + col
        inside = token < at.stop
        if plan.DV % work.BV:
            inside = T.And(inside, column < plan.DV)
        with when(inside):
            if pairs:
                word = (out.origin + token * out.stride) * (plan.DV // 2) + T.truncdiv(column, 2)
                value = plan.number.pair(work.acc[place] * x.scale, work.acc[place + 1] * x.scale)
                store(out.words, word, value)
            else:
                store(out.array, out.at(token, column), plan.number.round(work.acc[place] * x.scale))
