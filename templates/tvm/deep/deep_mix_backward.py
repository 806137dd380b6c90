"""Gradients of a read of mixed parameters (Eq. 14-15) as far as they go token by token, float32, on a CPU.

    h = gamma^(s) q U_t + sum_i gamma^(i) q U^(i),  z = gelu(h),  D = gamma^(s) dy W_t^T + sum_i gamma^(i) dy W^(i)^T,
    dh = D gelu'(h),  dgamma^(i) = <z, dy W^(i)^T> + <q, dh U^(i)^T>,  dq = sum_i gamma^(i) dh U^(i)^T

One task is one segment of one head; what comes of its own state W_t follows the segment's chunks.
"""

from functools import partial

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, i32, inline, prim_func, scratch, sizes
from ..tiles import LANES, clear, columns
from .deep_mix import walk_second, without
from .plan import Plan, across_rows
from .tiles import add_row, overwrite, product, scaled, slopes
from .walk import chunk_rows, multiply_rows, put_rows, take_rows, tiles
from .walk_backward import dot, earlier, read_entering


def build(problem, config, target):
    """The PrimFunc ``deep_mix_backward``: mixed, dhidden ``[R, E]``, dgamma ``[S, T]`` and parts ``[R, Dk]``.

    Of the gradients of own, down_own ``[R]``, the part of the second layer: <z, dy W_t^T>.
    mixture ``[R, E]`` holds h where ``given`` is 1, and is not read where it is 0. ``None`` where parameters are not
    mixed.
    """
    plan = Plan(problem, config)
    if not plan.flags.mixes:
        return None
    Dk, Dv, E = plan.Dk, plan.Dv, plan.E
    n = sizes(
        "R", "N", "S", "G", "M", "LD", "XD", "part_rows", "tokens", "heads", "longest", "inner", "adds_input",
        "carries", "given",
    )  # fmt: skip
    arguments = dict(
        dy=f32(n.R, Dv), q=f32(n.R, Dk), g=f32(n.G), eta=f32(n.R), mu=f32(n.M), W_down=f32(n.LD, Dv),
        means=f32(n.S, Dk), up=f32(n.S * Dk, E), down=f32(n.S * E, Dv), enter_down=f32(n.XD, Dv), hidden=f32(n.R, E),
        rows_h=f32(n.R, E), rows_err=f32(n.R, Dv), mixture=f32(n.R, E), gamma=f32(n.S, n.tokens), own=f32(n.R),
        begin=i32(n.N), end=i32(n.N), first=i32(n.N), tokens=n.tokens, heads=n.heads, longest=n.longest, inner=n.inner,
        scale=T.float32, adds_input=n.adds_input, carries=n.carries, given=n.given, mixed=f32(n.R, E),
        dhidden=f32(n.R, E), dgamma=f32(n.S, n.tokens), down_own=f32(n.R), parts=f32(n.part_rows, Dk),
    )  # fmt: skip
    return prim_func("deep_mix_backward", arguments, n, lambda x: every_segment(plan, x))


