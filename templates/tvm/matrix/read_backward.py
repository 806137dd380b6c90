"""Gradients of the read of a linear or SWLA Memory Caching layer (Eq. 6-17) to q, u and the gates, float32, on a CPU.

    P_t^(i)  = M^(i) dy_t                       for the cached states, and of the online memory
    dq_t     = scale sum_i gamma_t^(i) P_t^(i)
    dgamma_t^(i) = scale <q_t, P_t^(i)>
    dr_t^(i) = gamma_t^(i) (dgamma_t^(i) - sum_j gamma_t^(j) dgamma_t^(j))        the logits' gradient
    du_t     = sum_i dr_t^(i) p_i

One task is one segment of one head, walked in chunks of BT tokens with the running state X: what the tokens before
the chunk leave in the memory of its first token. Gates and logits are computed as in ``read_forward``, to the bit.
Formulations of the cached read: ``per_segment``, one product a state; ``summed``, one product with their sum where
gates are equal (residual, mean); ``gather``, each state times just the tokens that chose it (ssc).
"""

from tvm.script import tirx as T

from ..gates import sort_by_segment
from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import BLOCK, LANES, clear, columns, copy_state, exp, sum_states, transpose
from .backward_tiles import read_gathered
from .read_backward_chunk import Plan, advance, connectors, gates, read, weigh


def build(problem, config, target):
    """The PrimFunc ``read_backward`` for the widths of ``problem``; B, T, H and the segments are run-time values.

    Rows are tokens, ``[B*T*H, D]``; g, beta and lam have one element where the recurrence has none; states
    ``[B*H*N*Dk, Dv]`` and means ``[B*H*N, Dk]`` are those of ``segment_states``. The outputs are

    gamma, dr ``[B*H*T*N]``: gates and logits' gradients of the cached segments, [i, t] within a segment's part, which
    starts at (bh * T + begin) * N; own ``[B*H*3, T]``: of the online segment gamma, dr and gamma * <q_t, X dy_t>;
    entering ``[B*H*(T//BT+N)*Dk, Dv]``: X of the chunks (swla), chunk c of segment s at begin // BT + s + c; dq, du
    ``[B*T*H, Dk]``. gamma, dr and du are left alone where there are no logits.
    """
    plan = Plan(problem, config)
    n = sizes("R", "N", "S", "G", "X", "J", "P", "tokens", "heads", "longest", "top_k")
    Dk, Dv = plan.Dk, plan.Dv
    arguments = dict(
        dy=f32(n.R, Dv), q=f32(n.R, Dk), u=f32(n.R, Dk), k=f32(n.R, Dk), v=f32(n.R, Dv),
        g=f32(n.G), beta=f32(n.G), lam=f32(n.G), states=f32(n.S * Dk, Dv), means=f32(n.S, Dk),
        begin=i32(n.N), end=i32(n.N), first=i32(n.N),
        tokens=n.tokens, heads=n.heads, longest=n.longest, top_k=n.top_k, scale=T.float32,
        gamma=f32(n.X), dr=f32(n.X), own=f32(n.J, n.tokens), entering=f32(n.P, Dv), dq=f32(n.R, Dk), du=f32(n.R, Dk),
    )  # fmt: skip
    return prim_func("read_backward", arguments, n, lambda x: every_segment(plan, x))


def scratch_of(plan: Plan, x: Values) -> Values:
    """What one task keeps to itself."""
    Dk, Dv, BT, JR = plan.Dk, plan.Dv, plan.BT, plan.JR
    w = scratch(
        QT=f32(Dk, BT),
        UT=f32(Dk, BT),
        YT=f32(Dv, BT),  # scale * dy
        dQT=f32(Dk, BT),
        K=f32(BT, Dk),
        V=f32(BT, Dv),
        E=f32(BT, BT),
        M=f32(Dk, Dv),
        rows_of=f32(BT, Dk),
        total=f32(Dk),
        keys=f32(Dk),
        sum_of_keys=f32(1),  # of the chunk
        gate=f32(2, BT),  # the own segment's gate; decay of X
        down=f32(3, BT),  # gradients of the gate and of the logit; <q, X dy>
        gates=f32(x.N + JR, BT),  # of the cached segments
        dgates=f32(x.N + JR, BT),
        lanes=f32(3, LANES),
        token_gates=f32(3, BT + LANES),  # of the chunk's tokens: e^g, beta, lam
    )
    if not plan.flags.sparse:
        return w
    kept = x.longest + BT if plan.formulation == "gather" else BT
    return w.plus(scratch(best=i32(LANES), chosen=i32(x.top_k + 1, kept), value=f32(x.top_k + 1, kept)))


