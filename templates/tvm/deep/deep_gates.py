"""Gates of the read into memory, for a backward: gamma [segment, token] and that of each token's own segment.

gamma is written where a token comes after a segment of its sequence; it is 0 for what ssc did not choose.
"""

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import LANES
from .gates import gates
from .plan import Plan


def build(problem, config, target):
    """The PrimFunc ``deep_gates``: from u, k and means gamma ``[S, T]`` and own ``[R]``."""
    plan, n = Plan(problem, config), sizes("R", "N", "S", "tokens", "heads", "top_k")
    Dk = plan.Dk
    arguments = dict(
        u=f32(n.R, Dk), k=f32(n.R, Dk), means=f32(n.S, Dk), begin=i32(n.N), end=i32(n.N), first=i32(n.N),
        tokens=n.tokens, heads=n.heads, top_k=n.top_k, gamma=f32(n.S, n.tokens), own=f32(n.R),
    )  # fmt: skip
    return prim_func("deep_gates", arguments, n, lambda x: every_segment(plan, x))


def every_segment(plan: Plan, x: Values) -> None:
    """One task a segment of a head."""

    @emit
    def tasks():
        for task in T.parallel(x.S):
            bh: T.let = task // x.N
            s: T.let = task % x.N
            row0: T.let = bh // x.heads * x.tokens * x.heads + bh % x.heads
            past: T.let = s - x.first[s]
            at = T.meta_var(in_a_task(plan, x, bh=bh, s=s, row0=row0, past=past, picks=T.min(x.top_k, past)))
            one_segment(plan, at)


def in_a_task(plan: Plan, x: Values, **place) -> Values:
    """The kernel's values, and what one task keeps to itself; the kernel's own gates and gamma by other names."""
    Dk, BT, JR = plan.Dk, plan.chunk, plan.score_rows
    w = scratch(
        UT=f32(Dk, BT), total=f32(Dk), own=f32(1, BT), gamma=f32(x.N + JR, BT), lanes=f32(2, LANES), best=i32(LANES)
    )
    if plan.flags.sparse:
        w = w.plus(scratch(chosen=i32(x.top_k + 1, BT), value=f32(x.top_k + 1, BT)))
    taken = {name: value for name, value in vars(x).items() if name not in ("gamma", "own")}
    here = Values(**taken).plus(w, Values(**place))
    return here.plus(all_gamma=x.gamma, all_own=x.own, base=place["bh"] * x.N + x.first[place["s"]])


def one_segment(plan: Plan, at: Values) -> None:
    """The gates of a segment's tokens."""
    Dk, BT, s, total = plan.Dk, plan.chunk, at.s, at.total

    @emit
    def blocks():
        for d in range(Dk // LANES):
            for x in T.vectorized(LANES):
                total[d * LANES + x] = T.float32(0)
        for c in range((at.end[s] - at.begin[s] + BT - 1) // BT):
            t0: T.let = at.begin[s] + c * BT
            rows: T.let = T.min(BT, at.end[s] - t0)
            gates(plan, at, t0=t0, rows=rows, seen=c * BT, spread=True)
            for i in range(at.past):
                for t in range(rows):
                    at.all_gamma[at.base + i, t0 + t] = at.gamma[i, t]
            for t in range(rows):
                at.all_own[at.row0 + (t0 + t) * at.heads] = at.own[0, t]
