"""The gradient rows of a chunk, with all that their own gradients need; and those gradients, the second-order terms.

H = K U,  Z = gelu(H),  L = gelu'(H),  ERR = -V or 2 (Z W (+ K) - V),  RAW = ERR W^T,  BACK = RAW * L
"""

from tvm.script import tirx as T

from ..kernel import emit
from ..tiles import LANES, columns
from .tiles import add, curve, overwrite, product, slopes
from .walk import take_rows, tiles


def gradients(plan, at, *, t0, rows) -> None:
    """As :func:`walk.gradients`, with H, L and RAW beside them."""
    Dk, Dv, E, R, C, unroll = plan.Dk, plan.Dv, plan.E, plan.WR, plan.WC, plan.unroll
    K, ERR, Z, H, L, RAW, BACK = at.K, at.ERR, at.Z, at.H, at.L, at.RAW, at.BACK
    hidden, out = product(R, C, unroll, overwrite(R, C, H)), product(R, C, unroll, overwrite(R, C, at.O))
    back = product(R, C, unroll, overwrite(R, C, RAW))

    def of_hidden(r, n):
        hidden(A=at.KT, a0=0, ac=r, B=at.U, b0=0, bc=n, steps=Dk, r0=r, n0=n)

    def of_out(r, n):
        out(A=at.ZT, a0=0, ac=r, B=at.W, b0=0, bc=n, steps=E, r0=r, n0=n)

    def of_back(r, n):
        back(A=at.ERRT, a0=0, ac=r, B=at.WT, b0=0, bc=n, steps=Dv, r0=r, n0=n)

    @emit
    def rows_and_products():
        take_rows(at.k, Dk, at, K, t0=t0, rows=rows)
        take_rows(at.v, Dv, at, ERR, t0=t0, rows=rows)
        columns(K, Dk, 0, 1, 0, at.BP, at.KT)
        tiles(rows, E, R, C, of_hidden)
        slopes(H, Z, L, rows, E)
        columns(Z, E, 0, 1, 0, rows, at.ZT)
        if plan.flags.momentum:
            tiles(rows, Dv, R, C, of_out)
            for t in range(rows):
                for n in range(Dv // LANES):
                    for x in T.vectorized(LANES):
                        ERR[t, n * LANES + x] = T.float32(2) * (at.O[t, n * LANES + x] - ERR[t, n * LANES + x])
                if at.adds_input > 0:
                    for n in range(plan.both // LANES):
                        for x in T.vectorized(LANES):
                            ERR[t, n * LANES + x] = ERR[t, n * LANES + x] + T.float32(2) * K[t, n * LANES + x]
        else:
            for t in range(rows):
                for n in range(Dv // LANES):
                    for x in T.vectorized(LANES):
                        ERR[t, n * LANES + x] = -ERR[t, n * LANES + x]
        columns(ERR, Dv, 0, 1, 0, at.BP, at.ERRT)
        columns(at.W, Dv, 0, 1, 0, E, at.WT)
        tiles(rows, E, R, C, of_back)
        for t in range(rows):
            for e in range(E // LANES):
                for x in T.vectorized(LANES):
                    BACK[t, e * LANES + x] = RAW[t, e * LANES + x] * L[t, e * LANES + x]


def gradients_backward(plan, at, *, t0, rows) -> None:
    """From dZ, dERR and dBACK those of K and V, which are stored, and of U and W, which are added.

    dRAW = dBACK * L, dERR += dRAW W, dW += dRAW^T ERR; with titans' loss O = Z W has dO = 2 dERR;
    dH = dZ * L + dBACK * RAW * gelu''(H), dK += dH U^T, dU += K^T dH.
    """
    Dk, Dv, E, R, C, unroll = plan.Dk, plan.Dv, plan.E, plan.WR, plan.WC, plan.unroll
    dZ, dERR, dBACK, dK, L, RAW, XT, squared = at.dZ, at.dERR, at.dBACK, at.dK, at.L, at.RAW, at.ET, plan.flags.momentum
    to_errors, to_units = product(R, C, unroll, add(R, C, dERR)), product(R, C, unroll, add(R, C, dZ))
    to_keys = product(R, C, unroll, add(R, C, dK))
    to_up, to_down = product(R, C, 1, add(R, C, at.dU)), product(R, C, 1, add(R, C, at.dW))

    def errors(r, n):
        to_errors(A=XT, a0=0, ac=r, B=at.W, b0=0, bc=n, steps=E, r0=r, n0=n)

    def units(r, n):
        to_units(A=at.VT, a0=0, ac=r, B=at.WT, b0=0, bc=n, steps=Dv, r0=r, n0=n)

    def keys(r, n):
        to_keys(A=XT, a0=0, ac=r, B=at.UT, b0=0, bc=n, steps=E, r0=r, n0=n)

    def up(r, n):
        to_up(A=at.K, a0=0, ac=r, B=dZ, b0=0, bc=n, steps=rows, r0=r, n0=n)

    def down(source, by):
        return lambda r, n: to_down(A=source, a0=0, ac=r, B=by, b0=0, bc=n, steps=rows, r0=r, n0=n)

    @emit
    def products():
        curve(at.H, RAW, dBACK, at.weighed, rows, E)  # dBACK * RAW * gelu''(H)
        for t in range(rows):
            for e in range(E // LANES):
                for x in T.vectorized(LANES):
                    dBACK[t, e * LANES + x] = dBACK[t, e * LANES + x] * L[t, e * LANES + x]
        columns(dBACK, E, 0, 1, 0, rows, XT)
        tiles(rows, Dv, R, C, errors)
        tiles(E, Dv, R, C, down(dBACK, at.ERR))
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
            tiles(rows, E, R, C, units)
            tiles(E, Dv, R, C, down(at.Z, dERR))
        for t in range(rows):
            for e in range(E // LANES):
                for x in T.vectorized(LANES):
                    dZ[t, e * LANES + x] = dZ[t, e * LANES + x] * L[t, e * LANES + x] + at.weighed[t, e * LANES + x]
        columns(dZ, E, 0, 1, 0, rows, XT)
        tiles(rows, Dk, R, C, keys)
        tiles(Dk, E, R, C, up)
        for t in range(rows):
            row: T.let = at.row0 + (t0 + t) * at.heads
            for d in range(Dk // LANES):
                for x in T.vectorized(LANES):
                    at.dk[row, d * LANES + x] = dK[t, d * LANES + x]
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    at.dv[row, n * LANES + x] = -dERR[t, n * LANES + x]
