"""A tile of tokens that reads memories: what the read and its gradient share.

    read_t = sum_j w_tj <a_t, b_j> c_j + e^{cum_t} a_t A  (what the piece's tokens up to t write, after what enters it)

In the read a, b, c are q, k, v, and states are read by rows: a_t M. In its gradient they are dy, v, k, and states are
read by columns: a_t M^T.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from ..copies import Copy, Rows
from ..fragments import Fragments, Operand
from ..instructions import fragments
from ..kernel import barrier, choose, landed, loop, named, registers, store, when
from ..plan import Place, Plan, place_of
from .tokens import Tokens


@dataclass(frozen=True)
class Roles:
    """Which arrays are a, b and c, their widths, and whether states are ``turned``."""

    a: str
    b: str
    c: str
    turned: bool

    def inner(self, plan: Plan) -> tuple[int, int]:
        """Width of a and b, as it is and as states have it."""
        return (plan.DV, plan.SV) if self.turned else (plan.DK, plan.SK)

    def outer(self, plan: Plan) -> tuple[int, int]:
        """Width of c and of what is read."""
        return (plan.DK, plan.SK) if self.turned else (plan.DV, plan.SV)


READ = Roles("q", "k", "v", False)
GRADIENT = Roles("dy", "v", "k", True)


class Reading(Tokens):
    """A block at work: its tile of tokens, some columns of what is read, its shared memory, and the rows of its warps.

    Args:
        prefix: of the parameters: warps, rows (of a warp), BJ (tokens of a step inside the piece), stages, prefetch.
        columns: of what is read, that a block has.
    """

    def __init__(self, plan: Plan, x: Any, roles: Roles, prefix: str, columns: int) -> None:
        self.plan, self.x, self.roles, number = plan, x, roles, plan.number
        self.R, self.BJ, self.stages = plan[f"{prefix}_rows"], plan[f"{prefix}_BJ"], plan[f"{prefix}_stages"]
        self.ahead = plan[f"{prefix}_prefetch"]
        self.BT, self.threads = plan[f"{prefix}_warps"] * self.R, 32 * plan[f"{prefix}_warps"]
        (self.DI, self.SI), (self.DO, self.SO) = roles.inner(plan), roles.outer(plan)
        self.BO = min(columns, self.SO)
        self.frag: Fragments = fragments(number, plan.instruction, self.R, x.lane)
        shared = x.shared
        self.a = shared.take(self.BT, self.SI, number.stored)
        below = shared.bytes
        self.b = shared.take(self.BJ, self.SI, number.stored)
        self.c = shared.take(self.BJ, self.BO, number.stored)
        self.direct = hasattr(self.frag, "hold_sums")
        self.scores = None if self.direct else shared.take(self.BT, self.BJ, number.stored)
        # States are read when the piece's own tokens are done with.
        self.height, self.across = (self.BO, self.SI) if roles.turned else (self.SI, self.BO)
        self.m = shared.take(self.height * self.stages, self.across, number.stored, at=below)
        shared.open()
        blocks = -(-self.DO // self.BO)
        self.part = named(T.truncmod(x.block, blocks), "part") if blocks > 1 else 0
        self.column = named(self.part * self.BO, "column") if blocks > 1 else 0
        self.at: Place = place_of(x, T.truncdiv(x.block, blocks) if blocks > 1 else x.block, self.BT)
        self.above = named(x.warp * self.R, "above")
        self.state = Copy(self.height, self.across, self.threads, number)
        self.acc = self.frag.accumulators(self.BO)
        self.frag.clear(self.acc, self.BO)
        self.load(self.a, self.rows(getattr(x, roles.a), self.DI), self.at.first, self.at.stop)

    # --- states

    def part_of(self, array: Any, index: Any) -> tuple[Rows, Any, int, Any]:
        """The block's part of a state: its rows, the first, one past the last that there is, the first column."""
        source = Rows(array, self.plan.number, self.plan.SV, index * self.plan.SK, 1)
        return (source, self.column, self.plan.SK, 0) if self.roles.turned else (source, 0, self.plan.SK, self.column)

    def fetch(self, array: Any, index: Any, held: Any) -> None:
        """The block's part of a state, into registers."""
        self.state.fetch(self.x.thread, *self.part_of(array, index), held)

    def put(self, held: Any, above: Any = 0) -> None:
        """From registers into shared memory, where all see it; ``above``: the tile's row."""
        self.state.put(self.x.thread, held, self.m, above)
        barrier()

    @contextmanager
    def cached(self, before: Callable[[Any], Any]) -> Iterator[tuple[Any, Any, Any]]:
        """A loop over cached states: the segment, what ``before`` makes of it, and the row where the state begins.

        The next state is ``ahead``, while this one is read: in ``registers``, on its way into shared memory (``async``)
        or not at all (``none``).
        """
        x, at = self.x, self.at

        def state_of(i: Any) -> Any:
            return at.bh * x.P + x.seg_last[i]

        def stage(i: Any) -> Any:
            return named(T.truncmod(i - at.oldest, 2) * self.height, "stage") if self.stages == 2 else 0

        def start(i: Any) -> None:
            if self.ahead == "async":
                self.state.start(x.thread, *self.part_of(x.operand, state_of(i)), self.m, stage(i))
            else:
                self.fetch(x.operand, state_of(i), held)

        held = None if self.ahead == "async" else self.state.room("next_state")
        if self.ahead != "none":
            with when(at.oldest < at.segment):
                start(at.oldest)
        with loop(at.oldest, at.segment, trips=f"cached {self.BT} 1") as i:
            given = before(i)
            above = stage(i)
            if self.ahead == "none":
                start(i)
            if self.ahead == "async":
                landed()
            if self.ahead == "async" or self.stages == 1:
                barrier()
            if self.ahead != "async":
                self.put(held, above)
            if self.ahead != "none":
                with when(i + 1 < at.segment):
                    start(i + 1)
            yield i, given, above

    def read_state(self, acc: Any, above: Any = 0, left: Any = None) -> None:
        """acc += a M, of the state in shared memory; ``left`` in the place of a."""
        state = Operand(self.m, row=above, transposed=self.roles.turned)
        self.frag.product(acc, self.BO, self.left if left is None else left, state, self.SI)

    @property
    def left(self) -> Operand:
        """The rows of a of a warp."""
        return Operand(self.a, row=self.above)

    # --- the online memory

    def online(self) -> None:
        """What is read of it, into ``acc``; every thread may then write to shared memory."""
        decays = self._entered()
        b, c = getattr(self.x, self.roles.b), getattr(self.x, self.roles.c)
        inner, outer = self.rows(b, self.DI), self.rows(c, self.DO)
        frag, at, BJ = self.frag, self.at, self.BJ
        with loop(at.start, at.stop, BJ, trips=f"online {self.BT} {BJ}") as first:
            barrier()
            stop = named(T.min(first + BJ, at.stop), "tokens_end")
            self.load(self.b, inner, first, stop)
            self.load(self.c, outer, first, stop, self.column)
            barrier()
            # A warp whose tokens come before all of these has nothing to do.
            with when(first < at.first + self.above + self.R):
                scores = frag.accumulators(BJ, "scores")
                frag.clear(scores, BJ)
                frag.product(scores, BJ, self.left, Operand(self.b, transposed=True), self.SI)
                self._weigh(scores, first, decays)
                if self.direct:
                    left: Any = frag.hold_sums(scores, BJ)
                else:
                    frag.put(scores, BJ, self.scores, self.above)
                    left = Operand(self.scores, row=self.above)
                frag.product(self.acc, self.BO, left, Operand(self.c), BJ)
        barrier()

    def _entered(self) -> Any:
        """What enters the piece, decayed; for SWLA the sums of g, and lam, of a thread's rows."""
        x, at = self.x, self.at
        cum = now = None
        if self.plan.flags.gated:
            cum = self.slots("cum_t", lambda token, _: x.cum[at.bh * x.T + token])
            now = self.slots("now_t", lambda token, _: x.now[at.bh * x.T + token])
        enters = named(x.entering[at.piece], "enters")
        with when(enters >= 0):
            held = self.state.room("entering_state")
            self.fetch(x.operand, at.bh * x.P + enters, held)
            self.put(held)
            self.read_state(self.acc)
            if self.plan.flags.gated:
                self.frag.scale(self.acc, self.BO, lambda slot: T.exp(cum[slot]))
                self._row_before(cum)
        return cum, now

    def _row_before(self, cum: Any) -> None:
        """What the token before the piece writes once more, with the strength of the piece's first token."""
        plan, x, at, frag = self.plan, self.x, self.at, self.frag
        strength = named(x.before[at.bh * x.P + at.piece], "strength")
        inner = self.rows(getattr(x, self.roles.b), self.DI)
        outer = self.rows(getattr(x, self.roles.c), self.DO)
        score = registers(frag.slots, "float32", "score")
        since = named(x.cum[at.bh * x.T + at.start], "since")
        for slot in range(frag.slots):
            store(score, slot, T.float32(0))
        with loop(0, self.DI) as d:
            key = named(inner.load(at.start - 1, d), "key")
            for slot in range(frag.slots):
                bits = self.a.numbers[(self.above + frag.row(slot)) * self.a.cols + d]
                store(score, slot, score[slot] + plan.number.load(bits) * key)
        for slot in range(frag.slots):
            store(score, slot, score[slot] * (strength * T.exp(cum[slot] - since)))
        for place, slot, col in frag.elements(self.BO):
            column = self.column + col
            with when(column < self.DO):
                store(self.acc, place, self.acc[place] + score[slot] * outer.load(at.start - 1, column))

    def _weigh(self, scores: Any, first: Any, decays: Any) -> None:
        """Scores times SWLA's weights of the writes, or 1; 0 for later tokens."""
        x, at = self.x, self.at
        cum, now = decays
        if cum is None:
            self.frag.each(
                scores,
                self.BJ,
                lambda score, slot, col: T.Select(self.token(slot) >= first + col, score, T.float32(0)),
            )
            return
        line = at.bh * x.T
        for place, slot, col in self.frag.elements(self.BJ):
            token, j = self.token(slot), first + col

            def earlier(place: int = place, slot: int = slot, j: Any = j) -> None:
                since = T.min(cum[slot] - x.cum[line + j + 1], T.float32(0))
                store(scores, place, scores[place] * (x.after[line + j] * T.exp(since)))

            def own(place: int = place, slot: int = slot, token: Any = token, j: Any = j) -> None:
                store(scores, place, scores[place] * T.Select(token == j, now[slot], T.float32(0)))

            choose(T.And(token > j, token < at.stop), earlier, own)

    # --- gates and results

    def gates(self) -> Callable[[Any], Any]:
        """What gives the learned gates of a segment, for a thread's rows; ``acc`` is weighed by those of its own."""
        x, at = self.x, self.at
        row = at.bh * x.N * x.T
        lse = self.slots("lse", lambda token, _: x.lse[at.bh * x.T + token])

        def gate(i: Any) -> Any:
            return self.slots("gate", lambda token, slot: T.exp(x.logits[row + i * x.T + token] - lse[slot]))

        own = gate(at.segment)
        self.frag.scale(self.acc, self.BO, lambda slot: own[slot])
        return gate

    def read_past(self) -> None:
        """All cached states at once, by their sum: gates are equal, and with the mean add up to 1."""
        x, at = self.x, self.at
        with when(at.segment > at.oldest):
            held = self.state.room("past_state")
            self.fetch(x.past, at.bh * x.N + at.segment, held)
            self.put(held)
            self.read_state(self.acc)
        if self.plan.flags.averages:
            share = named(T.float32(1) / T.cast(at.segment - at.oldest + 1, "float32"), "share")
            self.frag.scale(self.acc, self.BO, lambda slot: share)

    def store(self, array: Any, scale: Any) -> None:
        """What was read, times ``scale``, in the dtype of the operands."""
        plan, at = self.plan, self.at
        out = self.rows(array, self.DO)
        pairs = not plan.number.wide and self.DO % 2 == 0
        found = list(self.frag.elements(self.BO))
        for place, slot, col in found[:: 2 if pairs else 1]:
            token, column = self.token(slot), self.column + col
            inside = token < at.stop
            if self.DO % self.BO:
                inside = T.And(inside, column < self.DO)
            with when(inside):
                if pairs:
                    word = (out.origin + token * out.stride) * (self.DO // 2) + T.truncdiv(column, 2)
                    store(out.words, word, plan.number.pair(self.acc[place] * scale, self.acc[place + 1] * scale))
                else:
                    store(out.array, out.at(token, column), plan.number.round(self.acc[place] * scale))