def every_segment(plan: Plan, x: Values) -> None:
    """One task a segment of a head."""
    BT, gather = plan.BT, plan.formulation == "gather"

    @emit
    def tasks():
        for task in T.parallel(x.S):
            bh: T.let = task // x.N
            turn: T.let = task % x.N
            # Late segments read more: pairing early with late ones balances contiguous shares of the tasks.
            s: T.let = T.if_then_else(turn % 2 == 0, turn // 2, x.N - 1 - turn // 2)
            row0: T.let = bh // x.heads * x.tokens * x.heads + bh % x.heads
            past: T.let = s - x.first[s]
            base: T.let = bh * x.N + x.first[s]
            length: T.let = x.end[s] - x.begin[s]
            picks: T.let = T.min(x.top_k, past)
            saved: T.let = (bh * x.tokens + x.begin[s]) * x.N + x.first[s] * length
            w = T.meta_var(scratch_of(plan, x))
            place = T.meta_var(
                Values(bh=bh, s=s, row0=row0, past=past, base=base, length=length, picks=picks, saved=saved)
            )
            start(plan, x.plus(w, place))
            summed = T.meta_var(scratch(summed=f32(plan.Dk, plan.Dv)) if plan.formulation == "summed" else Values())
            at = T.meta_var(x.plus(w, place, summed))
            if plan.formulation == "summed":
                sum_states(x.states, base, past, at.summed, plan.Dk, plan.Dv)
            for c in range((length + BT - 1) // BT):
                t0: T.let = x.begin[s] + c * BT
                rows: T.let = T.min(BT, x.end[s] - t0)
                linked: T.let = T.Or(c > 0, T.And(plan.flags.checkpoint, past > 0))
                one_chunk(plan, at, c=c, t0=t0, rows=rows, linked=linked)
                if (c + 1) * BT < length:
                    advance(plan, at)
                    if plan.flags.gated:
                        keep(plan, at, c=c + 1)
            if gather:
                read_chosen(plan, at)
                for c in range((length + BT - 1) // BT):
                    t0: T.let = x.begin[s] + c * BT
                    rows: T.let = T.min(BT, x.end[s] - t0)
                    gates_again(at, seen=c * BT, t0=t0, rows=rows)
                    connectors(plan, at, t0=t0, rows=rows, seen=c * BT)


def start(plan: Plan, at: Values) -> None:
    """X of the first chunk, and sums of no keys."""
    Dk, Dv, flags = plan.Dk, plan.Dv, plan.flags
    M, total, keys, states, g, beta, k, v = at.M, at.total, at.keys, at.states, at.g, at.beta, at.k, at.v
    row0, base, past, heads = at.row0, at.base, at.past, at.heads

    @emit
    def running_state():
        clear(M, 0, Dk, Dv)
        for d in T.vectorized(Dk):
            total[d] = T.float32(0)
            keys[d] = T.float32(0)
        if flags.checkpoint:
            if past > 0:
                copy_state(states, (base + past - 1) * Dk, M, Dk, Dv)
                if flags.gated:
                    b: T.let = row0 + at.begin[at.s] * heads
                    for d in range(Dk):
                        for n in T.vectorized(Dv):
                            M[d, n] = exp(g[b]) * M[d, n] + beta[b] * k[b - heads, d] * v[b - heads, n]
                    keep(plan, at, c=0)


def keep(plan: Plan, at: Values, *, c) -> None:
    """Leave X of chunk ``c`` to ``write_backward``."""
    Dk, Dv, BT = plan.Dk, plan.Dv, plan.BT

    @emit
    def entering():
        slot: T.let = at.bh * (at.tokens // BT + at.N) + at.begin[at.s] // BT + at.s + c
        for d in range(Dk):
            for n in T.vectorized(Dv):
                at.entering[slot * Dk + d, n] = at.M[d, n]


def one_chunk(plan: Plan, at: Values, *, c, t0, rows, linked) -> None:
    """dq of one chunk; and unless states are gathered, of its gates and connectors too."""
    Dk, BT, gather = plan.Dk, plan.BT, plan.formulation == "gather"
    own, gate, down, rows_of, bh, row0, heads = at.own, at.gate, at.down, at.rows_of, at.bh, at.row0, at.heads

    @emit
    def chunk():
        pack(plan, at, t0=t0, rows=rows)
        gates(plan, at, t0=t0, rows=rows, seen=c * BT)
        weigh(plan, at, t0=t0, rows=rows, linked=linked)
        read(plan, at, rows=rows, linked=linked)
        if plan.flags.routed and not gather:
            connectors(plan, at, t0=t0, rows=rows, seen=c * BT)
        for t in range(rows):
            own[bh * 3, t0 + t] = gate[0, t]
            if gather:
                own[bh * 3 + 1, t0 + t] = down[0, t]
            if plan.flags.gated:
                own[bh * 3 + 2, t0 + t] = gate[0, t] * down[2, t]
        for tb in range((rows + BLOCK - 1) // BLOCK):
            for db in range(Dk // BLOCK):
                transpose(at.dQT, db * BLOCK, 1, BLOCK - 1, rows_of, tb * BLOCK, db * BLOCK)
        for t in range(rows):
            for d in T.vectorized(Dk):
                at.dq[row0 + (t0 + t) * heads, d] = rows_of[t, d]


def pack(plan: Plan, at: Values, *, t0, rows) -> None:
    """The chunk's q and dy as columns, its k and v as rows."""
    Dk, Dv, BT = plan.Dk, plan.Dv, plan.BT
    k, v, K, V, YT, row0, heads = at.k, at.v, at.K, at.V, at.YT, at.row0, at.heads

    @emit
    def columns_and_rows():
        columns(at.q, Dk, row0, heads, t0, rows, at.QT)
        columns(at.dy, Dv, row0, heads, t0, rows, YT)
        for n in range(Dv):
            for t in T.vectorized(BT):
                YT[n, t] = YT[n, t] * at.scale
        for t in range(rows):
            for d in T.vectorized(Dk):
                K[t, d] = k[row0 + (t0 + t) * heads, d]
            for n in T.vectorized(Dv):
                V[t, n] = v[row0 + (t0 + t) * heads, n]


def read_chosen(plan: Plan, at: Values) -> None:
    """Each cached state with the tokens that chose it: their dq, gates and logits' gradients."""
    Dk, Dv, MR, NK = plan.Dk, plan.Dv, plan.MR, plan.NK
    gamma, dr, begin, states, scale = at.gamma, at.dr, at.begin, at.states, at.scale
    row0, past, base, length, saved, heads = at.row0, at.past, at.base, at.length, at.saved, at.heads
    tile = read_gathered(MR, NK, Dv)

    @emit
    def segments():
        w = T.meta_var(
            scratch(
                where=i32(at.N + 2), tokens_of=i32(at.top_k * at.longest + 1), gates_of=f32(at.top_k * at.longest + 1),
                MT=f32(Dv, Dk), parts=f32(MR, LANES),
            )
        )  # fmt: skip
        where = T.meta_var(w.where)
        parts = T.meta_var(w.parts)
        sort_by_segment(at.chosen, at.value, at.picks, length, past, where, w.tokens_of, w.gates_of)
        for x in range(past * length):
            gamma[saved + x] = T.float32(0)
            dr[saved + x] = T.float32(0)
        for i in range(past):
            for nn in range(Dv // BLOCK):
                for dd in range(Dk // BLOCK):
                    transpose(states, (base + i) * Dk + dd * BLOCK, 1, BLOCK - 1, w.MT, nn * BLOCK, dd * BLOCK)
            for xx in range((where[i + 1] - where[i] + MR - 1) // MR):
                x0: T.let = where[i] + xx * MR
                count: T.let = T.min(MR, where[i + 1] - x0)
                for dd in range(Dk // NK):
                    tile(
                        Y=at.dy, MT=w.MT, Q=at.q, dQ=at.dq, D=parts, d0=dd * NK, index=w.tokens_of, gate=w.gates_of,
                        x0=x0, count=count, origin=row0 + begin[at.s] * heads, stride=heads, scale=scale, first=dd == 0,
                    )  # fmt: skip
                for r in range(count):
                    to: T.let = saved + i * length + w.tokens_of[x0 + r]
                    gamma[to] = w.gates_of[x0 + r]
                    for x in T.vectorized(LANES // 2):
                        parts[r, x] = parts[r, x] + parts[r, x + LANES // 2]
                    for x in T.unroll(LANES // 2):
                        dr[to] = dr[to] + scale * parts[r, x]


def gates_again(at: Values, *, seen, t0, rows) -> None:
    """What ``read_chosen`` and ``one_chunk`` left of a chunk's gates and their gradients."""

    @emit
    def from_saved():
        for t in range(rows):
            at.gate[0, t] = at.own[at.bh * 3, t0 + t]
            at.down[0, t] = at.own[at.bh * 3 + 1, t0 + t]
        for i in range(at.past):
            for t in range(rows):
                at.gates[i, t] = at.gamma[at.saved + i * at.length + seen + t]
                at.dgates[i, t] = at.dr[at.saved + i * at.length + seen + t]
