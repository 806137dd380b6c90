"""What ``read_backward`` does with one chunk of tokens: gates, weights, products with the states, gradients of gates.

Everything stands as [feature, token] or [segment, token], so that LANES tokens go through each step side by side.
"""

from tvm.script import tirx as T

from ..flags import flags_of
from ..gates import block_gates
from ..kernel import Values, emit
from ..tiles import LANES, add_up, dot_rows, exp, finite, multiply, stain, weighed
from .backward_tiles import fetch, read_online, read_state


class Plan:
    """Sizes and flags of one ``read_backward``."""

    def __init__(self, problem, config) -> None:
        self.Dk, self.Dv = problem.Dk, problem.Dv
        self.BT, self.NK = config["chunk"], config["key_cols"]
        self.MR, self.RR, self.RL = config["rows"], config["read_rows"], config["read_lanes"]
        self.JR, self.TL, self.unroll = config["score_rows"], config["score_lanes"], config["unroll"]
        self.SR, self.SC = config["state_rows"], config["state_cols"]
        self.formulation = config["formulation"]
        self.flags = flags_of(problem)


def gates(plan: Plan, at: Values, *, t0, rows, seen) -> None:
    """Gates of the chunk's tokens, of which the segment has ``seen`` before."""
    block_gates(
        plan, at, at.gate, at.gates, BT=plan.BT, score=(plan.JR, plan.TL), t0=t0, rows=rows, seen=seen,
        scale=T.float32(1), spread=plan.formulation != "gather",
    )  # fmt: skip