def every_segment(plan: Plan, x: Values) -> None:
    """One task a segment of a head."""

    @emit
    def tasks():
        for task in T.parallel(x.S):
            bh: T.let = task // x.N
            place: T.let = task % x.N
            # Late segments read more: pairing early with late ones balances contiguous shares of the tasks.
            s: T.let = T.if_then_else(place % 2 == 0, place // 2, x.N - 1 - place // 2)
            row0: T.let = bh // x.heads * x.tokens * x.heads + bh % x.heads
            past: T.let = s - x.first[s]
            at = T.meta_var(
                x.plus(
                    bh=bh,
                    s=s,
                    row0=row0,
                    past=past,
                    base=bh * x.N + x.first[s],
                    length=x.end[s] - x.begin[s],
                    BP=chunk_rows(x.inner),
                )
            )
            online(plan, at)
            cached(plan, at)


# --- the segment's own state


def online(plan: Plan, at: Values) -> None:
    """dhidden = dy W_t^T for now, chunk by chunk."""
    E, Dv, BP = plan.E, plan.Dv, at.BP
    more = dict(ERRT=f32(Dv, BP), Y=f32(BP, Dv), YT=f32(Dv, BP), DZ=f32(BP, E), turned=f32(E, BP))
    walk_second(plan, at, more, one_chunk)


def one_chunk(plan: Plan, at: Values, *, t0, rows) -> None:
    """What an inner chunk's dy make of the second layer."""
    E, Dv, R, DZ, Y = plan.E, plan.Dv, plan.WR, at.DZ, at.Y
    entering = dict(first=0, XT=None, RT=at.YT, width=E, cols=Dv)
    of_errors = product(LANES, plan.unroll, partial(overwrite, C=at.P), A=at.ERRT, B=at.YT, steps=Dv)

    @emit
    def steps():
        take_rows(at.dy, Dv, at, Y, t0=t0, rows=rows)
        columns(at.ERR, Dv, 0, 1, 0, at.BP, at.ERRT)
        columns(Y, Dv, 0, 1, 0, at.BP, at.YT)
        read_entering(plan, at, by=0, of=at.W, **entering)
        if plan.flags.momentum:
            if at.carries > 0:
                read_entering(plan, at, by=1, of=at.SW, **entering)
        columns(at.turned, at.BP, 0, 1, 0, E, DZ)
        tiles(rows, at.BP, R, LANES, of_errors)
        for j in range(rows):
            for tb in range(at.BP // LANES):
                for x in T.vectorized(LANES):
                    at.P[j, tb * LANES + x] = T.Select(
                        tb * LANES + x >= j, at.CT[j, tb * LANES + x] * at.P[j, tb * LANES + x], T.float32(0)
                    )
        earlier(plan, at, weights=at.P, source=at.Z, width=E, out=DZ, rows=rows)
        put_rows(at, DZ, at.dhidden, E, t0=t0, rows=rows)


# --- the cached states


def cached(plan: Plan, at: Values) -> None:
    """What the segment's tokens read of states before it."""
    Dk, Dv, E, BT, s = plan.Dk, plan.Dv, plan.E, plan.chunk, at.s

    @emit
    def blocks():
        w = T.meta_var(
            scratch(
                Q=f32(BT, Dk),
                QT=f32(Dk, BT),
                H=f32(BT, E),
                L=f32(BT, E),
                ZT=f32(E, BT),
                D=f32(BT, E),
                DT=f32(E, BT),
                DY=f32(BT, Dv),
                DYT=f32(Dv, BT),
                DQ=f32(BT, Dk),
                DQT=f32(Dk, BT),
                gate=f32(1, BT),
                part=f32(1, BT),
                back=f32(4, LANES),
            )
        )
        here = T.meta_var(without(at, "BP").plus(w, BP=BT))
        for c in range((at.length + BT - 1) // BT):
            t0: T.let = at.begin[s] + c * BT
            rows: T.let = T.min(BT, at.end[s] - t0)
            one_block(plan, here, t0=t0, rows=rows)


def one_block(plan: Plan, at: Values, *, t0, rows) -> None:
    """A block of tokens: z, then dh, then what their queries and gates get."""
    Dk, Dv, E, H, D, DQ, DY, row0, heads = plan.Dk, plan.Dv, plan.E, at.H, at.D, at.DQ, at.DY, at.row0, at.heads
    units = dict(layer=at.down, height=E, width=Dv, XT=at.DYT, of=at.ZT, into=at.DT)
    queries = dict(layer=at.up, height=Dk, width=E, XT=at.DT, of=at.QT, into=at.DQT)

    @emit
    def steps():
        take_rows(at.q, Dk, at, at.Q, t0=t0, rows=rows)
        for t in range(rows):
            for d in range(Dk // LANES):
                for x in T.vectorized(LANES):
                    at.Q[t, d * LANES + x] = at.scale * at.Q[t, d * LANES + x]
        columns(at.Q, Dk, 0, 1, 0, plan.chunk, at.QT)
        take_rows(at.dy, Dv, at, DY, t0=t0, rows=rows)
        columns(DY, Dv, 0, 1, 0, plan.chunk, at.DYT)
        if at.given > 0:
            take_rows(at.mixture, E, at, H, t0=t0, rows=rows)
        else:
            clear(H, 0, rows, E)
            for t in range(rows):
                add_row(H, t, at.own[row0 + (t0 + t) * heads], at.hidden, row0 + (t0 + t) * heads, E)
            for i in range(at.past):
                hidden_of(plan, at, i=at.base + i, t0=t0, rows=rows)
        slopes(H, H, at.L, rows, E)
        put_rows(at, H, at.mixed, E, t0=t0, rows=rows)
        columns(H, E, 0, 1, 0, rows, at.ZT)
        take_rows(at.dhidden, E, at, D, t0=t0, rows=rows)
        weigh_own(plan, at, t0=t0, rows=rows)
        columns(D, E, 0, 1, 0, rows, at.DT)
        for i in range(at.past):
            pull(plan, at, **units, i=at.base + i, t0=t0, rows=rows, fresh=True)
        columns(at.DT, plan.chunk, 0, 1, 0, E, D)
        multiply_rows(D, at.L, rows, E)
        put_rows(at, D, at.dhidden, E, t0=t0, rows=rows)
        columns(D, E, 0, 1, 0, rows, at.DT)
        clear(at.DQT, 0, Dk, plan.chunk)
        for i in range(at.past):
            pull(plan, at, **queries, i=at.base + i, t0=t0, rows=rows, fresh=False)
        columns(at.DQT, plan.chunk, 0, 1, 0, Dk, DQ)
        if at.adds_input > 0:
            for t in range(rows):
                for d in range(plan.both // LANES):
                    for x in T.vectorized(LANES):
                        DQ[t, d * LANES + x] = DQ[t, d * LANES + x] + DY[t, d * LANES + x]
        put_rows(at, DQ, at.parts, Dk, t0=t0, rows=rows)


def weigh_own(plan: Plan, at: Values, *, t0, rows) -> None:
    """D = gamma^(s) dy W_t^T, and what the gate's gradient gets of it."""
    E, D, back, routed = plan.E, at.D, at.back, plan.flags.routed

    @emit
    def by_row():
        for t in range(rows):
            row: T.let = at.row0 + (t0 + t) * at.heads
            if routed:
                dot(at.H, D, t, E, back)
                at.down_own[row] = back[3, 0]
            for e in range(E // LANES):
                for x in T.vectorized(LANES):
                    D[t, e * LANES + x] = at.own[row] * D[t, e * LANES + x]


def take_gate(plan: Plan, at: Values, *, i, t0, rows) -> None:
    """The gates of state ``i``; 0 after the block's last token."""
    gate = at.gate

    @emit
    def gates():
        for t in range(rows):
            gate[0, t] = at.gamma[i, t0 + t]
        for t in range(plan.chunk - rows):
            gate[0, rows + t] = T.float32(0)


def hidden_of(plan: Plan, at: Values, *, i, t0, rows) -> None:
    """H += gamma q U."""
    Dk, E, R, C = plan.Dk, plan.E, plan.rows, plan.cols
    gated = partial(scaled, C=at.H, gate=at.gate)
    take_gate(plan, at, i=i, t0=t0, rows=rows)
    units = product(C, plan.unroll, gated, A=at.QT, B=at.up, b0=i * Dk, steps=Dk)
    tiles(rows, E, R, C, units, room=plan.chunk)


def pull(plan: Plan, at: Values, *, layer, height, width, XT, of, into, i, t0, rows, fresh) -> None:
    """into += gamma W x and dgamma (+)= <of, W x>, for the layer of state ``i`` and tokens in columns.

    D += gamma W dy with dgamma = <z, W dy>, then dq += gamma U dh with dgamma += <q, U dh>.
    """
    R, gate, part = across_rows(plan.rows, plan.cols), at.gate, at.part

    def pulled(rows, lanes):
        @inline
        def finish(acc, r0, n0):
            for r in T.unroll(rows):
                for n in T.vectorized(lanes):
                    part[0, n0 + n] = part[0, n0 + n] + of[r0 + r, n0 + n] * acc[r, n]
                for n in T.vectorized(lanes):
                    into[r0 + r, n0 + n] = into[r0 + r, n0 + n] + gate[0, n0 + n] * acc[r, n]

        return finish

    of_rows = product(LANES, plan.unroll, pulled, across=True, A=layer, ac=i * height, B=XT, steps=width)

    @emit
    def products():
        take_gate(plan, at, i=i, t0=t0, rows=rows)
        clear(part, 0, 1, plan.chunk)
        tiles(height, plan.chunk, R, LANES, of_rows)
        for t in range(rows):
            if fresh:
                at.dgamma[i, t0 + t] = part[0, t]
            else:
                at.dgamma[i, t0 + t] = at.dgamma[i, t0 + t] + part[0, t]
