"""Gates of a block of tokens (Eq. 8-10, 16-17), as [segment, token]: LANES tokens go through a step side by side."""

from tvm.script import tirx as T

from ..gates import choose, softmax
from ..kernel import emit
from ..tiles import LANES, columns, dot_rows


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
    """own[0, t] and gamma[i, t] of a block, of whose segment ``seen`` tokens come before.

    Where there is a choice, it stands in ``chosen`` and ``value``, and only with ``spread`` in gamma too.
    """
    BT, JR, TL, flags = plan.chunk, plan.score_rows, plan.score_lanes, plan.flags
    past, base, own, gamma = at.past, at.base, at.own, at.gamma
    scores = dot_rows(JR, TL, plan.unroll, plan.Dk)

    @emit
    def softmaxes():
        if flags.routed:
            own_logits(plan, at, t0=t0, rows=rows, seen=seen)
            for ii in range((past + JR - 1) // JR):
                for tt in range(BT // TL):
                    scores(
                        A=at.means, a0=base + ii * JR, a1=base + past - 1, B=at.UT, C=gamma, c0=ii * JR, t0=tt * TL
                    )  # fmt: skip
            if flags.sparse:
                choices(plan, at, seen=seen, spread=spread)
            else:
                for tb in range(BT // LANES):
                    softmax(
                        own=own, logits=gamma, count=past, at=tb * LANES, t=tb * LANES, scale=T.float32(1),
                        lanes=at.lanes,
                    )  # fmt: skip
        else:
            for t in T.vectorized(BT):
                own[0, t] = T.float32(1) / T.cast(past + 1, "float32") if flags.averages else T.float32(1)
            for i in range(past):
                for t in T.vectorized(BT):
                    gamma[i, t] = own[0, t]


def own_logits(plan, at, *, t0, rows, seen) -> None:
    """Logits of the tokens' own segment, whose mean key goes up to the token itself."""
    Dk, BT = plan.Dk, plan.chunk
    u, k, own, lanes, total, row0, heads = at.u, at.k, at.own, at.lanes, at.total, at.row0, at.heads

    @emit
    def means_times_u():
        columns(u, Dk, row0, heads, t0, rows, at.UT)
        for t in range(BT - rows):
            own[0, rows + t] = T.float32(0)
        for t in range(rows):
            for x in T.vectorized(LANES):
                lanes[0, x] = T.float32(0)
            for e in T.unroll(Dk // LANES):
                for x in T.vectorized(LANES):
                    total[e * LANES + x] = total[e * LANES + x] + k[row0 + (t0 + t) * heads, e * LANES + x]
                    lanes[0, x] = lanes[0, x] + total[e * LANES + x] * u[row0 + (t0 + t) * heads, e * LANES + x]
            own[0, t] = T.float32(0)
            for x in T.unroll(LANES):
                own[0, t] = own[0, t] + lanes[0, x]
            own[0, t] = own[0, t] / T.cast(seen + t + 1, "float32")


def choices(plan, at, *, seen, spread) -> None:
    """Gates of the block's tokens, and which segments they read; of the segment's tokens, or with ``spread`` of these.

    With ``spread`` gamma is 0 for the others.
    """
    BT, own, gamma, lanes = plan.chunk, at.own, at.gamma, at.lanes
    chosen, value, picks = at.chosen, at.value, at.picks

    @emit
    def largest():
        to: T.let = 0 if spread else seen
        for tb in range(BT // LANES):
            choose(
                logits=gamma, past=at.past, picks=picks, t=tb * LANES, lanes=lanes, best=at.best, chosen=chosen,
                value=value, at=to + tb * LANES,
            )  # fmt: skip
        for tb in range(BT // LANES):
            softmax(
                own=own, logits=value, count=picks, at=to + tb * LANES, t=tb * LANES, scale=T.float32(1), lanes=lanes
            )  # fmt: skip
        if spread:
            for i in range(at.past):
                for t in T.vectorized(BT):
                    gamma[i, t] = T.float32(0)
            for p in range(picks):
                for t in range(BT):
                    gamma[chosen[p, t], t] = value[p, t]
