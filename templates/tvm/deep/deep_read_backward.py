"""Gradients of what tokens read of the cached states of a deep memory (arXiv:2602.24281, Eq. 6-17), float32, on a CPU.

Of each state, from the tokens that read it, in blocks: with Z = gelu(Q U), D = dY W^T, G their gates,

    dgamma = <Z, D>,  dW += (Z G)^T dY,  F = G D gelu'(Q U),  dU += Q^T F,  dQ += F U^T

hidden units are computed again. One task is every ``groups``-th state of a head, so that dQ is added up in ``groups``
arrays without a race. Where parameters are mixed, :mod:`deep_mix_backward` has left Z and F / G of all states together.
"""

from functools import partial

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, i32, inline, prim_func, scratch, sizes
from ..tiles import LANES, clear, columns, read_at_all
from .plan import Plan
from .tiles import activated_with_slope, add, overwrite, product
from .walk import tiles


def build(problem, config, target):
    """The PrimFunc ``deep_read_backward``; parts ``[groups * R, Dk]`` add up to the gradient of scale * q."""
    plan, n = Plan(problem, config), sizes("R", "N", "S", "hidden_rows", "P", "tokens", "heads", "adds_input")
    Dk, Dv, E = plan.Dk, plan.Dv, plan.E
    arguments = dict(
        dy=f32(n.R, Dv), q=f32(n.R, Dk), means=f32(n.S, Dk), up=f32(n.S * Dk, E), down=f32(n.S * E, Dv),
        gamma=f32(n.S, n.tokens), mixed=f32(n.hidden_rows, E), dhidden=f32(n.hidden_rows, E), begin=i32(n.N),
        end=i32(n.N), first=i32(n.N), tokens=n.tokens, heads=n.heads, scale=T.float32, adds_input=n.adds_input,
        dgamma=f32(n.S, n.tokens), dup=f32(n.S * Dk, E), ddown=f32(n.S * E, Dv), parts=f32(n.P, Dk),
    )  # fmt: skip
    return prim_func("deep_read_backward", arguments, n, lambda x: every_group(plan, x))


