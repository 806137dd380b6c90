"""Gradients of the writes of a linear or SWLA memory (Eq. 2, 26-27) and of its descriptors, float32, on a CPU.

A segment is walked in chunks of BT tokens from its end. With Q_t = scale * gamma_t^(s) * q_t, the gradient Z of the
memory at the first token after the chunk and the causal weight w_jt of token j in the memory of token t,

    dv_j = sum_{t >= j} w_jt (Q_t . k_j) dy_t + w_jz k_j Z         w_jz: the weight of token j in that memory
    dk_j = sum_{t >= j} w_jt (dy_t . v_j) Q_t + w_jz Z v_j + dp / length + sum_{t >= j} dr_t u_t / n_t
    Z   <- decay Z + sum_t decay_t Q_t^T dy_t

where n_t counts the segment's tokens up to t. In SWLA, w_jt = lam_j e^{g_{j+1}}...e^{g_t} + beta_{j+1} e^{g_{j+2}}...
e^{g_t}, and with Z_t the gradient of M_t, dlam_j = k_j Z_j v_j, dbeta_{j+1} = k_j Z_{j+1} v_j and
dg_t = e^{g_t} <M_{t-1}, Z_t>.
"""

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import LANES, add_up, clear, columns, copy_state, finite, multiply
from .backward_tiles import fetch
from .write_backward_chunk import Plan, products, rows_of_state
from .write_backward_gates import gradients_of_gates, lead


def build(problem, config, target):
    """The PrimFunc ``write_backward`` for the widths of ``problem``; B, T, H and the segments are run-time values.

    Rows are tokens, ``[B*T*H, D]``; g, beta and lam have one element where the recurrence has none; own and entering
    are those of ``read_backward``, states of ``segment_states``, dstates and dmeans of ``state_backward``; lead_key
    ``[B*H*N, Dk]`` and lead_value ``[B*H*N, Dv]`` are scratch; what follows is output, shaped as what it is of.
    """
    plan, n = Plan(problem, config), sizes("R", "N", "S", "G", "J", "P", "tokens", "heads")
    Dk, Dv = plan.Dk, plan.Dv
    arguments = dict(
        dy=f32(n.R, Dv), q=f32(n.R, Dk), u=f32(n.R, Dk), k=f32(n.R, Dk), v=f32(n.R, Dv),
        g=f32(n.G), beta=f32(n.G), lam=f32(n.G), own=f32(n.J, n.tokens), entering=f32(n.P, Dv),
        states=f32(n.S * Dk, Dv), dstates=f32(n.S * Dk, Dv), dmeans=f32(n.S, Dk),
        begin=i32(n.N), end=i32(n.N), first=i32(n.N), tokens=n.tokens, heads=n.heads, scale=T.float32,
        lead_key=f32(n.S, Dk), lead_value=f32(n.S, Dv),
        dk=f32(n.R, Dk), dv=f32(n.R, Dv), dg=f32(n.G), dbeta=f32(n.G), dlam=f32(n.G),
    )  # fmt: skip

    def body(x: Values) -> None:
        every_segment(plan, x)
        if plan.flags.gated and plan.flags.checkpoint:
            add_leads(plan, x)

    return prim_func("write_backward", arguments, n, body)


def scratch_of(plan: Plan) -> Values:
    """What one task keeps to itself."""
    Dk, Dv, BT = plan.Dk, plan.Dv, plan.BT
    return scratch(
        Q=f32(BT, Dk),
        Y=f32(BT, Dv),
        KT=f32(Dk, BT),
        VT=f32(Dv, BT),
        W1=f32(BT, BT),
        W2=f32(BT, BT),
        Z=f32(Dk, Dv),
        ZT=f32(Dv, Dk),
        C=f32(BT, Dv),
        CK=f32(BT, Dk),
        through=f32(Dk),  # of the descriptors: dp / length and the later tokens' sum
        lanes=f32(4, LANES),
        token_gates=f32(2, BT + LANES),  # of the chunk's tokens and the next: e^g, beta
        # By row: lam, the next beta, k_j Z v_j, their gradients dlam and the next dbeta; decay of X.
        of_row=f32(6, BT + LANES),
        W=f32(BT + 1, BT),  # w_jt at [t, j], up to the token after the chunk
        forgotten=f32(BT + 1, LANES),  # by token, lanes to be summed: what its decay scales
        sums=f32(2),  # of the chunk's Q and Y
        none=f32(1, 1),
    )


