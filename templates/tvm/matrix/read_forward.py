"""Read of a linear or SWLA Memory Caching layer (Eq. 6-17), float32, on a CPU.

    y_t = gamma_t^(s) M_t(q_t) + sum_{i < s} gamma_t^(i) M^(i)(q_t)

One task is one segment of one head, or one head whose segments follow each other; then the running state at the end
of each is the state that later ones read, and no ``segment_states`` runs before. A segment is walked in chunks of BT
tokens with a running state M:

    online = (W . Q K^T) V + decay * (Q M)          W: the causal weights of the recurrence
    y      = gamma^(s) * online + the cached states, in one of these formulations
        per_segment   C += gamma^(i) * (Q M^(i)), one product a segment
        gated         C += [gamma^(i) * Q]_i [M^(i)]_i, one long-K product over panels of ``panel`` segments
        summed        C += gamma * (Q sum_i M^(i)), where gamma is the same for every segment (residual, mean)
        gather        each state times just the tokens that chose it (ssc)

For a linear memory the soup of the states is their gated sum (Eq. 14-15), so soup is computed as grm.
"""

from tvm.script import tirx as T

from ..gates import sort_by_segment
from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import LANES, clear, copy_state, gather, sum_states
from .read_forward_chunk import Plan, advance, gates, pack, read_cached, read_online, weigh


def build(problem, config, target):
    """The PrimFunc ``read_forward`` for the widths of ``problem``; B, T, H and the segments are run-time values.

    Rows are tokens, ``[B*T*H, D]``; g, beta and lam have one element where the recurrence has none; states
    ``[B*H*N*Dk, Dv]`` and means ``[B*H*N, Dk]`` are those of ``segment_states``, or with one task a head output too;
    ``longest`` is the length of the longest segment. The output is y ``[B*T*H, Dv]``.
    """
    plan, n = Plan(problem, config), sizes("R", "N", "S", "G", "tokens", "heads", "longest", "top_k")
    Dk, Dv = plan.Dk, plan.Dv
    arguments = dict(
        q=f32(n.R, Dk), u=f32(n.R, Dk), k=f32(n.R, Dk), v=f32(n.R, Dv), g=f32(n.G), beta=f32(n.G), lam=f32(n.G),
        states=f32(n.S * Dk, Dv), means=f32(n.S, Dk), begin=i32(n.N), end=i32(n.N), first=i32(n.N),
        tokens=n.tokens, heads=n.heads, longest=n.longest, top_k=n.top_k, scale=T.float32, y=f32(n.R, Dv),
    )  # fmt: skip
    return prim_func("read_forward", arguments, n, lambda x: every_task(plan, x))


def scratch_of(plan: Plan, x: Values) -> Values:
    """What one task keeps to itself."""
    Dk, Dv, BT, JR, lead = plan.Dk, plan.Dv, plan.BT, plan.JR, plan.lead
    w = scratch(
        C=f32(BT, Dv),
        QT=f32(Dk, BT),
        UT=f32(Dk, BT),
        K=f32(BT + lead * JR, Dk),
        V=f32(BT + lead, Dv),
        W=f32(BT + lead * JR, BT),
        M=f32(Dk, Dv),
        total=f32(Dk),
        sum_of_values=f32(1),  # of the chunk
        own=f32(2, BT),  # scale times the own segment's gate, and times its decay of M
        gamma=f32(x.N + JR, BT),
        lanes=f32(4, LANES),
        best=i32(LANES),
        token_gates=f32(4, BT + 1),  # of the chunk's tokens: e^g, beta, lam; of K's rows: weights at the chunk's end
    )
    if plan.formulation == "gated":
        w = w.plus(scratch(A=f32(plan.panel * Dk, BT)))
    if plan.flags.sparse:
        kept = x.longest + BT if plan.formulation == "gather" else BT
        w = w.plus(scratch(chosen=i32(x.top_k + 1, kept), value=f32(x.top_k + 1, kept)))
    return w