def every_group(plan: Plan, x: Values) -> None:
    """One task a group of a head's states."""
    Dk, Dv, E, BT, groups = plan.Dk, plan.Dv, plan.E, plan.chunk, plan.groups

    @emit
    def tasks():
        for task in T.parallel(x.S // x.N * groups):
            bh: T.let = task // groups
            group: T.let = task % groups
            row0: T.let = bh // x.heads * x.tokens * x.heads + bh % x.heads
            w = T.meta_var(
                scratch(
                    UT=f32(E, Dk),
                    WT=f32(Dv, E),
                    Q=f32(BT, Dk),
                    QT=f32(Dk, BT),
                    DY=f32(BT, Dv),
                    DYT=f32(Dv, BT),
                    Z=f32(BT, E),
                    F=f32(BT, E),
                    FT=f32(E, BT),
                    DQ=f32(BT, Dk),
                    gate=f32(1, BT),
                    part=f32(BT, LANES),
                    index=i32(x.tokens),
                    count=i32(2),
                    total=f32(1),
                )
            )
            at = T.meta_var(x.plus(w, bh=bh, group=group, row0=row0))
            if not plan.flags.mixes:
                for t in range(x.tokens):
                    for d in range(Dk // LANES):
                        for z in T.vectorized(LANES):
                            at.parts[group * x.R + row0 + t * x.heads, d * LANES + z] = T.float32(0)
            for i in range((x.N - group + groups - 1) // groups):
                one_state(plan, at.plus(i=group + i * groups, place=bh * x.N + group + i * groups))


def one_state(plan: Plan, at: Values) -> None:
    """The gradients of a state, and what its readers' queries get from it."""
    Dk, Dv, E, BT, place = plan.Dk, plan.Dv, plan.E, plan.chunk, at.place

    @emit
    def blocks():
        clear(at.dup, place * Dk, Dk, E)
        clear(at.ddown, place * E, E, Dv)
        readers(plan, at)
        if at.count[0] > 0:
            if not plan.flags.mixes:
                columns(at.up, E, place * Dk, 1, 0, Dk, at.UT)
                columns(at.down, Dv, place * E, 1, 0, E, at.WT)
            for c in range((at.count[0] + BT - 1) // BT):
                one_block(plan, at, x0=c * BT, count=T.min(BT, at.count[0] - c * BT))


def readers(plan: Plan, at: Values) -> None:
    """The tokens that read a state: those after it in its sequence, or of them those that chose it."""
    i, count, index = at.i, at.count, at.index

    @emit
    def those_after():
        count[0] = 0
        count[1] = at.end[i]
        for j in range(at.N - i):
            if at.first[i + j] == at.first[i]:
                count[1] = at.end[i + j]
        for t in range(count[1] - at.end[i]):
            if plan.flags.sparse:
                if read_at_all(at.gamma[at.place, at.end[i] + t]):
                    index[count[0]] = at.end[i] + t
                    count[0] = count[0] + 1
            else:
                index[count[0]] = at.end[i] + t
                count[0] = count[0] + 1


def one_block(plan: Plan, at: Values, *, x0, count) -> None:
    """The part of ``count`` readers from place ``x0`` on."""
    Dk, Dv, E, R, C, place = plan.Dk, plan.Dv, plan.E, plan.rows, plan.cols, at.place
    Q, DY, Z, F, gate = at.Q, at.DY, at.Z, at.F, at.gate
    up = product(C, plan.unroll, partial(add, C=at.dup, at=place * Dk), A=Q, B=F, steps=count)
    down = product(C, plan.unroll, partial(add, C=at.ddown, at=place * E), A=Z, B=DY, steps=count)

    @emit
    def steps():
        for t in range(count):
            row: T.let = at.row0 + at.index[x0 + t] * at.heads
            gate[0, t] = at.gamma[place, at.index[x0 + t]]
            for d in range(Dk // LANES):
                for x in T.vectorized(LANES):
                    Q[t, d * LANES + x] = at.scale * at.q[row, d * LANES + x]
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    DY[t, n * LANES + x] = at.dy[row, n * LANES + x]
        if plan.flags.mixes:
            take_units(plan, at, x0=x0, count=count)
        else:
            make_units(plan, at, x0=x0, count=count)
        for t in range(count):
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    DY[t, n * LANES + x] = gate[0, t] * DY[t, n * LANES + x]
        tiles(E, Dv, R, C, down)
        tiles(Dk, E, R, C, up)
        if not plan.flags.mixes:
            to_queries(plan, at, x0=x0, count=count)


def take_units(plan: Plan, at: Values, *, x0, count) -> None:
    """Z and F of a mixture, which all its states share but for the gates."""
    E, Z, F = plan.E, at.Z, at.F

    @emit
    def copies():
        for t in range(count):
            row: T.let = at.row0 + at.index[x0 + t] * at.heads
            for e in range(E // LANES):
                for x in T.vectorized(LANES):
                    Z[t, e * LANES + x] = at.mixed[row, e * LANES + x]
            for e in range(E // LANES):
                for x in T.vectorized(LANES):
                    F[t, e * LANES + x] = at.gate[0, t] * at.dhidden[row, e * LANES + x]


def make_units(plan: Plan, at: Values, *, x0, count) -> None:
    """Z, F, and the gradients of the gates."""
    Dk, Dv, E, R, C, Z, F, part = plan.Dk, plan.Dv, plan.E, plan.rows, plan.cols, at.Z, at.F, at.part
    activate, pull = partial(activated_with_slope, Z=Z, S=F), partial(pulled, Z=Z, F=F, gate=at.gate, part=part)
    units = product(C, plan.unroll, activate, A=at.QT, B=at.up, b0=at.place * Dk, steps=Dk)
    gradients = product(C, plan.unroll, pull, A=at.DYT, B=at.WT, steps=Dv)

    @emit
    def products():
        columns(at.Q, Dk, 0, 1, 0, count, at.QT)
        columns(at.DY, Dv, 0, 1, 0, count, at.DYT)
        clear(part, 0, plan.chunk, LANES)
        tiles(count, E, R, C, units, room=plan.chunk)
        tiles(count, E, R, C, gradients, room=plan.chunk)
        if plan.flags.routed:
            for t in range(count):
                if at.adds_input > 0:
                    for e in T.unroll(plan.both // LANES):
                        for x in T.vectorized(LANES):
                            part[t, x] = part[t, x] + at.Q[t, e * LANES + x] * at.DY[t, e * LANES + x]
                at.total[0] = T.float32(0)
                for x in T.unroll(LANES):
                    at.total[0] = at.total[0] + part[t, x]
                at.dgamma[at.place, at.index[x0 + t]] = at.total[0]


def pulled(rows, cols, Z, F, gate, part):
    """part[r, lanes] += Z acc, and F = gate acc F, for F the slope so far."""

    @inline
    def finish(acc, r0, n0):
        for r in T.unroll(rows):
            for e in T.unroll(cols // LANES):
                for x in T.vectorized(LANES):
                    part[r0 + r, x] = part[r0 + r, x] + Z[r0 + r, n0 + e * LANES + x] * acc[r, e * LANES + x]
            for n in T.vectorized(cols):
                F[r0 + r, n0 + n] = gate[0, r0 + r] * acc[r, n] * F[r0 + r, n0 + n]

    return finish


def to_queries(plan: Plan, at: Values, *, x0, count) -> None:
    """The queries' gradients, from the hidden units'."""
    Dk, E, R, C, DQ = plan.Dk, plan.E, plan.rows, plan.cols, at.DQ
    queries = product(C, plan.unroll, partial(overwrite, C=DQ), A=at.FT, B=at.UT, steps=E)

    @emit
    def sums():
        columns(at.F, E, 0, 1, 0, count, at.FT)
        tiles(count, Dk, R, C, queries, room=plan.chunk)
        for t in range(count):
            row: T.let = at.group * at.R + at.row0 + at.index[x0 + t] * at.heads
            if at.adds_input > 0:
                for d in range(plan.both // LANES):
                    for x in T.vectorized(LANES):
                        DQ[t, d * LANES + x] = DQ[t, d * LANES + x] + at.DY[t, d * LANES + x]
            for d in range(Dk // LANES):
                for x in T.vectorized(LANES):
                    at.parts[row, d * LANES + x] = at.parts[row, d * LANES + x] + DQ[t, d * LANES + x]