def every_segment(plan: Plan, x: Values) -> None:
    """One task a segment of a head."""
    BT, flags = plan.BT, plan.flags

    @emit
    def tasks():
        for task in T.parallel(x.S):
            bh: T.let = task // x.N
            # Backwards, so that the chunk before the one at work is the next one, whose rows are fetched meanwhile.
            s: T.let = x.N - 1 - task % x.N
            row0: T.let = bh // x.heads * x.tokens * x.heads + bh % x.heads
            length: T.let = x.end[s] - x.begin[s]
            chunks: T.let = (length + BT - 1) // BT
            # Something later reads the segment's end state.
            ends_linked: T.let = T.And(s + 1 < x.N, x.first[T.min(s + 1, x.N - 1)] == x.first[s])
            at = T.meta_var(x.plus(scratch_of(plan), bh=bh, s=s, row0=row0, length=length, ends_linked=ends_linked))
            start(plan, at)
            for turn in range(chunks):
                t0: T.let = x.begin[s] + (chunks - 1 - turn) * BT
                rows: T.let = T.min(BT, x.end[s] - t0)
                linked: T.let = T.Or(turn > 0, ends_linked)
                pack(plan, at, t0=t0, rows=rows)
                products(plan, at, t0=t0, rows=rows)
                rows_of_state(plan, at, t0=t0, rows=rows, linked=linked)
                if flags.gated:
                    gradients_of_gates(plan, at, t0=t0, rows=rows, turn=turn, c=chunks - 1 - turn)
                rows_of_chunk(plan, at, t0=t0, rows=rows)
                finish(plan, at, t0=t0, rows=rows)
                if T.Or(flags.gated and flags.checkpoint, turn + 1 < chunks):
                    retreat(plan, at, rows=rows)
            if flags.gated:
                lead(plan, at)


def start(plan: Plan, at: Values) -> None:
    """The gradient of the memory after the segment's last token, and of the keys through the descriptor."""
    Dk, Dv = plan.Dk, plan.Dv

    @emit
    def from_later_segments():
        clear(at.Z, 0, Dk, Dv)
        for d in T.vectorized(Dk):
            at.through[d] = T.float32(0)
        if at.ends_linked:
            copy_state(at.dstates, (at.bh * at.N + at.s) * Dk, at.Z, Dk, Dv)
            if plan.flags.routed:
                for d in T.vectorized(Dk):
                    at.through[d] = at.dmeans[at.bh * at.N + at.s, d] / T.cast(at.length, "float32")


def pack(plan: Plan, at: Values, *, t0, rows) -> None:
    """The chunk's k and v as columns, its scale * gamma * q and dy as rows."""
    Dk, Dv = plan.Dk, plan.Dv
    Q, Y, lanes, row0, heads = at.Q, at.Y, at.lanes, at.row0, at.heads

    @emit
    def columns_and_rows():
        columns(at.k, Dk, row0, heads, t0, rows, at.KT)
        columns(at.v, Dv, row0, heads, t0, rows, at.VT)
        for t in range(rows):
            lanes[0, 0] = at.scale * at.own[at.bh * 3, t0 + t]
            for d in T.vectorized(Dk):
                Q[t, d] = lanes[0, 0] * at.q[row0 + (t0 + t) * heads, d]
            for n in T.vectorized(Dv):
                Y[t, n] = at.dy[row0 + (t0 + t) * heads, n]


def rows_of_chunk(plan: Plan, at: Values, *, t0, rows) -> None:
    """Add to C and CK what the chunk's own tokens read."""

    @emit
    def sums_first():
        add_up(at.Q, rows, plan.Dk, at.sums)
        at.sums[1] = at.sums[0]
        add_up(at.Y, rows, plan.Dv, at.sums)
        if T.And(finite(at.sums[0]), finite(at.sums[1])):
            tiles_of_chunk(plan, at, t0=t0, rows=rows)
        else:
            one_by_one(plan, at, rows=rows)


def one_by_one(plan: Plan, at: Values, *, rows) -> None:
    """The same without tiles, which take in earlier tokens: their weight is 0, but what they read may be NaN."""
    C, CK, W1, W2, Q, Y = at.C, at.CK, at.W1, at.W2, at.Q, at.Y

    @emit
    def later_tokens():
        for j in range(rows):
            for i in range(rows - j):
                for n in T.vectorized(plan.Dv):
                    C[j, n] = C[j, n] + W1[j + i, j] * Y[j + i, n]
                for d in T.vectorized(plan.Dk):
                    CK[j, d] = CK[j, d] + W2[j + i, j] * Q[j + i, d]