def weigh(plan: Plan, at: Values, *, t0, rows, linked) -> None:
    """E[j, t] = (v_j . dy_t) * the weight of token j in the memory of token t; the next chunk's rows on their way."""
    Dk, Dv, BT, JR, TL, flags = plan.Dk, plan.Dv, plan.BT, plan.JR, plan.TL, plan.flags
    E = at.E
    scores = dot_rows(JR, TL, plan.unroll, Dv)

    @emit
    def products():
        for jj in range((rows + JR - 1) // JR):
            fetch(at, at.q, Dk, t=t0 + BT + jj * JR, count=JR)
            fetch(at, at.dy, Dv, t=t0 + BT + jj * JR, count=JR)
            fetch(at, at.k, Dk, t=t0 + BT + jj * JR, count=JR)
            fetch(at, at.v, Dv, t=t0 + BT + jj * JR, count=JR)
            if flags.routed:
                fetch(at, at.u, Dk, t=t0 + BT + jj * JR, count=JR)
            for tt in range((rows + TL - 1) // TL):
                if jj * JR < (tt + 1) * TL:
                    scores(A=at.V, a0=jj * JR, a1=rows - 1, B=at.YT, C=E, c0=jj * JR, t0=tt * TL)
        if flags.gated:
            take_gates(plan, at, t0=t0, rows=rows, linked=linked)
        for tb in range((rows + LANES - 1) // LANES):
            if flags.gated:
                weigh_gated(at, t=tb * LANES, rows=rows)
            else:
                for j in range(rows):
                    for x in T.vectorized(LANES):
                        E[j, tb * LANES + x] = T.Select(tb * LANES + x >= j, E[j, tb * LANES + x], T.float32(0))


def take_gates(plan: Plan, at: Values, *, t0, rows, linked) -> None:
    """Gates of the chunk's writes, and of the next chunk's first token: ``advance`` ends there."""
    token_gates, row0, heads = at.token_gates, at.row0, at.heads

    @emit
    def e_to_the_g_beta_lam():
        for j in T.vectorized(plan.BT + LANES):
            token_gates[0, j] = T.float32(1)
            token_gates[1, j] = T.float32(0)
            token_gates[2, j] = T.float32(0)
        for j in range(T.min(rows + 1, at.end[at.s] - t0)):
            token_gates[0, j] = exp(at.g[row0 + (t0 + j) * heads])
            token_gates[1, j] = at.beta[row0 + (t0 + j) * heads]
            token_gates[2, j] = at.lam[row0 + (t0 + j) * heads]
        if not linked:
            token_gates[2, 0] = token_gates[2, 0] + stain(token_gates[0, 0]) + stain(token_gates[1, 0])


def weigh_gated(at: Values, *, t, rows) -> None:
    """The weights of E in the LANES columns from ``t`` on, and the decay of X up to each."""
    E, lanes, token_gates = at.E, at.lanes, at.token_gates

    @emit
    def from_the_last_row():
        for x in T.vectorized(LANES):
            lanes[0, x] = T.float32(0)
        for i in range(rows):
            j: T.let = rows - 1 - i
            for x in T.vectorized(LANES):
                lanes[1, x] = lanes[0, x]
                lanes[0, x] = T.Select(t + x == j, T.float32(1), lanes[0, x] * token_gates[0, j + 1])
                E[j, t + x] = T.Select(
                    t + x >= j,
                    E[j, t + x]
                    * (
                        token_gates[2, j] * lanes[0, x]
                        # Later tokens' gates may be NaN.
                        + T.Select(t + x > j, token_gates[1, j + 1] * lanes[1, x], T.float32(0))
                    ),
                    T.float32(0),
                )
        for x in T.vectorized(LANES):
            at.gate[1, t + x] = lanes[0, x]


def read(plan: Plan, at: Values, *, rows, linked) -> None:
    """dQT of the chunk and the gates' gradients: from the online memory and, unless gathered, from cached states."""
    Dk, RR, RL, routed, formulation = plan.Dk, plan.RR, plan.RL, plan.flags.routed, plan.formulation
    base, past = at.base, at.past
    cached = read_state(RR, RL, plan.unroll, plan.Dv, routed, chosen=plan.flags.sparse)

    def online(tt, guarded):
        tile = read_online(RR, RL, plan.unroll, plan.Dv, routed, plan.flags.gated, guarded)

        @emit
        def rows_of_keys():
            for dd in range(Dk // RR):
                tile(
                    M=at.M, Y=at.YT, K=at.K, E=at.E, steps=T.min((tt + 1) * RL, rows), Q=at.QT, dQ=at.dQT, G=at.gate,
                    D=at.down, d0=dd * RR, t0=tt * RL, linked=linked, first=dd == 0,
                )  # fmt: skip

    @emit
    def tiles():
        add_up(at.K, rows, Dk, at.sum_of_keys)
        for tt in range((rows + RL - 1) // RL):
            if finite(at.sum_of_keys[0]):
                online(tt, False)
            else:
                online(tt, True)
            if formulation == "summed":
                if past > 0:
                    for dd in range(Dk // RR):
                        cached(
                            M=at.summed, m0=0, Y=at.YT, Q=at.QT, dQ=at.dQT, G=at.gate, D=at.down, i=0, d0=dd * RR,
                            t0=tt * RL, first=dd == 0,
                        )  # fmt: skip
            if formulation == "per_segment":
                for i in range(past):
                    for dd in range(Dk // RR):
                        cached(
                            M=at.states, m0=(base + i) * Dk, Y=at.YT, Q=at.QT, dQ=at.dQT, G=at.gates, D=at.dgates, i=i,
                            d0=dd * RR, t0=tt * RL, first=dd == 0,
                        )  # fmt: skip


def advance(plan: Plan, at: Values) -> None:
    """X of the next chunk; this one is BT tokens long."""
    Dk, Dv, BT, SR, SC = plan.Dk, plan.Dv, plan.BT, plan.SR, plan.SC
    K, M, lanes, token_gates = at.K, at.M, at.lanes, at.token_gates
    write = multiply(SR, SC, 1)

    @emit
    def writes():
        if plan.flags.gated:
            lanes[0, 0] = T.float32(1)
            for i in range(BT):
                j: T.let = BT - 1 - i
                lanes[0, 1] = lanes[0, 0]
                lanes[0, 0] = lanes[0, 0] * token_gates[0, j + 1]
                for d in T.vectorized(Dk):
                    K[j, d] = K[j, d] * (token_gates[2, j] * lanes[0, 0] + token_gates[1, j + 1] * lanes[0, 1])
            for d in range(Dk):
                for n in T.vectorized(Dv):
                    M[d, n] = M[d, n] * lanes[0, 0]
        for dd in range(Dk // SR):
            for nn in range(Dv // SC):
                write(
                    A=K, a0=0, B=at.V, b0=0, steps=BT, C=M, r0=dd * SR, n0=nn * SC, G=at.gate, g0=0, gated=False,
                    fresh=False,
                )  # fmt: skip


def connectors(plan: Plan, at: Values, *, t0, rows, seen) -> None:
    """dr of the chunk's tokens, and du; what later kernels read of the gates."""
    Dk, MR, NK = plan.Dk, plan.MR, plan.NK
    k, du, rows_of, keys, lanes, down = at.k, at.du, at.rows_of, at.keys, at.lanes, at.down
    row0, heads, past, saved, length = at.row0, at.heads, at.past, at.saved, at.length
    connect = multiply(MR, NK, 1)

    @emit
    def logits_then_u():
        softmax_backward(plan, at, rows=rows)
        for tt in range((rows + MR - 1) // MR):
            for dd in range(Dk // NK):
                connect(
                    A=at.dgates, a0=0, B=at.means, b0=at.base, steps=past, C=rows_of, r0=tt * MR, n0=dd * NK, G=at.gate,
                    g0=0, gated=False, fresh=True,
                )  # fmt: skip
        for t in range(rows):
            lanes[1, 0] = down[1, t] / T.cast(seen + t + 1, "float32")
            for d in T.vectorized(Dk):
                keys[d] = keys[d] + k[row0 + (t0 + t) * heads, d]
                du[row0 + (t0 + t) * heads, d] = rows_of[t, d] + lanes[1, 0] * keys[d]
        for t in range(rows):
            at.own[at.bh * 3 + 1, t0 + t] = down[1, t]
        for i in range(past):
            for t in range(rows):
                at.gamma[saved + i * length + seen + t] = at.gates[i, t]
                at.dr[saved + i * length + seen + t] = at.dgates[i, t]


def softmax_backward(plan: Plan, at: Values, *, rows) -> None:
    """Gradients of the gates into those of the logits; 0 where a segment was not chosen."""
    gate, down, gates, dgates, lanes, past = at.gate, at.down, at.gates, at.dgates, at.lanes, at.past

    @emit
    def by_lanes():
        for tb in range((rows + LANES - 1) // LANES):
            t = T.meta_var(tb * LANES)
            for x in T.vectorized(LANES):
                lanes[0, x] = gate[0, t + x] * down[0, t + x]
            for i in range(past):
                for x in T.vectorized(LANES):
                    lanes[0, x] = lanes[0, x] + gates[i, t + x] * dgates[i, t + x]
            for x in T.vectorized(LANES):
                down[1, t + x] = gate[0, t + x] * (down[0, t + x] - lanes[0, x])
            for i in range(past):
                for x in T.vectorized(LANES):
                    dgates[i, t + x] = weighed(
                        gates[i, t + x], gates[i, t + x] * (dgates[i, t + x] - lanes[0, x]), plan.flags.sparse
                    )
