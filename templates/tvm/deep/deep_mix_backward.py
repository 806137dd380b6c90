"""Gradients of a read of mixed parameters (Eq. 14-15) as far as they go token by token, float32, on a CPU.

    h = gamma^(s) q U_t + sum_i gamma^(i) q U^(i),  z = gelu(h),  D = gamma^(s) dy W_t^T + sum_i gamma^(i) dy W^(i)^T,
    dh = D gelu'(h),  dgamma^(i) = <z, dy W^(i)^T> + <q, dh U^(i)^T>,  dq = sum_i gamma^(i) dh U^(i)^T

One task is one segment of one head; what comes of its own state W_t follows the segment's chunks.
"""

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, i32, inline, prim_func, scratch, sizes
from ..tiles import LANES, clear, columns
from .deep_mix import enter, without
from .plan import Plan
from .tiles import add_row, overwrite, product, scaled, slopes
from .walk import chunk_rows, coefficients, gates_of, leave_layer, put_rows, take_rows, tiles
from .walk_backward import dot, earlier


def build(problem, config, target):
    """The PrimFunc ``deep_mix_backward``: mixed, dhidden ``[R, E]``, dgamma ``[S, T]`` and parts ``[R, Dk]``.

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
        rows_z=f32(n.R, E), rows_err=f32(n.R, Dv), mixture=f32(n.R, E), gamma=f32(n.S, n.tokens), own=f32(n.R),
        begin=i32(n.N), end=i32(n.N), first=i32(n.N), tokens=n.tokens, heads=n.heads, longest=n.longest, inner=n.inner,
        scale=T.float32, adds_input=n.adds_input, carries=n.carries, given=n.given, mixed=f32(n.R, E),
        dhidden=f32(n.R, E), dgamma=f32(n.S, n.tokens), parts=f32(n.part_rows, Dk),
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
    """dhidden = gamma^(s) dy W_t^T, chunk by chunk."""
    E, Dv, s, inner = plan.E, plan.Dv, at.s, at.inner

    @emit
    def walk():
        own = T.meta_var(
            scratch(
                W=f32(E, Dv),
                WT=f32(Dv, E),
                SW=f32(E, Dv),
                SWT=f32(Dv, E),
                Z=f32(at.BP, E),
                ERR=f32(at.BP, Dv),
                ERRT=f32(Dv, at.BP),
                Y=f32(at.BP, Dv),
                YT=f32(Dv, at.BP),
                DZ=f32(at.BP, E),
                P=f32(at.BP, at.BP),
                weighed=f32(at.BP, E),
                sum_of_rows=f32(1),
            )
        )
        here = T.meta_var(at.plus(own))
        enter(plan, here)
        w = T.meta_var(here.plus(gates_of(plan, here)))
        for c in range((at.length + inner - 1) // inner):
            t0: T.let = at.begin[s] + c * inner
            rows: T.let = T.min(inner, at.end[s] - t0)
            one_chunk(plan, w, t0=t0, rows=rows)


def one_chunk(plan: Plan, at: Values, *, t0, rows) -> None:
    """One inner chunk of the walk."""
    E, Dv, R, C, DZ, Y = plan.E, plan.Dv, plan.WR, plan.WC, at.DZ, at.Y
    layer = dict(width=E, state=at.W, momentum=at.SW, errors=at.ERR, cols=Dv, rows=rows, inputs=at.Z)
    fresh = product(R, C, plan.unroll, scaled(R, C, DZ, at.keep, 0, fresh=True))
    less = product(R, C, plan.unroll, scaled(R, C, DZ, at.keep, 1, negative=True))
    pull = product(R, LANES, plan.unroll, overwrite(R, LANES, at.P))

    def of_state(r, n):
        fresh(A=at.YT, a0=0, ac=r, B=at.WT, b0=0, bc=n, steps=Dv, r0=r, n0=n)

    def of_momentum(r, n):
        less(A=at.YT, a0=0, ac=r, B=at.SWT, b0=0, bc=n, steps=Dv, r0=r, n0=n)

    def of_errors(r, n):
        pull(A=at.ERRT, a0=0, ac=r, B=at.YT, b0=0, bc=n, steps=Dv, r0=r, n0=n)

    @emit
    def steps():
        take_rows(at.rows_z, E, at, at.Z, t0=t0, rows=rows)
        take_rows(at.rows_err, Dv, at, at.ERR, t0=t0, rows=rows)
        take_rows(at.dy, Dv, at, Y, t0=t0, rows=rows)
        for t in range(rows):
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    Y[t, n * LANES + x] = at.own[at.row0 + (t0 + t) * at.heads] * Y[t, n * LANES + x]
        columns(at.ERR, Dv, 0, 1, 0, at.BP, at.ERRT)
        columns(Y, Dv, 0, 1, 0, at.BP, at.YT)
        columns(at.W, Dv, 0, 1, 0, E, at.WT)
        coefficients(plan, at, t0=t0, rows=rows)
        tiles(rows, E, R, C, of_state)
        if plan.flags.momentum:
            if at.carries > 0:
                columns(at.SW, Dv, 0, 1, 0, E, at.SWT)
                tiles(rows, E, R, C, of_momentum)
        tiles(rows, at.BP, R, LANES, of_errors)
        for j in range(rows):
            for tb in range(at.BP // LANES):
                for x in T.vectorized(LANES):
                    at.P[j, tb * LANES + x] = T.Select(
                        tb * LANES + x >= j, at.CT[j, tb * LANES + x] * at.P[j, tb * LANES + x], T.float32(0)
                    )
        earlier(plan, at, weights=at.P, source=at.Z, width=E, out=DZ, rows=rows)
        put_rows(at, DZ, at.dhidden, E, t0=t0, rows=rows)
        leave_layer(plan, at, **layer)


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
                D=f32(BT, E),
                DHT=f32(E, BT),
                DY=f32(BT, Dv),
                DYT=f32(Dv, BT),
                V=f32(BT, Dk),
                DQ=f32(BT, Dk),
                UT=f32(E, Dk),
                WT=f32(Dv, E),
                gate=f32(1, BT),
                part=f32(BT, LANES),
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
        take_rows(at.dhidden, E, at, D, t0=t0, rows=rows)
        for i in range(at.past):
            units_of(plan, at, i=at.base + i, t0=t0, rows=rows)
        for t in range(rows):
            for e in range(E // LANES):
                for x in T.vectorized(LANES):
                    D[t, e * LANES + x] = D[t, e * LANES + x] * at.L[t, e * LANES + x]
        put_rows(at, D, at.dhidden, E, t0=t0, rows=rows)
        columns(D, E, 0, 1, 0, rows, at.DHT)
        clear(DQ, 0, plan.chunk, Dk)
        for i in range(at.past):
            queries_of(plan, at, i=at.base + i, t0=t0, rows=rows)
        if at.adds_input > 0:
            for t in range(rows):
                for d in range(plan.both // LANES):
                    for x in T.vectorized(LANES):
                        DQ[t, d * LANES + x] = DQ[t, d * LANES + x] + DY[t, d * LANES + x]
        put_rows(at, DQ, at.parts, Dk, t0=t0, rows=rows)


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
    tile = product(R, C, plan.unroll, scaled(R, C, at.H, at.gate))

    def units(r, n):
        tile(A=at.QT, a0=0, ac=r, B=at.up, b0=i * Dk, bc=n, steps=Dk, r0=r, n0=n)

    take_gate(plan, at, i=i, t0=t0, rows=rows)
    tiles(rows, E, R, C, units)


def units_of(plan: Plan, at: Values, *, i, t0, rows) -> None:
    """D += gamma dy W^T, and dgamma = <z, dy W^T>."""
    Dv, E, R, C, part = plan.Dv, plan.E, plan.rows, plan.cols, at.part
    tile = product(R, C, plan.unroll, gathered(R, C, at.H, at.D, at.gate, part))

    def gradients(r, n):
        tile(A=at.DYT, a0=0, ac=r, B=at.WT, b0=0, bc=n, steps=Dv, r0=r, n0=n)

    @emit
    def products():
        take_gate(plan, at, i=i, t0=t0, rows=rows)
        columns(at.down, Dv, i * E, 1, 0, E, at.WT)
        clear(part, 0, plan.chunk, LANES)
        tiles(rows, E, R, C, gradients)
        for t in range(rows):
            at.back[3, 0] = T.float32(0)
            for x in T.unroll(LANES):
                at.back[3, 0] = at.back[3, 0] + part[t, x]
            at.dgamma[i, t0 + t] = at.back[3, 0]


def gathered(rows, cols, Z, D, gate, part):
    """part[r, lanes] += Z acc, and D += gate acc."""

    @inline
    def finish(acc, r0, n0):
        for r in T.unroll(rows):
            for e in T.unroll(cols // LANES):
                for x in T.vectorized(LANES):
                    part[r0 + r, x] = part[r0 + r, x] + Z[r0 + r, n0 + e * LANES + x] * acc[r, e * LANES + x]
            for n in T.vectorized(cols):
                D[r0 + r, n0 + n] = D[r0 + r, n0 + n] + gate[0, r0 + r] * acc[r, n]

    return finish


def queries_of(plan: Plan, at: Values, *, i, t0, rows) -> None:
    """dq += gamma dh U^T, and dgamma += <q, dh U^T>."""
    Dk, E, R, C, V, DQ = plan.Dk, plan.E, plan.rows, plan.cols, at.V, at.DQ
    tile = product(R, C, plan.unroll, overwrite(R, C, V))

    def queries(r, n):
        tile(A=at.DHT, a0=0, ac=r, B=at.UT, b0=0, bc=n, steps=E, r0=r, n0=n)

    @emit
    def products():
        take_gate(plan, at, i=i, t0=t0, rows=rows)
        columns(at.up, E, i * Dk, 1, 0, Dk, at.UT)
        tiles(rows, Dk, R, C, queries)
        for t in range(rows):
            dot(at.Q, V, t, Dk, at.back)
            at.dgamma[i, t0 + t] = at.dgamma[i, t0 + t] + at.back[3, 0]
            for d in range(Dk // LANES):
                for x in T.vectorized(LANES):
                    DQ[t, d * LANES + x] = DQ[t, d * LANES + x] + at.gate[0, t] * V[t, d * LANES + x]
