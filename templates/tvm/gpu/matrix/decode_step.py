"""A new token of a linear or SWLA Memory Caching layer over its cache, states read in place (Eq. 2, 4, 6-17, 26-27).

    M_t = e^{g_t} M_{t-1} + beta_t k_{t-1}^T v_{t-1} + lam_t k_t^T v_t          linear: M_t = M_{t-1} + k_t^T v_t
    y_t = gamma_t^(s) (q_t M_t) + sum_{i < s} gamma_t^(i) (q_t M^(i))

Bound by the bytes of the states, which are read once. Three kernels: the gates of a head; then the cached states, which
``splits`` blocks share, and one block more that writes the online state and reads it; then their sums, and what the
next token needs of this one. At a segment's end its state and mean key are appended to the cache.
"""

from typing import Any

from tvm.script import tirx as T

from ..kernel import (
    WARP,
    Kernel,
    add,
    barrier,
    infinity,
    kernel,
    lane_xor,
    loop,
    named,
    pointers,
    registers,
    store,
    sum_of_lanes,
    when,
)
from ..numbers import Number
from ..plan import Plan, plan_of

_THREADS = 128
_WARPS = _THREADS // WARP
_PLACE = ("capacity", "length", "uneven", "cached_all", "filled_all", "first", "total", "H")


def build(problem: Any, config: Any, target: Any) -> list[Kernel]:
    """The kernels of a step; that which reads states once for each dtype that states can be cached in."""
    plan = plan_of(problem, config)
    narrow = ("float16",) if target.arch in ("sm_70", "sm_75") else ("float16", "bfloat16")
    reads = [read(plan, Number(dtype)) for dtype in ("float32", *narrow)]
    return [*([gates(plan)] if plan.flags.routed else []), *reads, combine(plan)]


def _place(x: Any, bh: Any) -> tuple[Any, Any, Any, Any]:
    """States cached and tokens of the segment under way before the token, its row, and the cached states that fit."""
    b = named(T.truncdiv(bh, x.H), "b")
    used, begun = registers(1, "int32", "used"), registers(1, "int32", "begun")
    store(used, 0, x.cached_all)
    store(begun, 0, x.filled_all)
    with when(x.uneven != 0):
        store(used, 0, x.cached[b])
        store(begun, 0, x.filled[b])
    place = named(begun[0] + x.first, "place")
    slot = named(used[0] + T.truncdiv(place, x.length), "slot")
    row = named((b * x.total + x.first) * x.H + T.truncmod(bh, x.H), "token_row")
    return slot, named(T.truncmod(place, x.length), "filled_now"), row, named(T.min(slot, x.capacity), "states_now")


def gates(plan: Plan) -> Kernel:
    """``weights`` ``[B * H, capacity + 1]``: gates of the cached states, then that of the online one."""
    arguments = pointers(plan.number.stored, "u", "k") | pointers("float32", "descriptors", "key_sum", "weights")
    arguments |= pointers("int32", "cached", "filled") | dict.fromkeys((*_PLACE, "top_k"), "int32")
    return kernel("decode_gates", _WARPS, arguments, lambda x: _Gates(plan, x).run())


