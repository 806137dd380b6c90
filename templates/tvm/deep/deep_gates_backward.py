"""Gradients of the gates of a read (Eq. 8-10, 16-17): to u, and through mean keys to k, float32, on a CPU.

With dr = gamma (dgamma - sum_i gamma^(i) dgamma^(i)) over the segments that a token reads, its own included,

    du_t = dr_t^(s) m_t + sum_i dr_t^(i) p_i,  dp_i = sum_t dr_t^(i) u_t,  dm_t = dr_t^(s) u_t

where m_t is the running mean of the keys, and p_i that of a whole segment. The choice of ssc is a constant.
"""

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import LANES, clear, read_at_all
from .plan import Plan
from .tiles import add_row


def build(problem, config, target):
    """The PrimFunc ``deep_gates_backward``: du ``[R, Dk]``; to dk is added. dgamma becomes dr.

    ``None`` where there are no gates.
    """
    plan, n = Plan(problem, config), sizes("R", "N", "S", "tokens", "heads")
    if not plan.flags.routed:
        return None
    Dk = plan.Dk
    arguments = dict(
        u=f32(n.R, Dk), k=f32(n.R, Dk), means=f32(n.S, Dk), gamma=f32(n.S, n.tokens), own=f32(n.R), down_own=f32(n.R),
        begin=i32(n.N), end=i32(n.N), first=i32(n.N), tokens=n.tokens, heads=n.heads, dgamma=f32(n.S, n.tokens),
        du=f32(n.R, Dk), dk=f32(n.R, Dk),
    )  # fmt: skip

    def body(x: Values) -> None:
        every_reader(plan, x)
        every_state(plan, x)

    return prim_func("deep_gates_backward", arguments, n, body)


def every_reader(plan: Plan, x: Values) -> None:
    """dr and du of a segment's tokens, and what their keys get from the running means; a task a segment of a head."""
    Dk = plan.Dk

    @emit
    def tasks():
        for task in T.parallel(x.S):
            bh: T.let = task // x.N
            s: T.let = task % x.N
            row0: T.let = bh // x.heads * x.tokens * x.heads + bh % x.heads
            w = T.meta_var(scratch(total=f32(Dk), dr=f32(x.tokens), mean=f32(2), after=f32(Dk)))
            at = T.meta_var(x.plus(w, bh=bh, s=s, row0=row0, past=s - x.first[s], base=bh * x.N + x.first[s]))
            for d in range(Dk // LANES):
                for z in T.vectorized(LANES):
                    w.total[d * LANES + z] = T.float32(0)
            for t in range(x.end[s] - x.begin[s]):
                one_token(plan, at, t=t)
            keys_of_means(plan, at)


def one_token(plan: Plan, at: Values, *, t) -> None:
    """dr and du of the segment's token ``t``."""
    Dk, begin, past, base, gamma, dgamma, total, mean = (
        plan.Dk, at.begin, at.past, at.base, at.gamma, at.dgamma, at.total, at.mean,
    )  # fmt: skip

    @emit
    def token():
        at_t: T.let = begin[at.s] + t
        row: T.let = at.row0 + (begin[at.s] + t) * at.heads
        for d in range(Dk // LANES):
            for z in T.vectorized(LANES):
                total[d * LANES + z] = total[d * LANES + z] + at.k[row, d * LANES + z]
        mean[0] = at.own[row] * at.down_own[row]
        for i in range(past):
            # What was not chosen has no gradient, and nothing has written one.
            if read_at_all(gamma[base + i, at_t]):
                mean[0] = mean[0] + gamma[base + i, at_t] * dgamma[base + i, at_t]
        at.dr[t] = at.own[row] * (at.down_own[row] - mean[0]) / T.cast(t + 1, "float32")
        for d in range(Dk // LANES):
            for z in T.vectorized(LANES):
                at.du[row, d * LANES + z] = at.dr[t] * total[d * LANES + z]
        for i in range(past):
            if read_at_all(gamma[base + i, at_t]):
                dgamma[base + i, at_t] = gamma[base + i, at_t] * (dgamma[base + i, at_t] - mean[0])
                add_row(at.du, row, dgamma[base + i, at_t], at.means, base + i, Dk)
            else:
                dgamma[base + i, at_t] = T.float32(0)


def keys_of_means(plan: Plan, at: Values) -> None:
    """dk_j += sum of dm_t over the segment's tokens t from j on."""
    Dk, s, after = plan.Dk, at.s, at.after

    @emit
    def from_the_last():
        for d in range(Dk // LANES):
            for z in T.vectorized(LANES):
                after[d * LANES + z] = T.float32(0)
        for i in range(at.end[s] - at.begin[s]):
            t: T.let = at.end[s] - at.begin[s] - 1 - i
            row: T.let = at.row0 + (at.begin[s] + t) * at.heads
            for d in range(Dk // LANES):
                for z in T.vectorized(LANES):
                    after[d * LANES + z] = after[d * LANES + z] + at.dr[t] * at.u[row, d * LANES + z]
            for d in range(Dk // LANES):
                for z in T.vectorized(LANES):
                    at.dk[row, d * LANES + z] = at.dk[row, d * LANES + z] + after[d * LANES + z]


def every_state(plan: Plan, x: Values) -> None:
    """dk += dp / length, from the tokens after a segment; a task a segment of a head."""
    Dk = plan.Dk

    @emit
    def tasks():
        for task in T.parallel(x.S):
            bh: T.let = task // x.N
            s: T.let = task % x.N
            row0: T.let = bh // x.heads * x.tokens * x.heads + bh % x.heads
            w = T.meta_var(scratch(dp=f32(1, Dk), stop=i32(1)))
            dp = T.meta_var(w.dp)
            clear(dp, 0, 1, Dk)
            w.stop[0] = x.end[s]
            for j in range(x.N - s):
                if x.first[s + j] == x.first[s]:
                    w.stop[0] = x.end[s + j]
            for t in range(w.stop[0] - x.end[s]):
                if read_at_all(x.gamma[task, x.end[s] + t]):
                    add_row(dp, 0, x.dgamma[task, x.end[s] + t], x.u, row0 + (x.end[s] + t) * x.heads, Dk)
            share: T.let = T.float32(1) / T.cast(x.end[s] - x.begin[s], "float32")
            for t in range(x.end[s] - x.begin[s]):
                add_row(x.dk, row0 + (x.begin[s] + t) * x.heads, share, dp, 0, Dk)
