"""Gradients of a deep memory's writes and of what tokens read of their own segment, float32, on a CPU.

The gradients of dL(M; k, v) of Eq. 30-31 and 34-36 are differentiated themselves, so what reaches a write goes on to k,
v, eta, g, mu and to the state that its inner chunk started from. A task walks a segment, or under ``checkpoint`` a
head's segments, from the last inner chunk to the first; states at the chunks' starts are computed first, one segment at
a time, and kept in scratch. The rows of their gradients are those that ``deep_write`` has left.
"""

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import LANES, clear, columns
from .coefficients_backward import coefficients_backward, tables
from .gradients_backward import gradients_backward, gradients_by_column, take_gradients
from .plan import Plan
from .tiles import accumulate, copy, slopes
from .walk import chunk_rows, coefficients, gates_of, leave_layer, put_rows, take_rows
from .walk_backward import (
    coefficient_gradients,
    dot,
    enter_layer_backward,
    leave_layer_backward,
    read_layer_backward,
)


def build(problem, config, target):
    """The PrimFunc ``deep_write_backward``.

    Besides what ``deep_write`` takes and leaves: own ``[R]``, the gates of the tokens' own segments; dy ``[R, Dv]``;
    dup and ddown, the gradients of the end states by what was read of them; where parameters are mixed, dhidden and
    mixed ``[R, E]``, of which there is one row elsewhere.
    Outputs: dq, dk, dv, dg, deta, dmu; down_own ``[R]``, the gradients of own; dstart_up and dstart_down, those of the
    layers that a segment, or under ``checkpoint`` a head's sequences, started from.
    """
    plan = Plan(problem, config)
    Dk, Dv, E = plan.Dk, plan.Dv, plan.E
    n = sizes(
        "R", "N", "S", "G", "M", "LU", "LD", "XU", "XD", "online_rows", "mixed_rows", "LSU", "LSD", "tokens", "heads",
        "longest", "inner", "adds_input", "carries",
    )  # fmt: skip
    arguments = dict(
        dy=f32(n.R, Dv), q=f32(n.R, Dk), k=f32(n.R, Dk), v=f32(n.R, Dv), g=f32(n.G), eta=f32(n.R), mu=f32(n.M),
        W_up=f32(n.LU, E), W_down=f32(n.LD, Dv), means=f32(n.S, Dk), up=f32(n.S * Dk, E), down=f32(n.S * E, Dv),
        enter_up=f32(n.XU, E), enter_down=f32(n.XD, Dv), online=f32(n.online_rows, Dv), hidden=f32(n.R, E),
        rows_h=f32(n.R, E), rows_err=f32(n.R, Dv), rows_raw=f32(n.R, E), mixed=f32(n.mixed_rows, E),
        dhidden=f32(n.mixed_rows, E), own=f32(n.R), dup=f32(n.S * Dk, E), ddown=f32(n.S * E, Dv), begin=i32(n.N),
        end=i32(n.N), first=i32(n.N), tokens=n.tokens, heads=n.heads, longest=n.longest, inner=n.inner,
        scale=T.float32, adds_input=n.adds_input, carries=n.carries, dq=f32(n.R, Dk), dk=f32(n.R, Dk), dv=f32(n.R, Dv),
        dg=f32(n.G), deta=f32(n.R), dmu=f32(n.M), down_own=f32(n.R), dstart_up=f32(n.LSU, E),
        dstart_down=f32(n.LSD, Dv),
    )  # fmt: skip
    return prim_func("deep_write_backward", arguments, n, lambda x: every_lane(plan, x))