def tiles_of_chunk(plan: Plan, at: Values, *, t0, rows) -> None:
    """The same in tiles."""
    Dk, Dv, MR, NV, NK = plan.Dk, plan.Dv, plan.MR, plan.NV, plan.NK
    from_values, from_keys = multiply(MR, NV, 1), multiply(MR, NK, 1)

    @emit
    def tiles():
        for jj in range((rows + MR - 1) // MR):
            fetch(at, at.dk, Dk, t=t0 + jj * MR, count=MR, writes=1)
            fetch(at, at.dv, Dv, t=t0 + jj * MR, count=MR, writes=1)
            if plan.flags.routed:
                fetch(at, at.u, Dk, t=t0 + jj * MR, count=MR)
            for nn in range(Dv // NV):
                from_values(
                    A=at.W1, a0=jj * MR, B=at.Y, b0=jj * MR, steps=rows - jj * MR, C=at.C, r0=jj * MR, n0=nn * NV,
                    G=at.none, g0=0, gated=False, fresh=False,
                )  # fmt: skip
            for dd in range(Dk // NK):
                from_keys(
                    A=at.W2, a0=jj * MR, B=at.Q, b0=jj * MR, steps=rows - jj * MR, C=at.CK, r0=jj * MR, n0=dd * NK,
                    G=at.none, g0=0, gated=False, fresh=False,
                )  # fmt: skip


def finish(plan: Plan, at: Values, *, t0, rows) -> None:
    """The rows of dk, with what comes through the descriptors, and of dv."""
    Dk, Dv = plan.Dk, plan.Dv
    u, dk, through, lanes, CK = at.u, at.dk, at.through, at.lanes, at.CK

    @emit
    def from_the_last_row():
        for i in range(rows):
            j: T.let = rows - 1 - i
            row: T.let = at.row0 + (t0 + j) * at.heads
            if plan.flags.routed:
                lanes[0, 0] = at.own[at.bh * 3 + 1, t0 + j] / T.cast(t0 + j + 1 - at.begin[at.s], "float32")
                for d in T.vectorized(Dk):
                    through[d] = through[d] + lanes[0, 0] * u[row, d]
                    dk[row, d] = CK[j, d] + through[d]
            else:
                for d in T.vectorized(Dk):
                    dk[row, d] = CK[j, d]
            for n in T.vectorized(Dv):
                at.dv[row, n] = at.C[j, n]


def retreat(plan: Plan, at: Values, *, rows) -> None:
    """Z at the chunk's own first token."""
    Dk, Dv, SR, SC = plan.Dk, plan.Dv, plan.SR, plan.SC
    Q, Z, lanes, token_gates = at.Q, at.Z, at.lanes, at.token_gates
    update = multiply(SR, SC, 1)

    @emit
    def reads():
        if plan.flags.gated:
            lanes[0, 0] = T.float32(1)
            for t in range(rows):
                if t > 0:
                    lanes[0, 0] = lanes[0, 0] * token_gates[0, t]
                for d in T.vectorized(Dk):
                    Q[t, d] = Q[t, d] * lanes[0, 0]
            lanes[0, 0] = lanes[0, 0] * token_gates[0, rows]
            for d in range(Dk):
                for n in T.vectorized(Dv):
                    Z[d, n] = Z[d, n] * lanes[0, 0]
        for dd in range(Dk // SR):
            for nn in range(Dv // SC):
                update(
                    A=Q, a0=0, B=at.Y, b0=0, steps=rows, C=Z, r0=dd * SR, n0=nn * SC, G=at.none, g0=0, gated=False,
                    fresh=False,
                )  # fmt: skip


def add_leads(plan: Plan, x: Values) -> None:
    """Add to the last row of a segment what the next one leaves it: it takes part in that one's first write."""
    Dk, Dv = plan.Dk, plan.Dv
    begin, tokens, heads, dk, dv = x.begin, x.tokens, x.heads, x.dk, x.dv

    @emit
    def tasks():
        for task in T.parallel(x.S):
            if task % x.N != x.first[task % x.N]:
                row: T.let = (
                    task // x.N // heads * tokens * heads + task // x.N % heads + (begin[task % x.N] - 1) * heads
                )
                for d in T.vectorized(Dk):
                    dk[row, d] = dk[row, d] + x.lead_key[task, d]
                for n in T.vectorized(Dv):
                    dv[row, n] = dv[row, n] + x.lead_value[task, n]