def every_task(plan: Plan, x: Values) -> None:
    """One task a segment of a head, or one a head whose segments follow each other."""
    by_head = plan.by_head

    @emit
    def tasks():
        for outer in T.parallel(x.S // x.N if by_head else x.S):
            for inner in range(x.N if by_head else 1):
                bh: T.let = outer if by_head else outer // x.N
                place: T.let = inner if by_head else outer % x.N
                # Late segments read more: pairing early with late ones balances contiguous shares of the tasks.
                s: T.let = place if by_head else T.if_then_else(place % 2 == 0, place // 2, x.N - 1 - place // 2)
                row0: T.let = bh // x.heads * x.tokens * x.heads + bh % x.heads
                past: T.let = s - x.first[s]
                base: T.let = bh * x.N + x.first[s]
                length: T.let = x.end[s] - x.begin[s]
                picks: T.let = T.min(x.top_k, past)
                at = T.meta_var(
                    x.plus(scratch_of(plan, x), bh=bh, s=s, row0=row0, past=past, base=base, length=length, picks=picks)
                )
                one_segment(plan, at)


def one_segment(plan: Plan, at: Values) -> None:
    """y of a segment's tokens; with one task a head, its state and descriptor too."""
    Dk, Dv, BT, formulation, checkpoint = plan.Dk, plan.Dv, plan.BT, plan.formulation, plan.flags.checkpoint
    s, past, base, length, M, total, states = at.s, at.past, at.base, at.length, at.M, at.total, at.states

    @emit
    def chunks():
        clear(M, 0, Dk, Dv)
        for d in T.vectorized(Dk):
            total[d] = T.float32(0)
        if checkpoint:
            if past > 0:
                copy_state(states, (base + past - 1) * Dk, M, Dk, Dv)
        summed = T.meta_var(scratch(summed=f32(Dk, Dv)) if formulation == "summed" else Values())
        if formulation == "summed":
            sum_states(states, base, past, summed.summed, Dk, Dv)
        for c in range((length + BT - 1) // BT):
            t0: T.let = at.begin[s] + c * BT
            rows: T.let = T.min(BT, at.end[s] - t0)
            tiles: T.let = (rows + plan.MR - 1) // plan.MR
            linked = T.meta_var(T.Or(c > 0, T.And(checkpoint, past > 0)))
            one_chunk(plan, at.plus(summed), c=c, t0=t0, rows=rows, tiles=tiles, linked=linked)
            # One task a head computes the states as it goes: what segment_states would have left.
            if T.Or((c + 1) * BT < length, plan.by_head):
                advance(plan, at)
        if plan.by_head:
            for d in range(Dk):
                for n in T.vectorized(Dv):
                    states[(at.bh * at.N + s) * Dk + d, n] = M[d, n]
            for d in T.vectorized(Dk):
                at.means[at.bh * at.N + s, d] = total[d] / T.cast(length, "float32")
        if formulation == "gather":
            read_chosen(plan, at)


def one_chunk(plan: Plan, at: Values, *, c, t0, rows, tiles, linked) -> None:
    """y of one chunk's tokens; unless gathered, that is all they read."""
    Dv, y, C, row0, heads = plan.Dv, at.y, at.C, at.row0, at.heads

    @emit
    def chunk():
        pack(plan, at, t0=t0, rows=rows, linked=linked)
        gates(plan, at, t0=t0, rows=rows, seen=c * plan.BT)
        weigh(plan, at, t0=t0, rows=rows, linked=linked)
        read_online(plan, at, tiles=tiles, linked=linked)
        read_cached(plan, at, tiles=tiles)
        for t in range(rows):
            for n in T.vectorized(Dv):
                y[row0 + (t0 + t) * heads, n] = C[t, n]


def read_chosen(plan: Plan, at: Values) -> None:
    """Each cached state times the tokens that chose it, sorted by segment when the gates of all are known."""
    Dk, Dv, MR, NR = plan.Dk, plan.Dv, plan.MR, plan.NR
    past, base = at.past, at.base
    tile = gather(MR, NR, Dk)

    @emit
    def segments():
        w = T.meta_var(
            scratch(
                where=i32(at.N + 2), tokens_of=i32(at.top_k * at.longest + 1), gates_of=f32(at.top_k * at.longest + 1)
            )
        )
        where = T.meta_var(w.where)
        sort_by_segment(at.chosen, at.value, at.picks, at.length, past, where, w.tokens_of, w.gates_of)
        for i in range(past):
            for nn in range(Dv // NR):
                for xx in range((where[i + 1] - where[i] + MR - 1) // MR):
                    tile(
                        A=at.q, B=at.states, b0=(base + i) * Dk, C=at.y, n0=nn * NR, index=w.tokens_of,
                        weight=w.gates_of, x0=where[i] + xx * MR, count=where[i + 1] - where[i] - xx * MR,
                        origin=at.row0 + at.begin[at.s] * at.heads, stride=at.heads,
                    )  # fmt: skip