class _Gates:
    """A block at work: a head."""

    def __init__(self, plan: Plan, x: Any) -> None:
        self.plan, self.x = plan, x
        self.tops = x.shared.take(1, _WARPS, "float32", room=0)
        self.which = x.shared.take(1, _WARPS, "int32", room=0)
        x.shared.open()
        self.bh = x.block
        _, self.begun, self.row, self.count = _place(x, self.bh)
        self.line = named(self.bh * (x.capacity + 1), "line")
        self.own = named(self.line + x.capacity, "own_place")

    def run(self) -> None:
        plan, x = self.plan, self.x
        # A warp a state, its lanes along the keys.
        with loop(x.warp, self.count + 1, _WARPS, trips="states 4") as i:
            logit = registers(1, name="logit")
            store(logit, 0, T.float32(0))
            for d0 in range(0, plan.DK, WARP):
                d = named(x.lane + d0, "d")
                with when(d < plan.DK):
                    key = registers(1, name="key")
                    with when(i < self.count):
                        store(key, 0, x.descriptors[(self.bh * x.capacity + i) * plan.DK + d])
                    with when(i == self.count):
                        so_far = x.key_sum[self.bh * plan.DK + d] + plan.number.load(x.k[self.row * plan.DK + d])
                        store(key, 0, so_far / T.cast(self.begun + 1, "float32"))
                    add(logit, 0, plan.number.load(x.u[self.row * plan.DK + d]) * key[0])
            sum_of_lanes(logit)
            with when(x.lane == 0):
                with when(i < self.count):
                    store(x.weights, self.line + i, logit[0])
                with when(i == self.count):
                    store(x.weights, self.own, logit[0])
        barrier()
        least, latest = registers(1, name="least"), registers(1, "int32", "latest")
        store(least, 0, -infinity())
        store(latest, 0, T.int32(1 << 30))
        if plan.flags.sparse:
            self._choose(least, latest)
        self._normalise(least, latest)

    def _best(self, best: Any, which: Any) -> None:
        """The largest of the threads' logits, the first of equals: all threads get it."""
        x = self.x
        for distance in (1, 2, 4, 8, 16):
            value, number = named(lane_xor(best[0], distance), "value"), named(lane_xor(which[0], distance), "number")
            with when(T.Or(value > best[0], T.And(value == best[0], number < which[0]))):
                store(best, 0, value)
                store(which, 0, number)
        barrier()
        with when(x.lane == 0):
            store(self.tops.numbers, x.warp, best[0])
            store(self.which.numbers, x.warp, which[0])
        barrier()
        for warp in range(_WARPS):
            value, number = self.tops.numbers[warp], self.which.numbers[warp]
            with when(T.Or(value > best[0], T.And(value == best[0], number < which[0]))):
                store(best, 0, value)
                store(which, 0, number)

    def _choose(self, least: Any, latest: Any) -> None:
        """Logit and number of the last one of the best top_k cached states."""
        x = self.x
        store(least, 0, infinity())
        store(latest, 0, T.int32(-1))
        with loop(0, T.min(x.top_k, self.count), trips="top_k"):
            best, which = registers(1, name="best"), registers(1, "int32", "which")
            store(best, 0, -infinity())
            store(which, 0, T.int32(1 << 30))
            with loop(x.thread, self.count, _THREADS, trips=f"states {_THREADS}") as i:
                score = named(x.weights[self.line + i], "score")
                after = T.Or(score < least[0], T.And(score == least[0], i > latest[0]))
                better = T.Or(score > best[0], T.And(score == best[0], i < which[0]))
                with when(T.And(after, better)):
                    store(best, 0, score)
                    store(which, 0, i)
            self._best(best, which)
            store(least, 0, best[0])
            store(latest, 0, which[0])

    def _normalise(self, least: Any, latest: Any) -> None:
        """The softmax, without states that come after the last one that was chosen."""
        x = self.x
        top, which = registers(1, name="top"), registers(1, "int32", "of_top")
        store(top, 0, x.weights[self.own])
        store(which, 0, T.int32(1 << 30))
        with loop(x.thread, self.count, _THREADS, trips=f"states {_THREADS}") as i:
            store(top, 0, T.max(top[0], x.weights[self.line + i]))
        self._best(top, which)
        size = registers(1, name="size")
        store(size, 0, T.float32(0))
        with loop(x.thread, self.count, _THREADS, trips=f"states {_THREADS}") as i:
            score, weight = named(x.weights[self.line + i], "score"), registers(1, name="weight")
            store(weight, 0, T.exp(score - top[0]))
            with when(T.Or(score < least[0], T.And(score == least[0], i > latest[0]))):
                store(weight, 0, T.float32(0))
            store(x.weights, self.line + i, weight[0])
            add(size, 0, weight[0])
        sum_of_lanes(size)
        barrier()
        with when(x.lane == 0):
            store(self.tops.numbers, x.warp, size[0])
        barrier()
        own = named(T.exp(x.weights[self.own] - top[0]), "own")
        store(size, 0, own)
        for warp in range(_WARPS):
            add(size, 0, self.tops.numbers[warp])
        barrier()
        with loop(x.thread, self.count, _THREADS, trips=f"states {_THREADS}") as i:
            store(x.weights, self.line + i, x.weights[self.line + i] / size[0])
        with when(x.thread == 0):
            store(x.weights, self.own, own / size[0])


