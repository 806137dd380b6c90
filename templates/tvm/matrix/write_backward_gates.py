"""Gated writes in ``write_backward``: the weights w_jt of a chunk, and the gradients of g, beta and lam.

With h_jt = k_j Z_t v_j, which is (Q_t . k_j) (dy_t . v_j) + e^{g_{t+1}} h_j,t+1,

    dg_t = e^{g_t} sum_{j < t} w_j,t-1 h_jt

X enters the chunk like one more write.
"""

from tvm.script import tirx as T

from ..kernel import Values, emit
from ..tiles import LANES, exp, stain
from .write_backward_chunk import Plan


def gradients_of_gates(plan: Plan, at: Values, *, t0, rows, turn, c) -> None:
    """w_jt into W1, W2, C and CK of chunk ``c``, and dg, dbeta and dlam of its tokens."""

    @emit
    def steps():
        take_gates(plan, at, t0=t0, rows=rows)
        through_state(plan, at, t0=t0, rows=rows)
        for jb in range((rows + LANES - 1) // LANES):
            for x in T.vectorized(LANES):
                at.lanes[0, x] = T.float32(0)
                at.lanes[1, x] = T.float32(0)
                at.lanes[2, x] = at.of_row[2, jb * LANES + x]
            weights(at, j0=jb * LANES, rows=rows)
            weigh(at, j0=jb * LANES, rows=rows)
        write_by_row(plan, at, t0=t0, rows=rows)
        decay_of_state(plan, at, turn=turn, c=c)
        decays(at, t0=t0, rows=rows)


def take_gates(plan: Plan, at: Values, *, t0, rows) -> None:
    """The gates of the chunk and of the token after it; none after the segment: its last memory is kept as it is."""
    token_gates, of_row, row0, heads = at.token_gates, at.of_row, at.row0, at.heads

    @emit
    def by_token_and_by_row():
        for x in T.vectorized(plan.BT + LANES):
            token_gates[0, x] = T.float32(1)
            token_gates[1, x] = T.float32(0)
            of_row[0, x] = T.float32(0)
            of_row[2, x] = T.float32(0)
        for j in range(T.min(rows + 1, at.end[at.s] - t0)):
            token_gates[0, j] = exp(at.g[row0 + (t0 + j) * heads])
            token_gates[1, j] = at.beta[row0 + (t0 + j) * heads]
            of_row[0, j] = at.lam[row0 + (t0 + j) * heads]
        for j in range(plan.BT):
            of_row[1, j] = token_gates[1, j + 1]


def through_state(plan: Plan, at: Values, *, t0, rows) -> None:
    """k_j Z v_j of every row, and nothing yet that a token's decay scales."""
    lanes, of_row, forgotten, C, v = at.lanes, at.of_row, at.forgotten, at.C, at.v

    @emit
    def dots():
        for j in range(rows):
            for x in T.vectorized(LANES):
                lanes[0, x] = T.float32(0)
            for e in T.unroll(plan.Dv // LANES):
                for x in T.vectorized(LANES):
                    lanes[0, x] = lanes[0, x] + C[j, e * LANES + x] * v[at.row0 + (t0 + j) * at.heads, e * LANES + x]
            for x in T.unroll(LANES):
                of_row[2, j] = of_row[2, j] + lanes[0, x]
        for t in range(rows + 1):
            for x in T.vectorized(LANES):
                forgotten[t, x] = T.float32(0)


def weights(at: Values, *, j0, rows) -> None:
    """W[t, j] = w_jt of the LANES rows from ``j0`` on, up to the token after the chunk."""
    W, lanes, of_row, token_gates = at.W, at.lanes, at.of_row, at.token_gates

    @emit
    def from_the_first_token():
        for i in range(rows + 1 - j0):
            t: T.let = j0 + i
            for x in T.vectorized(LANES):
                lanes[0, x] = T.Select(i == x, T.float32(1), lanes[0, x] * token_gates[0, t])
                lanes[1, x] = T.Select(i == x + 1, T.float32(1), lanes[1, x] * token_gates[0, t])
                # Gates may be NaN, also where a row has no weight yet.
                lanes[3, x] = of_row[0, j0 + x] * lanes[0, x] + T.Select(
                    i > x, of_row[1, j0 + x] * lanes[1, x], T.float32(0)
                )
                W[t, j0 + x] = T.Select(i >= x, lanes[3, x], T.float32(0))


def weigh(at: Values, *, j0, rows) -> None:
    """h_jt of the LANES rows from ``j0`` on (lanes[2]): dlam, the next dbeta, its part in dg; w_jt into W1 and W2."""
    W, W1, W2, forgotten = at.W, at.W1, at.W2, at.forgotten
    lanes, of_row, token_gates = at.lanes, at.of_row, at.token_gates

    @emit
    def from_the_last_token():
        for turned in range(rows + 1 - j0):
            t: T.let = rows - turned
            i: T.let = t - j0
            if t < rows:
                for x in T.vectorized(LANES):
                    # Beyond the chunk's rows there may be anything.
                    lanes[2, x] = token_gates[0, t + 1] * lanes[2, x] + T.Select(
                        i >= x, W1[t, j0 + x] * W2[t, j0 + x], T.float32(0)
                    )
                    W1[t, j0 + x] = W1[t, j0 + x] * W[t, j0 + x]
                    W2[t, j0 + x] = W2[t, j0 + x] * W[t, j0 + x]
            for x in T.vectorized(LANES):
                of_row[3, j0 + x] = T.Select(i == x, lanes[2, x], of_row[3, j0 + x])
                of_row[4, j0 + x] = T.Select(i == x + 1, lanes[2, x], of_row[4, j0 + x])
            if i > 0:
                for x in T.vectorized(LANES):
                    forgotten[t, x] = forgotten[t, x] + T.Select(i > x, W[t - 1, j0 + x] * lanes[2, x], T.float32(0))


def write_by_row(plan: Plan, at: Values, *, t0, rows) -> None:
    """dlam and dbeta; C and CK, which come through Z, times the weights in the memory after the chunk."""
    Dk, Dv = plan.Dk, plan.Dv
    of_row, C, CK, W, row0, heads = at.of_row, at.C, at.CK, at.W, at.row0, at.heads

    @emit
    def by_row():
        for j in range(rows):
            at.dlam[row0 + (t0 + j) * heads] = of_row[3, j]
            if t0 + j + 1 < at.end[at.s]:
                at.dbeta[row0 + (t0 + j + 1) * heads] = of_row[4, j]
            for n in T.vectorized(Dv):
                C[j, n] = C[j, n] * W[rows, j]
            for d in T.vectorized(Dk):
                CK[j, d] = CK[j, d] * W[rows, j]


def decay_of_state(plan: Plan, at: Values, *, turn, c) -> None:
    """<X, Z> into lanes[0, 0]: how much of what follows the chunk came into it with X; without X, what stains."""
    Dk, Dv, BT = plan.Dk, plan.Dv, plan.BT
    lanes, entering, Z, s, token_gates = at.lanes, at.entering, at.Z, at.s, at.token_gates

    @emit
    def dot():
        lanes[0, 0] = T.float32(0)
        linked = T.meta_var(T.Or(c > 0, T.And(plan.flags.checkpoint, s != at.first[s])))
        if T.Not(linked):
            lanes[0, 0] = stain(token_gates[0, 0]) + stain(token_gates[1, 0])
        if T.And(T.Or(turn > 0, at.ends_linked), linked):
            slot: T.let = at.bh * (at.tokens // BT + at.N) + at.begin[s] // BT + s + c
            for x in T.vectorized(LANES):
                lanes[1, x] = T.float32(0)
            for d in range(Dk):
                for e in T.unroll(Dv // LANES):
                    for x in T.vectorized(LANES):
                        lanes[1, x] = lanes[1, x] + entering[slot * Dk + d, e * LANES + x] * Z[d, e * LANES + x]
            for x in T.unroll(LANES):
                lanes[0, 0] = lanes[0, 0] + lanes[1, x]


def decays(at: Values, *, t0, rows) -> None:
    """dg of the tokens after the chunk's first, and of the one after the chunk; X's share is in lanes[0, 0]."""
    lanes, of_row, token_gates = at.lanes, at.of_row, at.token_gates

    @emit
    def from_the_last_token():
        of_row[5, 0] = T.float32(1)
        for t in range(rows):
            of_row[5, t + 1] = of_row[5, t] * token_gates[0, t + 1]
        for turned in range(rows):
            t: T.let = rows - turned
            if t < rows:
                lanes[0, 0] = at.own[at.bh * 3 + 2, t0 + t] + token_gates[0, t + 1] * lanes[0, 0]
            lanes[0, 1] = of_row[5, t - 1] * lanes[0, 0]
            for x in T.unroll(LANES):
                lanes[0, 1] = lanes[0, 1] + at.forgotten[t, x]
            if t0 + t < at.end[at.s]:
                at.dg[at.row0 + (t0 + t) * at.heads] = token_gates[0, t] * lanes[0, 1]


def lead(plan: Plan, at: Values) -> None:
    """The token before the segment, through the segment's first write; its rows are added when all tasks are done."""
    flags, s, b, dg, dbeta = plan.flags, at.s, at.row0 + at.begin[at.s] * at.heads, at.dg, at.dbeta

    @emit
    def through_the_first_write():
        first: T.let = b
        dbeta[first] = T.float32(0)
        dg[first] = T.float32(0)
        if flags.checkpoint:
            if s != at.first[s]:
                decay_of_first(plan, at, b=first)
                row_before(plan, at, b=first)


def decay_of_first(plan: Plan, at: Values, *, b) -> None:
    """dg of the segment's first token, whose decay the state before it went through."""
    Dk, lanes, states, Z = plan.Dk, at.lanes, at.states, at.Z

    @emit
    def dot():
        for x in T.vectorized(LANES):
            lanes[2, x] = T.float32(0)
        for d in range(Dk):
            for e in T.unroll(plan.Dv // LANES):
                for x in T.vectorized(LANES):
                    lanes[2, x] = lanes[2, x] + (
                        states[(at.bh * at.N + at.s - 1) * Dk + d, e * LANES + x] * Z[d, e * LANES + x]
                    )
        for x in T.unroll(LANES):
            at.dg[b] = at.dg[b] + exp(at.g[b]) * lanes[2, x]


def row_before(plan: Plan, at: Values, *, b) -> None:
    """dbeta of the segment's first token, and the gradients of the key and the value before it."""
    Dv, lanes, Z, k, v, beta, dbeta = plan.Dv, at.lanes, at.Z, at.k, at.v, at.beta, at.dbeta
    lead_value, task = at.lead_value, at.bh * at.N + at.s

    @emit
    def by_key_column():
        for n in T.vectorized(Dv):
            lead_value[task, n] = T.float32(0)
        for d in range(plan.Dk):
            for x in T.vectorized(LANES):
                lanes[0, x] = T.float32(0)
            for e in T.unroll(Dv // LANES):
                for x in T.vectorized(LANES):
                    lanes[0, x] = lanes[0, x] + Z[d, e * LANES + x] * v[b - at.heads, e * LANES + x]
            lanes[1, 0] = T.float32(0)
            for x in T.unroll(LANES):
                lanes[1, 0] = lanes[1, 0] + lanes[0, x]
            dbeta[b] = dbeta[b] + k[b - at.heads, d] * lanes[1, 0]
            at.lead_key[task, d] = beta[b] * lanes[1, 0]
            for n in T.vectorized(Dv):
                lead_value[task, n] = lead_value[task, n] + beta[b] * k[b - at.heads, d] * Z[d, n]
