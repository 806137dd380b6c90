"""Gates of a block of tokens (Eq. 8-10, 16-17), as [segment, token]."""

from tvm.script import tirx as T

from ..gates import block_gates
from ..kernel import emit
from ..tiles import LANES, columns


def pack(plan, at, *, t0, rows) -> None:
    """scale * q as columns."""
    Dk, QT = plan.Dk, at.QT

    @emit
    def queries():
        columns(at.q, Dk, at.row0, at.heads, t0, rows, QT)
        for d in range(Dk):
            for t in range(plan.chunk // LANES):
                for x in T.vectorized(LANES):
                    QT[d, t * LANES + x] = at.scale * QT[d, t * LANES + x]


def gates(plan, at, *, t0, rows, seen, spread) -> None:
    """own[0, t] and gamma[i, t] of a block: :func:`block_gates`; where nothing is routed all are alike."""
    BT, own, gamma, score = plan.chunk, at.own, at.gamma, (plan.score_rows, plan.score_lanes)
    block_gates(
        plan, at, own, gamma, BT=BT, score=score, t0=t0, rows=rows, seen=seen, scale=T.float32(1), spread=spread
    )

    @emit
    def alike():
        if not plan.flags.routed:
            for i in range(at.past):
                for t in T.vectorized(BT):
                    gamma[i, t] = own[0, t]
