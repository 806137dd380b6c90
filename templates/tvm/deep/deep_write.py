"""The writes of a deep memory, and what its tokens read of the segment that they are in, float32, on a CPU.

Segments' end states (arXiv:2602.24281, Eq. 4, 30-31, 34-36) and mean keys (Eq. 10), and per token

    online_t = M_t(scale q_t)     or, where parameters are mixed, hidden_t = scale q_t U_t

A task walks the inner chunks of a segment, or under ``checkpoint`` of a head's whole row, one after another with the
state at hand. Where parameters are mixed, ``deep_read`` reads W_t of the second layer, from rows that are left here;
others are left for a backward.
"""

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import LANES, clear, columns
from .plan import Plan
from .tiles import activate, copy
from .walk import chunk_rows, coefficients, gates_of, gradients, leave_layer, put_rows, read_layer, rows_of, take_rows


def build(problem, config, target):
    """The PrimFunc ``deep_write``; B, T, H, the inner chunk and the segments are run-time values.

    Rows are tokens, ``[B*T*H, D]``, gates ``[B*T*H]`` or one element where the recurrence has none; W_up ``[H*Dk, E]``
    and W_down ``[H*E, Dv]``. Outputs: up ``[S*Dk, E]``, down ``[S*E, Dv]`` and means ``[S, Dk]`` of S = B*H*N segments;
    enter_up and enter_down likewise, the momentum that enters each, where any does; online ``[R, Dv]`` unless
    parameters are mixed. ``keeps``: leave also what a backward reads, hidden, rows_h, rows_raw ``[R, E]`` and rows_err
    ``[R, Dv]``; all but rows_raw are left anyway where parameters are mixed. ``carries``: whether there is a mu;
    ``adds_input``: whether a memory adds its input; 1 or 0.
    """
    plan = Plan(problem, config)
    Dk, Dv, E = plan.Dk, plan.Dv, plan.E
    n = sizes(
        "R", "N", "S", "G", "M", "LU", "LD", "XU", "XD", "online_rows", "hidden_rows", "raw_rows", "tokens", "heads",
        "inner", "adds_input", "carries", "keeps",
    )  # fmt: skip
    arguments = dict(
        q=f32(n.R, Dk), k=f32(n.R, Dk), v=f32(n.R, Dv), g=f32(n.G), eta=f32(n.R), mu=f32(n.M), W_up=f32(n.LU, E),
        W_down=f32(n.LD, Dv), begin=i32(n.N), end=i32(n.N), first=i32(n.N), tokens=n.tokens, heads=n.heads,
        inner=n.inner, scale=T.float32, adds_input=n.adds_input, carries=n.carries, keeps=n.keeps,
        up=f32(n.S * Dk, E), down=f32(n.S * E, Dv), means=f32(n.S, Dk), enter_up=f32(n.XU, E),
        enter_down=f32(n.XD, Dv), online=f32(n.online_rows, Dv), hidden=f32(n.hidden_rows, E),
        rows_h=f32(n.hidden_rows, E), rows_err=f32(n.hidden_rows, Dv), rows_raw=f32(n.raw_rows, E),
    )  # fmt: skip
    return prim_func("deep_write", arguments, n, lambda x: every_lane(plan, x))