def read(plan: Plan, states: Number) -> Kernel:
    """``parts`` ``[B * H, splits + 1, DV]``: reads of shares of the cached states, then of the online one."""
    arguments = pointers(plan.number.stored, "q", "k", "v") | pointers(states.stored, "states")
    arguments |= pointers("float32", "online", "weights", "parts")
    if plan.flags.gated:
        arguments |= pointers("float32", "last_key", "last_value", "g", "beta", "lam")
    arguments |= pointers("int32", "cached", "filled")
    arguments |= {"scale": "float32", **dict.fromkeys((*_PLACE, "splits", "independent"), "int32")}
    name = f"decode_read_{states.dtype}"
    return kernel(name, _WARPS, arguments, lambda x: _Read(plan, states, x).run())


class _Read:
    """A block at work: some value columns, and a share of a head's states. Threads side by side have columns."""

    def __init__(self, plan: Plan, states: Number, x: Any) -> None:
        self.plan, self.states, self.x = plan, states, x
        self.BV = min(plan["decode_BV"], _THREADS)
        self.groups = _THREADS // self.BV
        self.q = x.shared.take(1, plan.SK, "float32", room=0)
        self.sums = x.shared.take(self.groups, self.BV, "float32", room=0)
        x.shared.open()
        blocks = -(-plan.DV // self.BV)
        self.bh, self.split = x.row, named(T.truncdiv(x.block, blocks), "split")
        self.slot, self.begun, self.row, self.count = _place(x, self.bh)
        self.group = named(T.truncdiv(x.thread, self.BV), "group")
        self.column = named(T.truncmod(x.block, blocks) * self.BV + T.truncmod(x.thread, self.BV), "column")
        self.acc = registers(1, name="acc")

    def run(self) -> None:
        plan, x, acc = self.plan, self.x, self.acc
        with when(x.thread < plan.DK):
            store(self.q.numbers, x.thread, plan.number.load(x.q[self.row * plan.DK + x.thread]) * x.scale)
        barrier()
        store(acc, 0, T.float32(0))
        with when(self.column < plan.DV):
            with when(self.split < x.splits):
                self._cached()
            with when(self.split == x.splits):
                self._online()
        store(self.sums.numbers, x.thread, acc[0])
        barrier()
        with when(T.And(self.group == 0, self.column < plan.DV)):
            for group in range(1, self.groups):
                add(acc, 0, self.sums.numbers[group * self.BV + x.thread])
            store(x.parts, (self.bh * (x.splits + 1) + self.split) * plan.DV + self.column, acc[0])

    def _weight(self, i: Any) -> Any:
        """The gate of a cached state."""
        if self.plan.flags.routed:
            return self.x.weights[self.bh * (self.x.capacity + 1) + i]
        if self.plan.flags.averages:
            return T.float32(1) / T.cast(self.slot + 1, "float32")
        return T.float32(1)

    def _cached(self) -> None:
        """A share of the cached states, each with its gate; of a gate of 0 nothing is read."""
        plan, x = self.plan, self.x
        low = named(T.truncdiv(self.split * self.count, x.splits), "low")
        high = named(T.truncdiv((self.split + 1) * self.count, x.splits), "high")
        rows = -(-plan.DK // self.groups)
        with loop(low, high, trips="share_of_states") as i:
            weight = named(self._weight(i), "weight")
            with when(weight != T.float32(0)):
                total = registers(1, name="total")
                store(total, 0, T.float32(0))
                first = named((self.bh * x.capacity + i) * plan.DK, "first_row")
                with loop(0, rows) as n:
                    d = named(n * self.groups + self.group, "d")
                    inside = d < plan.DK if plan.DK % self.groups else None

                    def row(d: Any = d, total: Any = total, first: Any = first) -> None:
                        state = self.states.load(x.states[(first + d) * plan.DV + self.column])
                        add(total, 0, self.q.numbers[d] * state)

                    if inside is None:
                        row()
                    else:
                        with when(inside):
                            row()
                add(self.acc, 0, weight * total[0])

    def _online(self) -> None:
        """The online state: written, read, and at a segment's end appended."""
        plan, x, number = self.plan, self.x, self.plan.number
        value = named(number.load(x.v[self.row * plan.DV + self.column]), "value")
        if plan.flags.gated:
            decay, again = named(T.exp(x.g[self.row]), "decay"), named(x.beta[self.row], "again")
            last = named(x.last_value[self.bh * plan.DV + self.column], "last_value_here")
            value = named(x.lam[self.row] * value, "strong")
        ends = named(self.begun + 1 == x.length, "ends")
        with loop(0, -(-plan.DK // self.groups)) as n:
            d = named(n * self.groups + self.group, "d")
            with when(d < plan.DK):
                place = named((self.bh * plan.DK + d) * plan.DV + self.column, "place_of_state")
                state = registers(1, name="state")
                store(state, 0, x.online[place])
                if plan.flags.gated:
                    store(state, 0, state[0] * decay + again * x.last_key[self.bh * plan.DK + d] * last)
                add(state, 0, number.load(x.k[self.row * plan.DK + d]) * value)
                add(self.acc, 0, self.q.numbers[d] * state[0])
                with when(T.And(ends, self.slot < x.capacity)):
                    to = ((self.bh * x.capacity + self.slot) * plan.DK + d) * plan.DV + self.column
                    store(x.states, to, self.states.round(state[0]))
                with when(T.And(ends, x.independent != 0)):
                    store(state, 0, T.float32(0))
                store(x.online, place, state[0])
        store(self.acc, 0, self.acc[0] * self._weight(x.capacity))


def combine(plan: Plan) -> Kernel:
    """y, and what the next token needs: the sum of keys, the last key and value; at a segment's end its mean key."""
    stored = plan.number.stored
    arguments = pointers(stored, "k", "v", "y") | pointers("float32", "parts", "descriptors", "key_sum")
    if plan.flags.gated:
        arguments |= pointers("float32", "last_key", "last_value")
    arguments |= pointers("int32", "cached", "filled") | dict.fromkeys((*_PLACE, "splits", "independent"), "int32")
    return kernel("decode_combine", _WARPS, arguments, lambda x: _combine(plan, x))


def _combine(plan: Plan, x: Any) -> None:
    bh, number = x.block, plan.number
    slot, begun, row, _ = _place(x, bh)
    ends = named(begun + 1 == x.length, "ends")
    with when(x.thread < plan.DV):
        total = registers(1, name="total")
        store(total, 0, T.float32(0))
        with loop(0, x.splits + 1, trips="splits") as part:
            add(total, 0, x.parts[(bh * (x.splits + 1) + part) * plan.DV + x.thread])
        store(x.y, row * plan.DV + x.thread, number.round(total[0]))
    with when(x.thread < plan.DK):
        key = named(number.load(x.k[row * plan.DK + x.thread]), "key")
        so_far = registers(1, name="so_far")
        store(so_far, 0, x.key_sum[bh * plan.DK + x.thread] + key)
        with when(ends):
            with when(slot < x.capacity):
                mean = so_far[0] / T.cast(x.length, "float32")
                store(x.descriptors, (bh * x.capacity + slot) * plan.DK + x.thread, mean)
            store(so_far, 0, T.float32(0))
        store(x.key_sum, bh * plan.DK + x.thread, so_far[0])
    if plan.flags.gated:
        forgets = T.And(ends, x.independent != 0)
        for last, source, width in ((x.last_key, x.k, plan.DK), (x.last_value, x.v, plan.DV)):
            with when(x.thread < width):
                kept = registers(1, name="kept")
                store(kept, 0, number.load(source[row * width + x.thread]))
                with when(forgets):
                    store(kept, 0, T.float32(0))
                store(last, bh * width + x.thread, kept[0])
