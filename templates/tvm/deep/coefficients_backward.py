"""From the gradients of a chunk's coefficients to those of its gates.

With G_jt the decay from token j to t, w_jt what the surprise of j is worth at t, and M_j the product of mu past j,

    G_jt = e^{g_{j+1}} G_{j+1,t},  w_jt = G_jt + mu_{j+1} w_{j+1,t},  c_tj = eta_j w_jt,  G_tt = w_tt = 1
    keep0_t = e^{g_0} G_0t,  keep1_t = mu_0 w_0t,  m_j = eta_j M_j,  M_j = mu_{j+1} M_{j+1},  p = mu_0 M_0

so gradients go from the first token down to the later ones, LANES tokens t side by side.
"""

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, inline, scratch
from ..tiles import LANES


def tables(plan, at) -> Values:
    """G, w and M of a chunk, which :func:`walk.coefficients` fills; gradients of e^g, mu, eta by token."""
    return scratch(
        decay_since=f32(at.BP, at.BP),
        worth_since=f32(at.BP, at.BP),
        momentum_since=f32(at.BP),
        dtoken=f32(3, at.BP + 1),
    )


def coefficients_backward(plan, at, *, t0, rows) -> None:
    """Store the gradients of the gates of a chunk's tokens."""
    dtoken, token, dCT, dkeep = at.dtoken, at.token, at.dCT, at.dkeep

    @emit
    def all_of_them():
        for j in range(at.BP + 1):
            for i in T.unroll(3):
                dtoken[i, j] = T.float32(0)
        # The chunk's end has the coefficients of its last token.
        for j in range(rows):
            dCT[j, rows - 1] = dCT[j, rows - 1] + at.dlast[0, j]
        for i in T.unroll(2):
            dkeep[i, rows - 1] = dkeep[i, rows - 1] + at.dends[i]
            for j in range(at.BP - rows):
                dkeep[i, rows + j] = T.float32(0)
        for tb in range((rows + LANES - 1) // LANES):
            down_from_the_first(plan, at, t=tb * LANES, rows=rows)
        if plan.flags.momentum:
            if at.carries > 0:
                of_products(plan, at, rows=rows)
        for j in range(rows):
            row: T.let = at.row0 + (t0 + j) * at.heads
            at.deta[row] = dtoken[2, j]
            if plan.flags.decays:
                at.dg[row] = token[0, j] * dtoken[0, j]
            if plan.flags.momentum:
                at.dmu[row] = dtoken[1, j]


def down_from_the_first(plan, at, *, t, rows) -> None:
    """The part of LANES tokens from ``t`` on."""
    down, dtoken, token, dCT, dkeep = at.back, at.dtoken, at.token, at.dCT, at.dkeep
    G, w = at.decay_since, at.worth_since

    @emit
    def lanes():
        for x in T.vectorized(LANES):
            down[0, x] = dkeep[0, t + x] * token[0, 0]
            down[1, x] = dCT[0, t + x] * token[2, 0] + dkeep[1, t + x] * token[1, 0]
        gather(dtoken, 0, 0, dkeep, 0, t, G, 0, t, down)
        gather(dtoken, 1, 0, dkeep, 1, t, w, 0, t, down)
        for j in range(T.min(rows, t + LANES)):
            gather(dtoken, 2, j, dCT, j, t, w, j, t, down)
            if j + 1 < rows:
                # Past the last token that a write reaches, nothing goes down.
                for x in T.vectorized(LANES):
                    down[1, x] = T.Select(t + x > j, down[1, x], T.float32(0))
                    down[0, x] = T.Select(t + x > j, down[0, x] + down[1, x], T.float32(0))
                gather(dtoken, 1, j + 1, down, 1, 0, w, j + 1, t, down)
                gather(dtoken, 0, j + 1, down, 0, 0, G, j + 1, t, down)
                for x in T.vectorized(LANES):
                    down[1, x] = dCT[j + 1, t + x] * token[2, j + 1] + token[1, j + 1] * down[1, x]
                    down[0, x] = token[0, j + 1] * down[0, x]


# total[i, j] += sum over LANES tokens of X[row], from column ``at`` on, times Y[other], from column t on.
@inline
def gather(total, i, j, X, row, at, Y, other, t, down):
    for x in T.vectorized(LANES):
        down[2, x] = X[row, at + x] * Y[other, t + x]
    for x in T.unroll(LANES):
        total[i, j] = total[i, j] + down[2, x]


def of_products(plan, at, *, rows) -> None:
    """The part of S at the chunk's end."""
    dtoken, token, dlast, M, down = at.dtoken, at.token, at.dlast, at.momentum_since, at.back

    @emit
    def by_token():
        dtoken[1, 0] = dtoken[1, 0] + at.dends[2] * M[0]
        down[3, 0] = at.dends[2] * token[1, 0]
        for j in range(rows):
            dtoken[2, j] = dtoken[2, j] + dlast[1, j] * M[j]
            down[3, 0] = down[3, 0] + dlast[1, j] * token[2, j]
            if j + 1 < rows:
                dtoken[1, j + 1] = dtoken[1, j + 1] + down[3, 0] * M[j + 1]
                down[3, 0] = down[3, 0] * token[1, j + 1]
