"""The gradient rows of a chunk as ``deep_write`` has left them; and their gradients, the second-order terms.

H = K U,  Z = gelu(H),  L = gelu'(H),  ERR = -V or 2 (Z W (+ K) - V),  RAW = ERR W^T,  BACK = RAW * L
"""

from functools import partial

from tvm.script import tirx as T

from ..kernel import emit, inline
from ..tiles import LANES, columns
from .tiles import add, copy, curve, product, slopes
from .walk import multiply_rows, take_rows, tiles, times_transpose


def take_gradients(plan, at, *, t0, rows) -> None:
    """K, H, Z, L, ERR, RAW and BACK of a chunk from token ``t0`` on."""
    Dk, Dv, E = plan.Dk, plan.Dv, plan.E

    @emit
    def from_rows():
        take_rows(at.k, Dk, at, at.K, t0=t0, rows=rows)
        take_rows(at.rows_h, E, at, at.H, t0=t0, rows=rows)
        take_rows(at.rows_raw, E, at, at.RAW, t0=t0, rows=rows)
        take_rows(at.rows_err, Dv, at, at.ERR, t0=t0, rows=rows)
        slopes(at.H, at.Z, at.L, rows, E)
        copy(at.RAW, 0, at.BACK, 0, rows, E)
        multiply_rows(at.BACK, at.L, rows, E)


def gradients_by_column(plan, at, *, rows) -> None:
    """The same with tokens in columns."""
    Dk, Dv, E = plan.Dk, plan.Dv, plan.E

    @emit
    def transposes():
        columns(at.K, Dk, 0, 1, 0, at.BP, at.KT)
        columns(at.Z, E, 0, 1, 0, rows, at.ZT)
        columns(at.ERR, Dv, 0, 1, 0, rows, at.ERRT)
        columns(at.BACK, E, 0, 1, 0, rows, at.BACKT)


def gradients_backward(plan, at, *, t0, rows) -> None:
    """From dZ, dERR and dBACK those of K and V, which are stored, and the rows that dU and dW are products of.

    dRAW = dBACK * L, dERR += dRAW W, dW += dRAW^T ERR; with titans' loss O = Z W has dO = 2 dERR, dW += Z^T dO;
    dH = dZ * L + dBACK * RAW * gelu''(H), dK += dH U^T, dU += K^T dH. dRAW, dO and dH are left in place of dBACK, dERR
    and dZ.
    """
    Dk, Dv, E, R, C, unroll = plan.Dk, plan.Dv, plan.E, plan.WR, plan.WC, plan.unroll
    dZ, dERR, dBACK, dK, L, RAW, XT, squared = at.dZ, at.dERR, at.dBACK, at.dK, at.L, at.RAW, at.ET, plan.flags.momentum
    errors = product(C, unroll, partial(add, C=dERR), A=XT, B=at.W, b0=at.w0, steps=E)

    @emit
    def products():
        curve(at.H, RAW, dBACK, at.weighed, rows, E)  # dBACK * RAW * gelu''(H)
        multiply_rows(dBACK, L, rows, E)
        columns(dBACK, E, 0, 1, 0, rows, XT)
        tiles(rows, Dv, R, C, errors)
        if squared:
            for t in range(rows):
                for n in range(Dv // LANES):
                    for x in T.vectorized(LANES):
                        dERR[t, n * LANES + x] = T.float32(2) * dERR[t, n * LANES + x]
                if at.adds_input > 0:
                    for n in range(plan.both // LANES):
                        for x in T.vectorized(LANES):
                            dK[t, n * LANES + x] = dK[t, n * LANES + x] + dERR[t, n * LANES + x]
            columns(dERR, Dv, 0, 1, 0, rows, at.VT)
            times_transpose(plan, at, XT=at.VT, steps=Dv, state=at.W, first=at.w0, width=E, out=at.carried)
            add_rows(dZ, at.carried, rows, E)
        for t in range(rows):
            for e in range(E // LANES):
                for x in T.vectorized(LANES):
                    dZ[t, e * LANES + x] = dZ[t, e * LANES + x] * L[t, e * LANES + x] + at.weighed[t, e * LANES + x]
        columns(dZ, E, 0, 1, 0, rows, XT)
        times_transpose(plan, at, XT=XT, steps=E, state=at.U, first=at.u0, width=Dk, out=at.carried)
        add_rows(dK, at.carried, rows, Dk)
        for t in range(rows):
            row: T.let = at.row0 + (t0 + t) * at.heads
            for d in range(Dk // LANES):
                for x in T.vectorized(LANES):
                    at.dk[row, d * LANES + x] = dK[t, d * LANES + x]
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    at.dv[row, n * LANES + x] = -dERR[t, n * LANES + x]


# X += Y, ``rows`` rows of ``width`` columns.
@inline
def add_rows(X, Y, rows, width):
    for t in range(rows):
        for e in range(width // LANES):
            for x in T.vectorized(LANES):
                X[t, e * LANES + x] = X[t, e * LANES + x] + Y[t, e * LANES + x]
