"""Reads of a deep memory whose every parameter is the weighted mean of the states' (Eq. 14-15).

    h_t = gamma^(s) q U_t + sum_{i < s} gamma^(i) q U^(i),  z = gelu(h)
    y_t = gamma^(s) z W_t + sum_{i < s} gamma^(i) z W^(i)

Two gated reads with one gelu between. What z reads of W_t follows a second walk of the segment's chunks, whose rows
``deep_write`` has left.
"""

from functools import partial

from tvm.script import tirx as T

from ..kernel import emit, f32, scratch
from ..tiles import LANES, clear, columns
from .tiles import activate, add_row, copy, product, scaled
from .walk import coefficients, gates_of, leave_layer, put_rows, read_layer, take_rows, tiles


def mix_block(plan, at, *, t0, rows, seen) -> None:
    """h of a block of tokens, and the part of y that comes of cached states."""
    Dk, Dv, E, MR, NR, past, base = plan.Dk, plan.Dv, plan.E, plan.rows, plan.cols, at.past, at.base
    H, HT, C, own, row0, heads = at.H, at.HT, at.C, at.own, at.row0, at.heads

    def first(i):
        gated = partial(scaled, C=H, gate=at.gamma, i=i)
        return product(NR, plan.unroll, gated, A=at.QT, B=at.up, b0=(base + i) * Dk, steps=Dk)

    def second(i):
        gated = partial(scaled, C=C, gate=at.gamma, i=i)
        return product(NR, plan.unroll, gated, A=HT, B=at.down, b0=(base + i) * E, steps=E)

    @emit
    def products():
        for t in range(rows):
            at.own_of[seen + t] = own[0, t]
            for e in range(E // LANES):
                for x in T.vectorized(LANES):
                    H[t, e * LANES + x] = own[0, t] * at.hidden[row0 + (t0 + t) * heads, e * LANES + x]
        for i in range(past):
            tiles(rows, E, MR, NR, first(i), room=plan.chunk)
        put_rows(at, H, at.mixture, E, t0=t0, rows=rows)
        activate(H, rows, E)
        columns(H, E, 0, 1, 0, rows, HT)
        clear(C, 0, rows, Dv)
        for i in range(past):
            tiles(rows, Dv, MR, NR, second(i), room=plan.chunk)
        for t in range(rows):
            if at.adds_input > 0:
                add_row(C, t, at.scale, at.q, row0 + (t0 + t) * heads, plan.both)
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    at.y[row0 + (t0 + t) * heads, n * LANES + x] = C[t, n * LANES + x]


def second_of_online(plan, at) -> None:
    """y += gamma^(s) z W_t, chunk by chunk."""
    E, Dv, BP = plan.E, plan.Dv, at.BP
    more = dict(ZT=f32(E, BP), ZQ=f32(BP, E), ZQT=f32(E, BP), Y=f32(BP, Dv))
    walk_second(plan, without(at, "lanes", "own", "last"), more, one_chunk)


def walk_second(plan, at, more, chunk) -> None:
    """A segment's inner chunks one after another, with the second layer at hand and the rows of its writes.

    ``chunk(plan, at, *, t0, rows)`` reads W, SW, Z and ERR; ``more`` is the scratch that it takes.
    """
    s, E, Dv, inner, BP = at.s, plan.E, plan.Dv, at.inner, at.BP
    own = scratch(
        W=f32(E, Dv), SW=f32(E, Dv), Z=f32(BP, E), ERR=f32(BP, Dv), P=f32(BP, BP), weighed=f32(BP, E),
        carried=f32(BP, E), sum_of_rows=f32(1), **more,
    )  # fmt: skip
    here = at.plus(own)
    w = here.plus(gates_of(plan, here))
    layer = dict(inputs=w.Z, width=E, errors=w.ERR, cols=Dv, state=w.W, momentum=w.SW)

    @emit
    def walk():
        enter(plan, w)
        for c in range((at.length + inner - 1) // inner):
            t0: T.let = at.begin[s] + c * inner
            rows: T.let = T.min(inner, at.end[s] - t0)
            take_rows(at.rows_h, E, at, w.Z, t0=t0, rows=rows)
            activate(w.Z, rows, E)
            take_rows(at.rows_err, Dv, at, w.ERR, t0=t0, rows=rows)
            coefficients(plan, w, t0=t0, rows=rows)
            chunk(plan, w, t0=t0, rows=rows)
            leave_layer(plan, w, **layer, rows=rows)


def without(at, *names):
    """The values but for some, whose names others need."""
    return type(at)(**{name: value for name, value in vars(at).items() if name not in names})


def enter(plan, at) -> None:
    """The second layer, and its momentum, where the segment starts."""
    E, Dv, s = plan.E, plan.Dv, at.s

    @emit
    def states():
        if plan.flags.checkpoint:
            if at.past > 0:
                copy(at.down, (at.base + at.past - 1) * E, at.W, 0, E, Dv)
            else:
                copy(at.W_down, at.bh % at.heads * E, at.W, 0, E, Dv)
        else:
            copy(at.W_down, at.bh % at.heads * E, at.W, 0, E, Dv)
        if plan.flags.enters:
            copy(at.enter_down, (at.bh * at.N + s) * E, at.SW, 0, E, Dv)
        elif plan.flags.momentum:
            clear(at.SW, 0, E, Dv)


def one_chunk(plan, at, *, t0, rows) -> None:
    """What the tokens of an inner chunk read."""
    E, Dv, Y, row0, heads = plan.E, plan.Dv, at.Y, at.row0, at.heads
    layer = dict(width=E, state=at.W, momentum=at.SW, inputs=at.ZT, errors=at.ERR, cols=Dv, rows=rows)

    @emit
    def steps():
        take_rows(at.mixture, E, at, at.ZQ, t0=t0, rows=rows)
        activate(at.ZQ, rows, E)
        columns(at.Z, E, 0, 1, 0, at.BP, at.ZT)
        columns(at.ZQ, E, 0, 1, 0, at.BP, at.ZQT)
        read_layer(plan, at, **layer, XT=at.ZQT, out=Y)
        for t in range(rows):
            own: T.let = at.own_of[t0 - at.begin[at.s] + t]
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    at.y[row0 + (t0 + t) * heads, n * LANES + x] = (
                        at.y[row0 + (t0 + t) * heads, n * LANES + x] + own * Y[t, n * LANES + x]
                    )  # fmt: skip
