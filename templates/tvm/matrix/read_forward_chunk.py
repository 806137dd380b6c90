"""What ``read_forward`` does with one chunk of tokens: gates, weights of the tokens in each other's memory, products.

Scores and gates stand as [key or segment, token], so that LANES tokens go through each step side by side.
"""

from tvm.script import tirx as T

from ..flags import flags_of
from ..gates import block_gates
from ..kernel import Values, emit
from ..tiles import LANES, add_up, columns, dot_rows, exp, finite, multiply, stain


class Plan:
    """Sizes and flags of one ``read_forward``."""

    def __init__(self, problem, config) -> None:
        self.Dk, self.Dv = problem.Dk, problem.Dv
        self.BT, self.MR, self.NR, self.unroll = config["chunk"], config["rows"], config["cols"], config["unroll"]
        self.JR, self.TL = config["score_rows"], config["score_lanes"]
        self.SR, self.SC = config["state_rows"], config["state_cols"]
        self.formulation, self.panel = config["formulation"], config["panel"]
        self.by_head = config["parallel"] == "head"
        self.rows_outer = config["loop_order"] == "rows_outer"
        self.flags = flags_of(problem)
        self.lead = 1 if self.flags.gated else 0  # a chunk of gated writes starts with the row before it


def pack(plan: Plan, at: Values, *, t0, rows, linked) -> None:
    """The chunk's q as columns, its k and v as rows: zeros after its last one, and before it the ``linked`` row."""
    Dk, Dv, BT, JR, lead = plan.Dk, plan.Dv, plan.BT, plan.JR, plan.lead
    k, v, K, V, row0, heads = at.k, at.v, at.K, at.V, at.row0, at.heads

    @emit
    def columns_and_rows():
        columns(at.q, Dk, row0, heads, t0, rows, at.QT)
        for t in range(rows):
            for d in T.vectorized(Dk):
                K[lead + t, d] = k[row0 + (t0 + t) * heads, d]
            for n in T.vectorized(Dv):
                V[lead + t, n] = v[row0 + (t0 + t) * heads, n]
        for t in range(BT - rows):
            for d in T.vectorized(Dk):
                K[lead + rows + t, d] = T.float32(0)
            for n in T.vectorized(Dv):
                V[lead + rows + t, n] = T.float32(0)
        if plan.flags.gated:
            for j in range(JR - 1):
                for d in T.vectorized(Dk):
                    K[BT + 1 + j, d] = T.float32(0)
            for d in T.vectorized(Dk):
                K[0, d] = T.float32(0)
            for n in T.vectorized(Dv):
                V[0, n] = T.float32(0)
            if linked:
                for d in T.vectorized(Dk):
                    K[0, d] = k[row0 + (t0 - 1) * heads, d]
                for n in T.vectorized(Dv):
                    V[0, n] = v[row0 + (t0 - 1) * heads, n]


def gates(plan: Plan, at: Values, *, t0, rows, seen) -> None:
    """scale * gates of the chunk's tokens, of which the segment has ``seen`` before."""
    BT, own, spread = plan.BT, at.own, plan.formulation != "gather"
    block_gates(
        plan, at, own, at.gamma, BT=BT, score=(plan.JR, plan.TL), t0=t0, rows=rows, seen=seen, scale=at.scale,
        spread=spread,
    )  # fmt: skip

    @emit
    def others():
        if not plan.flags.routed and plan.by_head:
            add_keys(plan, at, rows=rows)
        if not plan.flags.gated:
            for t in T.vectorized(BT):
                own[1, t] = own[0, t]


def add_keys(plan: Plan, at: Values, *, rows) -> None:
    """The sum of the segment's keys: nothing here reads their mean, but a cache keeps it."""
    Dk, K, lead, total = plan.Dk, at.K, plan.lead, at.total

    @emit
    def sums():
        for t in range(rows):
            for d in T.vectorized(Dk):
                total[d] = total[d] + K[lead + t, d]