def every_lane(plan: Plan, x: Values) -> None:
    """One task a segment of a head, or one a head whose segments follow each other."""
    by_head = plan.flags.checkpoint

    @emit
    def tasks():
        for lane in T.parallel(x.S // x.N if by_head else x.S):
            bh: T.let = lane if by_head else lane // x.N
            row0: T.let = bh // x.heads * x.tokens * x.heads + bh % x.heads
            at = T.meta_var(in_a_task(plan, x, bh=bh, row0=row0))
            for inner in range(x.N if by_head else 1):
                s: T.let = inner if by_head else lane % x.N
                one_segment(plan, at.plus(s=s))


def in_a_task(plan: Plan, x: Values, **place) -> Values:
    """The kernel's values, and what one task keeps to itself."""
    Dk, Dv, E = plan.Dk, plan.Dv, plan.E
    at = x.plus(Values(**place), BP=chunk_rows(x.inner))
    own = scratch(
        U=f32(Dk, E), W=f32(E, Dv), total=f32(Dk), Q=f32(at.BP, Dk), QT=f32(Dk, at.BP), HQ=f32(at.BP, E),
        ZQT=f32(E, at.BP), H=f32(at.BP, E), Y=f32(at.BP, Dv), weighed=f32(at.BP, max(Dk, E)), sum_of_rows=f32(1),
    )  # fmt: skip
    at = at.plus(own, gates_of(plan, at), rows_of(plan, at))
    if not plan.flags.momentum:
        return at
    return at.plus(scratch(SU=f32(Dk, E), SW=f32(E, Dv), carried=f32(at.BP, max(Dk, E))))


def one_segment(plan: Plan, at: Values) -> None:
    """The writes of a segment's tokens, and what it leaves."""
    Dk, Dv, E, checkpoint = plan.Dk, plan.Dv, plan.E, plan.flags.checkpoint
    s, bh, U, W, total = at.s, at.bh, at.U, at.W, at.total
    up, down, means = at.up, at.down, at.means

    @emit
    def chunks():
        if checkpoint:
            if s == at.first[s]:
                start(plan, at)
        else:
            start(plan, at)
        if plan.flags.enters:
            copy(at.SU, 0, at.enter_up, (bh * at.N + s) * Dk, Dk, E)
            copy(at.SW, 0, at.enter_down, (bh * at.N + s) * E, E, Dv)
        for d in range(Dk // LANES):
            for x in T.vectorized(LANES):
                total[d * LANES + x] = T.float32(0)
        length: T.let = at.end[s] - at.begin[s]
        for c in range((length + at.inner - 1) // at.inner):
            t0: T.let = at.begin[s] + c * at.inner
            rows: T.let = T.min(at.inner, at.end[s] - t0)
            one_chunk(plan, at, t0=t0, rows=rows)
        copy(U, 0, up, (bh * at.N + s) * Dk, Dk, E)
        copy(W, 0, down, (bh * at.N + s) * E, E, Dv)
        for d in range(Dk // LANES):
            for x in T.vectorized(LANES):
                means[bh * at.N + s, d * LANES + x] = total[d * LANES + x] / T.cast(length, "float32")


def start(plan: Plan, at: Values) -> None:
    """The layers that are learned, and no momentum."""
    Dk, Dv, E, bh, heads = plan.Dk, plan.Dv, plan.E, at.bh, at.heads

    @emit
    def states():
        copy(at.W_up, bh % heads * Dk, at.U, 0, Dk, E)
        copy(at.W_down, bh % heads * E, at.W, 0, E, Dv)
        if plan.flags.momentum:
            clear(at.SU, 0, Dk, E)
            clear(at.SW, 0, E, Dv)


def one_chunk(plan: Plan, at: Values, *, t0, rows) -> None:
    """One inner chunk: its gradients, its reads, its writes."""
    Dk, total, K = plan.Dk, at.total, at.K

    @emit
    def steps():
        gradients(plan, at, t0=t0, rows=rows)
        coefficients(plan, at, t0=t0, rows=rows)
        read(plan, at, t0=t0, rows=rows)
        for t in range(rows):
            for d in range(Dk // LANES):
                for x in T.vectorized(LANES):
                    total[d * LANES + x] = total[d * LANES + x] + K[t, d * LANES + x]
        leave(plan, at, rows=rows)


def leave(plan: Plan, at: Values, *, rows) -> None:
    """Both layers at the end of the chunk."""
    up = dict(inputs=at.K, width=plan.Dk, errors=at.BACK, cols=plan.E, state=at.U)
    down = dict(inputs=at.Z, width=plan.E, errors=at.ERR, cols=plan.Dv, state=at.W)
    for layer, momentum in ((up, "SU"), (down, "SW")):
        leave_layer(plan, at, **layer, momentum=getattr(at, momentum, None), rows=rows)


def read(plan: Plan, at: Values, *, t0, rows) -> None:
    """What the chunk's tokens read of the memory at each of them; of its first layer where parameters are mixed."""
    Dk, E, Q, HQ, mixes = plan.Dk, plan.E, at.Q, at.HQ, plan.flags.mixes
    first = dict(XT=at.QT, width=Dk, state=at.U, inputs=at.KT, errors=at.BACK, out=HQ, cols=E)

    @emit
    def layers():
        take_rows(at.q, Dk, at, Q, t0=t0, rows=rows)
        for t in range(rows):
            for d in range(Dk // LANES):
                for x in T.vectorized(LANES):
                    Q[t, d * LANES + x] = at.scale * Q[t, d * LANES + x]
        columns(Q, Dk, 0, 1, 0, at.BP, at.QT)
        read_layer(plan, at, **first, momentum=getattr(at, "SU", None), rows=rows)
        if T.Or(mixes, at.keeps > 0):
            put_rows(at, HQ, at.hidden, E, t0=t0, rows=rows)
        if T.Not(mixes):
            read_second(plan, at, t0=t0, rows=rows)


def read_second(plan: Plan, at: Values, *, t0, rows) -> None:
    """gelu, and the second layer."""
    Dv, E, HQ, ZQT, Y, Q = plan.Dv, plan.E, at.HQ, at.ZQT, at.Y, at.Q
    second = dict(XT=ZQT, width=E, state=at.W, inputs=at.ZT, errors=at.ERR, out=Y, cols=Dv)

    @emit
    def layer():
        activate(HQ, rows, E)
        columns(HQ, E, 0, 1, 0, at.BP, ZQT)
        read_layer(plan, at, **second, momentum=getattr(at, "SW", None), rows=rows)
        if at.adds_input > 0:
            for t in range(rows):
                for n in range(plan.both // LANES):
                    for x in T.vectorized(LANES):
                        Y[t, n * LANES + x] = Y[t, n * LANES + x] + Q[t, n * LANES + x]
        put_rows(at, Y, at.online, Dv, t0=t0, rows=rows)