def every_lane(plan: Plan, x: Values) -> None:
    """One task a segment of a head, or one a head whose segments follow each other."""
    by_head = plan.flags.checkpoint

    @emit
    def tasks():
        for lane in T.parallel(x.S // x.N if by_head else x.S):
            bh: T.let = lane if by_head else lane // x.N
            row0: T.let = bh // x.heads * x.tokens * x.heads + bh % x.heads
            at = T.meta_var(in_a_task(plan, x, bh=bh, row0=row0, lane=lane))
            if by_head:
                clear_all(plan, at)
            for inner in range(x.N if by_head else 1):
                s: T.let = x.N - 1 - inner if by_head else lane % x.N
                one_segment(plan, at.plus(s=s))


def in_a_task(plan: Plan, x: Values, **place) -> Values:
    """The kernel's values, and what one task keeps to itself."""
    Dk, Dv, E, momentum = plan.Dk, plan.Dv, plan.E, plan.flags.momentum
    at = x.plus(Values(**place), BP=chunk_rows(x.inner), chunks=(x.longest + x.inner - 1) // x.inner)
    BP, n = at.BP, at.chunks
    stack = dict(U=f32(n * Dk, E), W=f32(n * E, Dv))
    states = dict(dU=f32(Dk, E), dW=f32(E, Dv))
    if momentum:
        stack |= dict(SU=f32(n * Dk, E), SW=f32(n * E, Dv))
        states |= dict(dSU=f32(Dk, E), dSW=f32(E, Dv))
    keys = {name: f32(BP, Dk) for name in ("K", "Q", "dK", "dQ")}
    values = {name: f32(BP, Dv) for name in ("ERR", "Y", "GY", "dERR")}
    units = {name: f32(BP, E) for name in ("Z", "H", "L", "RAW", "BACK", "HQ", "ZQ", "LQ", "dZ", "dZQ", "dBACK")}
    widest = max(Dk, Dv, E)
    by_column = dict(KT=f32(Dk, BP), QT=f32(Dk, BP), ERRT=f32(Dv, BP), GYT=f32(Dv, BP), VT=f32(Dv, BP))
    by_column |= {name: f32(E, BP) for name in ("ZT", "BACKT", "ZQT", "ET", "dHT")}
    pairs = {name: f32(BP, BP) for name in ("P", "P2", "PT")}
    own = scratch(
        **stack, **states, **keys, **values, **units, **by_column, **pairs, weighed=f32(BP, widest),
        carried=f32(BP, widest), turned=f32(widest, BP), sum_of_rows=f32(1),
    )  # fmt: skip
    at = at.plus(own, gates_of(plan, at), coefficient_gradients(plan, at))
    return at.plus(tables(plan, at))


def clear_all(plan: Plan, at: Values) -> None:
    """Nothing comes from after a head's last segment."""
    Dk, Dv, E = plan.Dk, plan.Dv, plan.E

    @emit
    def zeros():
        clear(at.dU, 0, Dk, E)
        clear(at.dW, 0, E, Dv)
        if plan.flags.momentum:
            clear(at.dSU, 0, Dk, E)
            clear(at.dSW, 0, E, Dv)
        clear(at.dstart_up, at.lane * Dk, Dk, E)
        clear(at.dstart_down, at.lane * E, E, Dv)


def one_segment(plan: Plan, at: Values) -> None:
    """A segment's chunks, forwards for their states, then backwards."""
    Dk, Dv, E, s, checkpoint, inner = plan.Dk, plan.Dv, plan.E, at.s, plan.flags.checkpoint, at.inner
    dU, dW, lane, place = at.dU, at.dW, at.lane, at.bh * at.N + at.s

    @emit
    def chunks():
        if checkpoint:
            accumulate(at.dup, place * Dk, dU, 0, Dk, E)
            accumulate(at.ddown, place * E, dW, 0, E, Dv)
        else:
            copy(at.dup, place * Dk, dU, 0, Dk, E)
            copy(at.ddown, place * E, dW, 0, E, Dv)
            if plan.flags.momentum:
                clear(at.dSU, 0, Dk, E)
                clear(at.dSW, 0, E, Dv)
        count: T.let = (at.end[s] - at.begin[s] + inner - 1) // inner
        enter(plan, at)
        for c in range(count):
            t0: T.let = at.begin[s] + c * inner
            rows: T.let = T.min(inner, at.end[s] - t0)
            forwards(plan, at_chunk(plan, at, c), t0=t0, rows=rows, last=c + 1 == count)
        for i in range(count):
            c: T.let = count - 1 - i
            t0: T.let = at.begin[s] + c * inner
            rows: T.let = T.min(inner, at.end[s] - t0)
            backwards(plan, at_chunk(plan, at, c), t0=t0, rows=rows)
        if checkpoint:
            if s == at.first[s]:
                accumulate(dU, 0, at.dstart_up, lane * Dk, Dk, E)
                accumulate(dW, 0, at.dstart_down, lane * E, E, Dv)
                clear(dU, 0, Dk, E)
                clear(dW, 0, E, Dv)
                if plan.flags.momentum:
                    clear(at.dSU, 0, Dk, E)
                    clear(at.dSW, 0, E, Dv)
        else:
            copy(dU, 0, at.dstart_up, lane * Dk, Dk, E)
            copy(dW, 0, at.dstart_down, lane * E, E, Dv)


def enter(plan: Plan, at: Values) -> None:
    """The state and the momentum where a segment starts."""
    Dk, Dv, E, s, bh, heads, N = plan.Dk, plan.Dv, plan.E, at.s, at.bh, at.heads, at.N

    @emit
    def states():
        if T.And(plan.flags.checkpoint, s > at.first[s]):
            copy(at.up, (bh * N + s - 1) * Dk, at.U, 0, Dk, E)
            copy(at.down, (bh * N + s - 1) * E, at.W, 0, E, Dv)
        else:
            copy(at.W_up, bh % heads * Dk, at.U, 0, Dk, E)
            copy(at.W_down, bh % heads * E, at.W, 0, E, Dv)
        if plan.flags.enters:
            copy(at.enter_up, (bh * N + s) * Dk, at.SU, 0, Dk, E)
            copy(at.enter_down, (bh * N + s) * E, at.SW, 0, E, Dv)
        elif plan.flags.momentum:
            clear(at.SU, 0, Dk, E)
            clear(at.SW, 0, E, Dv)


def at_chunk(plan: Plan, at: Values, c) -> Values:
    """Where the states at the start of chunk ``c`` begin in their stacks."""
    return at.plus(u0=c * plan.Dk, w0=c * plan.E)


def forwards(plan: Plan, at: Values, *, t0, rows, last) -> None:
    """The states at a chunk's end, unless it is the last."""
    Dk, E = plan.Dk, plan.E
    up = dict(inputs=at.K, width=Dk, errors=at.BACK, cols=E, state=at.U, momentum=getattr(at, "SU", None))
    down = dict(inputs=at.Z, width=E, errors=at.ERR, cols=plan.Dv, state=at.W, momentum=getattr(at, "SW", None))

    @emit
    def steps():
        if T.Not(last):
            take_gradients(plan, at, t0=t0, rows=rows)
            coefficients(plan, at, t0=t0, rows=rows)
            leave_layer(plan, at, **up, rows=rows, first=at.u0, to=at.u0 + Dk)
            leave_layer(plan, at, **down, rows=rows, first=at.w0, to=at.w0 + E)


def backwards(plan: Plan, at: Values, *, t0, rows) -> None:
    """One chunk backwards; dU, dW, dSU and dSW become the gradients of what entered it."""

    @emit
    def steps():
        take_gradients(plan, at, t0=t0, rows=rows)
        gradients_by_column(plan, at, rows=rows)
        coefficients(plan, at, t0=t0, rows=rows)
        queries(plan, at, t0=t0, rows=rows)
        zero(plan, at)
        leave_backward(plan, at, rows=rows)
        read_backward(plan, at, t0=t0, rows=rows)
        gradients_backward(plan, at, t0=t0, rows=rows)
        enter_backward(plan, at, rows=rows)
        coefficients_backward(plan, at, t0=t0, rows=rows)


def zero(plan: Plan, at: Values) -> None:
    """Nothing yet in what gradients are added to."""
    Dk, Dv, E, BP = plan.Dk, plan.Dv, plan.E, at.BP

    @emit
    def zeros():
        clear(at.dK, 0, BP, Dk)
        clear(at.dZ, 0, BP, E)
        clear(at.dBACK, 0, BP, E)
        clear(at.dERR, 0, BP, Dv)
        for j in range(BP):
            for t in range(BP):
                at.dCT[j, t] = T.float32(0)
            for i in T.unroll(2):
                at.dkeep[i, j] = T.float32(0)
            for i in T.unroll(2):
                at.dlast[i, j] = T.float32(0)
        for i in T.unroll(3):
            at.dends[i] = T.float32(0)


def queries(plan: Plan, at: Values, *, t0, rows) -> None:
    """Queries of both layers, and the gradients of what they read; and that of the own segment's gate."""
    Dk, Dv, E, mixes, routed = plan.Dk, plan.Dv, plan.E, plan.flags.mixes, plan.flags.routed

    @emit
    def layers():
        take_rows(at.q, Dk, at, at.Q, t0=t0, rows=rows)
        for t in range(rows):
            for d in range(Dk // LANES):
                for x in T.vectorized(LANES):
                    at.Q[t, d * LANES + x] = at.scale * at.Q[t, d * LANES + x]
        columns(at.Q, Dk, 0, 1, 0, at.BP, at.QT)
        if mixes:
            take_rows(at.mixed, E, at, at.ZQ, t0=t0, rows=rows)
        else:
            take_rows(at.hidden, E, at, at.HQ, t0=t0, rows=rows)
            slopes(at.HQ, at.ZQ, at.LQ, rows, E)
        columns(at.ZQ, E, 0, 1, 0, rows, at.ZQT)
        take_rows(at.dy, Dv, at, at.GY, t0=t0, rows=rows)
        if routed:
            own_gate(plan, at, t0=t0, rows=rows)
        for t in range(rows):
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    at.GY[t, n * LANES + x] = at.own[at.row0 + (t0 + t) * at.heads] * at.GY[t, n * LANES + x]
        columns(at.GY, Dv, 0, 1, 0, at.BP, at.GYT)


def own_gate(plan: Plan, at: Values, *, t0, rows) -> None:
    """down_own_t = <what t reads of its own segment, dy_t>; or the first layer's part, added to the second's."""
    Dv, E, lanes, mixes = plan.Dv, plan.E, at.back, plan.flags.mixes

    @emit
    def inner_products():
        if mixes:
            take_rows(at.hidden, E, at, at.HQ, t0=t0, rows=rows)
            take_rows(at.dhidden, E, at, at.dZQ, t0=t0, rows=rows)
        else:
            take_rows(at.online, Dv, at, at.Y, t0=t0, rows=rows)
        for t in range(rows):
            row: T.let = at.row0 + (t0 + t) * at.heads
            if mixes:
                dot(at.HQ, at.dZQ, t, E, lanes)
                at.down_own[row] = at.down_own[row] + lanes[3, 0]
            else:
                dot(at.Y, at.GY, t, Dv, lanes)
                at.down_own[row] = lanes[3, 0]


def layers_of(plan: Plan, at: Values) -> tuple[dict, dict]:
    """Both layers: their states and rows, and what the gradients of those are added to."""
    up = dict(
        inputs=at.K, inputsT=at.KT, width=plan.Dk, errors=at.BACK, errorsT=at.BACKT, cols=plan.E, state=at.U,
        momentum=getattr(at, "SU", None), first=at.u0, dinputs=at.dK, derrors=at.dBACK,
    )  # fmt: skip
    down = dict(
        inputs=at.Z, inputsT=at.ZT, width=plan.E, errors=at.ERR, errorsT=at.ERRT, cols=plan.Dv, state=at.W,
        momentum=getattr(at, "SW", None), first=at.w0, dinputs=at.dZ, derrors=at.dERR,
    )  # fmt: skip
    return up, down


def leave_backward(plan: Plan, at: Values, *, rows) -> None:
    """Through what the chunk leaves."""
    up, down = layers_of(plan, at)
    leave_layer_backward(plan, at, **up, dstate=at.dU, dmomentum=getattr(at, "dSU", None), rows=rows)
    leave_layer_backward(plan, at, **down, dstate=at.dW, dmomentum=getattr(at, "dSW", None), rows=rows)


def enter_backward(plan: Plan, at: Values, *, rows) -> None:
    """To what enters the chunk: by both layers' reads, and by the gradients that were taken there."""
    up = dict(X=at.Q, R=at.dZQ, width=plan.Dk, cols=plan.E, dstate=at.dU, dmomentum=getattr(at, "dSU", None))
    down = dict(X=at.ZQ, R=at.GY, width=plan.E, cols=plan.Dv, dstate=at.dW, dmomentum=getattr(at, "dSW", None))
    losses = [(at.dBACK, at.ERR), *([(at.Z, at.dERR)] if plan.flags.momentum else [])]
    enter_layer_backward(plan, at, **up, pairs=[(at.K, at.dZ)], rows=rows)
    enter_layer_backward(plan, at, **down, pairs=losses, rows=rows)


def read_backward(plan: Plan, at: Values, *, t0, rows) -> None:
    """Through what the chunk's tokens read of it."""
    Dk, E, mixes, alone = plan.Dk, plan.E, plan.flags.mixes, not plan.flags.mixes
    up, down = layers_of(plan, at)
    second = dict(X=at.ZQ, XT=at.ZQT, R=at.GY, RT=at.GYT, dX=at.dZQ)
    first = dict(X=at.Q, XT=at.QT, R=at.dZQ, RT=at.dHT, dX=at.dQ)

    @emit
    def layers():
        read_layer_backward(plan, at, **down, **second, rows=rows)
        if mixes:
            # The gradient of z is that of all states together: it has been there before.
            take_rows(at.dhidden, E, at, at.dZQ, t0=t0, rows=rows)
            for t in range(rows):
                for e in range(E // LANES):
                    for x in T.vectorized(LANES):
                        at.dZQ[t, e * LANES + x] = at.own[at.row0 + (t0 + t) * at.heads] * at.dZQ[t, e * LANES + x]
        else:
            for t in range(rows):
                for e in range(E // LANES):
                    for x in T.vectorized(LANES):
                        at.dZQ[t, e * LANES + x] = at.LQ[t, e * LANES + x] * at.dZQ[t, e * LANES + x]
        columns(at.dZQ, E, 0, 1, 0, rows, at.dHT)
        read_layer_backward(plan, at, **up, **first, rows=rows)
        if T.And(alone, at.adds_input > 0):
            for t in range(rows):
                for n in range(plan.both // LANES):
                    for x in T.vectorized(LANES):
                        at.dQ[t, n * LANES + x] = at.dQ[t, n * LANES + x] + at.GY[t, n * LANES + x]
        put_rows(at, at.dQ, at.dq, Dk, t0=t0, rows=rows)