def weigh(plan: Plan, at: Values, *, t0, rows, linked) -> None:
    """W[lead + j, t] = (q_t . k_j) * (weight of token j in the state of token t) * gate of the own segment."""
    BT, JR, TL, lead, W, own = plan.BT, plan.JR, plan.TL, plan.lead, at.W, at.own
    scores = dot_rows(JR, TL, plan.unroll, plan.Dk)

    @emit
    def products():
        for jj in range((BT + lead + JR - 1) // JR):
            for tt in range(BT // TL):
                if jj * JR - lead < (tt + 1) * TL:
                    scores(A=at.K, a0=jj * JR, a1=jj * JR + JR - 1, B=at.QT, C=W, c0=jj * JR, t0=tt * TL)
        if plan.flags.gated:
            take_gates(plan, at, t0=t0, rows=rows, linked=linked)
            for tb in range(BT // LANES):
                weigh_gated(plan, at, t=tb * LANES)
        else:
            for j in range(BT):
                for tb in range(BT // LANES):
                    for x in T.vectorized(LANES):
                        W[j, tb * LANES + x] = T.Select(
                            tb * LANES + x >= j, W[j, tb * LANES + x] * own[0, tb * LANES + x], T.float32(0)
                        )


def take_gates(plan: Plan, at: Values, *, t0, rows, linked) -> None:
    """Gates of the chunk's writes; after its last token, those of a token that changes nothing."""
    token_gates, row0, heads = at.token_gates, at.row0, at.heads

    @emit
    def e_to_the_g_beta_lam():
        for j in range(plan.BT + 1):
            token_gates[0, j] = T.float32(1)
            token_gates[1, j] = T.float32(0)
            token_gates[2, j] = T.float32(0)
        for j in range(rows):
            token_gates[0, j] = exp(at.g[row0 + (t0 + j) * heads])
            token_gates[1, j] = at.beta[row0 + (t0 + j) * heads]
            token_gates[2, j] = at.lam[row0 + (t0 + j) * heads]
        if not linked:
            token_gates[1, 0] = token_gates[1, 0] + stain(token_gates[0, 0])


def weigh_gated(plan: Plan, at: Values, *, t) -> None:
    """The weights of W in the LANES columns from ``t`` on; the last column's are the chunk's, for ``advance``."""
    BT, W, own, lanes, token_gates = plan.BT, at.W, at.own, at.lanes, at.token_gates

    @emit
    def from_the_last_row():
        for x in T.vectorized(LANES):
            lanes[0, x] = T.float32(0)
        for i in range(BT):
            j: T.let = BT - 1 - i
            for x in T.vectorized(LANES):
                lanes[1, x] = lanes[0, x]
                lanes[0, x] = T.Select(t + x == j, T.float32(1), lanes[0, x] * token_gates[0, j + 1])
                # Later tokens' gates may be NaN.
                lanes[2, x] = token_gates[2, j] * lanes[0, x] + T.Select(
                    t + x > j, token_gates[1, j + 1] * lanes[1, x], T.float32(0)
                )
                W[1 + j, t + x] = T.Select(t + x >= j, W[1 + j, t + x] * lanes[2, x] * own[0, t + x], T.float32(0))
            token_gates[3, 1 + j] = lanes[2, LANES - 1]
        token_gates[3, 0] = token_gates[1, 0] * lanes[0, LANES - 1]
        for x in T.vectorized(LANES):
            W[0, t + x] = W[0, t + x] * token_gates[1, 0] * lanes[0, x] * own[0, t + x]
            own[1, t + x] = own[0, t + x] * lanes[0, x] * token_gates[0, 0]
        lanes[3, 0] = lanes[0, LANES - 1] * token_gates[0, 0]


def advance(plan: Plan, at: Values) -> None:
    """The running state at the end of a chunk."""
    Dk, Dv, BT, SR, SC, lead = plan.Dk, plan.Dv, plan.BT, plan.SR, plan.SC, plan.lead
    K, M, token_gates = at.K, at.M, at.token_gates
    write = multiply(SR, SC, 1)

    @emit
    def writes():
        if plan.flags.gated:
            for j in range(BT + 1):
                for d in T.vectorized(Dk):
                    K[j, d] = K[j, d] * token_gates[3, j]
            for d in range(Dk):
                for n in T.vectorized(Dv):
                    M[d, n] = M[d, n] * at.lanes[3, 0]
        for dd in range(Dk // SR):
            for nn in range(Dv // SC):
                write(
                    A=K, a0=0, B=at.V, b0=0, steps=BT + lead, C=M, r0=dd * SR, n0=nn * SC, G=at.own, g0=0, gated=False,
                    fresh=False,
                )  # fmt: skip


def over_tiles(plan: Plan, count, tile) -> None:
    """``tile(t, n)`` over ``count`` tiles of tokens and all tiles of columns, in the configuration's order."""
    Dv, MR, NR = plan.Dv, plan.MR, plan.NR

    @emit
    def loops():
        if plan.rows_outer:
            for tt in range(count):
                for nn in range(Dv // NR):
                    tile(tt * MR, nn * NR)
        else:
            for nn in range(Dv // NR):
                for tt in range(count):
                    tile(tt * MR, nn * NR)


def read_online(plan: Plan, at: Values, *, tiles, linked) -> None:
    """C = what the tokens read of each other, plus what they read of the ``linked`` running state."""
    Dk, Dv, BT, MR, NR, lead = plan.Dk, plan.Dv, plan.BT, plan.MR, plan.NR, plan.lead
    W, V, C, own = at.W, at.V, at.C, at.own
    intra, product = multiply(MR, NR, 1), multiply(MR, NR, plan.unroll)

    def from_tokens(t, n):
        intra(
            A=W, a0=0, B=V, b0=0, steps=lead + T.min(t + MR, BT), C=C, r0=t, n0=n, G=own, g0=0, gated=False, fresh=True
        )

    def from_running(t, n):
        product(A=at.QT, a0=0, B=at.M, b0=0, steps=Dk, C=C, r0=t, n0=n, G=own, g0=1, gated=True, fresh=False)

    @emit
    def products():
        add_up(V, lead + BT, Dv, at.sum_of_values)
        if finite(at.sum_of_values[0]):
            over_tiles(plan, tiles, from_tokens)
        else:
            # Tiles go beyond the diagonal, where a weight is 0 but a value may be NaN.
            for t in range(BT):
                for n in T.vectorized(Dv):
                    C[t, n] = T.float32(0)
                for j in range(lead + t + 1):
                    for n in T.vectorized(Dv):
                        C[t, n] = C[t, n] + W[j, t] * V[j, n]
        if linked:
            over_tiles(plan, tiles, from_running)


def read_cached(plan: Plan, at: Values, *, tiles) -> None:
    """C += what the tokens read of the cached states; nothing yet where those are gathered."""
    Dk, panel, formulation, routed, past = plan.Dk, plan.panel, plan.formulation, plan.flags.routed, at.past
    product = multiply(plan.MR, plan.NR, plan.unroll, chosen=plan.flags.sparse)

    def from_states(B, row, G, g0):
        return lambda t, n: product(
            A=at.QT, a0=0, B=B, b0=row, steps=Dk, C=at.C, r0=t, n0=n, G=G, g0=g0, gated=True, fresh=False
        )

    def from_panel(row, width):
        return lambda t, n: product(
            A=at.A, a0=0, B=at.states, b0=row, steps=width * Dk, C=at.C, r0=t, n0=n, G=at.own, g0=0, gated=False,
            fresh=False,
        )  # fmt: skip

    def from_gated(first, width):
        weigh_queries(plan, at, first=first, count=width)
        over_tiles(plan, tiles, from_panel(row=(at.base + first) * Dk, width=width))

    @emit
    def products():
        if formulation == "summed":
            if past > 0:
                over_tiles(plan, tiles, from_states(B=at.summed, row=0, G=at.own, g0=0))
        if formulation == "per_segment":
            for i in range(past):
                gate = T.meta_var(at.gamma if routed else at.own)
                over_tiles(
                    plan, tiles, from_states(B=at.states, row=(at.base + i) * Dk, G=gate, g0=i if routed else 0)
                )  # fmt: skip
        if formulation == "gated":
            for i in range((past + panel - 1) // panel):
                width: T.let = T.min(panel, past - i * panel)
                if not plan.flags.sparse:
                    from_gated(first=i * panel, width=width)
                else:
                    add_up(at.states, width * Dk, plan.Dv, at.sum_of_values, (at.base + i * panel) * Dk)
                    if finite(at.sum_of_values[0]):
                        from_gated(first=i * panel, width=width)
                    else:
                        # A gate of 0 leaves out one state, not a panel of them.
                        for p in range(width):
                            row = T.meta_var((at.base + i * panel + p) * Dk)
                            over_tiles(plan, tiles, from_states(B=at.states, row=row, G=at.gamma, g0=i * panel + p))


def weigh_queries(plan: Plan, at: Values, *, first, count) -> None:
    """A = q times the gates of ``count`` segments, one below the other."""
    Dk, BT, A, QT, gamma = plan.Dk, plan.BT, at.A, at.QT, at.gamma

    @emit
    def rows():
        for p in range(count):
            for d in range(Dk):
                for t in T.vectorized(BT):
                    A[p * Dk + d, t] = QT[d, t] * gamma[first + p, t]
