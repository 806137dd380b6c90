"""The products of one chunk of ``write_backward``: of its rows with each other, and with the gradient after it."""

from tvm.script import tirx as T

from ..flags import flags_of
from ..kernel import Values, emit
from ..tiles import BLOCK, LANES, dot_rows, multiply, transpose
from .backward_tiles import fetch


class Plan:
    """Sizes and flags of one ``write_backward``."""

    def __init__(self, problem, config) -> None:
        self.Dk, self.Dv = problem.Dk, problem.Dv
        self.BT, self.MR, self.NV, self.NK = config["chunk"], config["rows"], config["cols"], config["key_cols"]
        self.JR, self.TL, self.unroll = config["score_rows"], config["score_lanes"], config["unroll"]
        self.SR, self.SC = config["state_rows"], config["state_cols"]
        self.flags = flags_of(problem)


def products(plan: Plan, at: Values, *, t0, rows) -> None:
    """W1[t, j] = w_jt (Q_t . k_j), W2[t, j] = w_jt (dy_t . v_j), 0 for t < j; w_jt of gated writes comes later."""
    Dk, Dv, BT, JR, TL = plan.Dk, plan.Dv, plan.BT, plan.JR, plan.TL
    W1, W2 = at.W1, at.W2
    by_key, by_value = dot_rows(JR, TL, plan.unroll, Dk), dot_rows(JR, TL, plan.unroll, Dv)

    @emit
    def tiles():
        for tt in range((rows + JR - 1) // JR):
            fetch(at, at.k, Dk, t=t0 - BT + tt * JR, count=JR)
            fetch(at, at.v, Dv, t=t0 - BT + tt * JR, count=JR)
            for jj in range((rows + TL - 1) // TL):
                if jj * TL < (tt + 1) * JR:
                    by_key(A=at.Q, a0=tt * JR, a1=rows - 1, B=at.KT, C=W1, c0=tt * JR, t0=jj * TL)
                    by_value(A=at.Y, a0=tt * JR, a1=rows - 1, B=at.VT, C=W2, c0=tt * JR, t0=jj * TL)
        if not plan.flags.gated:
            for jb in range((rows + LANES - 1) // LANES):
                # Below the diagonal nothing changes.
                for i in range(T.min(LANES, rows - jb * LANES)):
                    for x in T.vectorized(LANES):
                        W1[jb * LANES + i, jb * LANES + x] = T.Select(
                            i >= x, W1[jb * LANES + i, jb * LANES + x], T.float32(0)
                        )
                        W2[jb * LANES + i, jb * LANES + x] = T.Select(
                            i >= x, W2[jb * LANES + i, jb * LANES + x], T.float32(0)
                        )


def rows_of_state(plan: Plan, at: Values, *, t0, rows, linked) -> None:
    """C = dv, CK = dk of the chunk's rows as far as they come through Z, or 0 where nothing follows the chunk."""
    Dk, Dv, BT, MR, NV, NK = plan.Dk, plan.Dv, plan.BT, plan.MR, plan.NV, plan.NK
    Z, ZT, C, CK = at.Z, at.ZT, at.C, at.CK
    to_values, to_keys = multiply(MR, NV, plan.unroll), multiply(MR, NK, plan.unroll)

    @emit
    def tiles():
        if linked:
            for nn in range(Dv // BLOCK):
                for dd in range(Dk // BLOCK):
                    transpose(Z, dd * BLOCK, 1, BLOCK - 1, ZT, nn * BLOCK, dd * BLOCK)
            for jj in range((rows + MR - 1) // MR):
                fetch(at, at.q, Dk, t=t0 - BT + jj * MR, count=MR)
                fetch(at, at.dy, Dv, t=t0 - BT + jj * MR, count=MR)
                for nn in range(Dv // NV):
                    to_values(
                        A=at.KT, a0=0, B=Z, b0=0, steps=Dk, C=C, r0=jj * MR, n0=nn * NV, G=at.none, g0=0, gated=False,
                        fresh=True,
                    )  # fmt: skip
                for dd in range(Dk // NK):
                    to_keys(
                        A=at.VT, a0=0, B=ZT, b0=0, steps=Dv, C=CK, r0=jj * MR, n0=dd * NK, G=at.none, g0=0, gated=False,
                        fresh=True,
                    )  # fmt: skip
        else:
            for j in range(BT):
                for n in T.vectorized(Dv):
                    C[j, n] = T.float32(0)
                for d in T.vectorized(Dk):
                    CK[j, d] = T.float32(0)
