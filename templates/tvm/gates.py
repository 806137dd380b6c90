"""Gates of a read (Eq. 8-10, 16-17): logits, softmax over segments, ssc's choice, its tokens sorted by segment.

Logits and gates stand as [segment, token], so that LANES tokens go through each step side by side.
"""

from tvm.script import tirx as T

from .kernel import emit, inline
from .tiles import LANES, LARGEST, columns, dot_rows, exp

_LOW = -3.0e38


# Gates of the LANES tokens from t on, times scale, in place: ``own`` holds the logit of each token's own segment,
# ``logits`` those of ``count`` others, whose columns start at ``at``. ``lanes`` is scratch.
@inline
def softmax(own, logits, count, at, t, scale, lanes):
    for x in T.vectorized(LANES):
        lanes[0, x] = own[0, t + x]
    for i in range(count):
        for x in T.vectorized(LANES):
            lanes[0, x] = T.max(lanes[0, x], logits[i, at + x])
    for x in T.vectorized(LANES):
        own[0, t + x] = exp(own[0, t + x] - lanes[0, x])
        lanes[1, x] = own[0, t + x]
    for i in range(count):
        for x in T.vectorized(LANES):
            logits[i, at + x] = exp(logits[i, at + x] - lanes[0, x])
            lanes[1, x] = lanes[1, x] + logits[i, at + x]
    for x in T.vectorized(LANES):
        lanes[1, x] = scale / lanes[1, x]
        own[0, t + x] = own[0, t + x] * lanes[1, x]
    for i in range(count):
        for x in T.vectorized(LANES):
            logits[i, at + x] = logits[i, at + x] * lanes[1, x]


# The ``picks`` largest of ``past`` logits for the LANES tokens from t on, the earlier segment in a tie: which, and
# their logits, at the columns from ``at`` on. A chosen logit is overwritten. ``lanes`` and ``best`` are scratch.
@inline
def choose(logits, past, picks, t, lanes, best, chosen, value, at):
    # What is NaN is chosen first, as infinity: its gate will be NaN.
    for i in range(past):
        for x in T.vectorized(LANES):
            logits[i, t + x] = T.Select(logits[i, t + x] <= T.float32(LARGEST), logits[i, t + x], T.infinity("float32"))
    for p in range(picks):
        for x in T.vectorized(LANES):
            lanes[0, x] = logits[0, t + x]
            best[x] = 0
        for i in range(past - 1):
            for x in T.vectorized(LANES):
                best[x] = T.Select(logits[i + 1, t + x] > lanes[0, x], i + 1, best[x])
                lanes[0, x] = T.max(lanes[0, x], logits[i + 1, t + x])
        for x in range(LANES):
            chosen[p, at + x] = best[x]
            value[p, at + x] = lanes[0, x]
            logits[best[x], t + x] = T.float32(_LOW)


# A counting sort of the choices of ``length`` tokens: segment i's tokens and gates stand from where[i] to where[i + 1].
@inline
def sort_by_segment(chosen, value, picks, length, past, where, tokens, gates):
    for i in range(past + 2):
        where[i] = 0
    for p in range(picks):
        for t in range(length):
            where[chosen[p, t] + 2] = where[chosen[p, t] + 2] + 1
    for i in range(past):
        where[i + 2] = where[i + 2] + where[i + 1]
    for p in range(picks):
        for t in range(length):
            tokens[where[chosen[p, t] + 1]] = t
            gates[where[chosen[p, t] + 1]] = value[p, t]
            where[chosen[p, t] + 1] = where[chosen[p, t] + 1] + 1


def block_gates(plan, at, own, gamma, *, BT, score, t0, rows, seen, scale, spread) -> None:
    """``scale`` times the gates of a block of BT tokens: ``rows`` from ``t0`` on, after ``seen`` of their segment.

    own[0, t] is that of the token's own segment, gamma[i, t] those of the ``past`` segments before it; where nothing is
    routed only own is written. ``score``: segments and tokens of a register tile of logits. Where there is a choice, it
    stands in ``chosen`` and ``value``, of the segment's tokens; with ``spread`` of the block's, and in gamma too.
    """
    JR, TL = score
    past, base, flags = at.past, at.base, plan.flags
    scores = dot_rows(JR, TL, plan.unroll, plan.Dk)

    @emit
    def softmaxes():
        if flags.routed:
            own_logits(plan, at, own, BT=BT, t0=t0, rows=rows, seen=seen)
            for ii in range((past + JR - 1) // JR):
                for tt in range((rows + TL - 1) // TL):
                    scores(
                        A=at.means, a0=base + ii * JR, a1=base + past - 1, B=at.UT, C=gamma, c0=ii * JR, t0=tt * TL
                    )  # fmt: skip
            for tb in range((rows + LANES - 1) // LANES):
                if flags.sparse:
                    choices(at, own, gamma, t=tb * LANES, seen=seen, scale=scale, spread=spread)
                else:
                    softmax(
                        own=own, logits=gamma, count=past, at=tb * LANES, t=tb * LANES, scale=scale, lanes=at.lanes
                    )  # fmt: skip
        else:
            for t in T.vectorized(BT):
                own[0, t] = scale / T.cast(past + 1, "float32") if flags.averages else scale


def own_logits(plan, at, own, *, BT, t0, rows, seen) -> None:
    """Logits of the tokens' own segment, whose mean key goes up to the token itself; and u as columns."""
    Dk, u, k, lanes, total, row0, heads = plan.Dk, at.u, at.k, at.lanes, at.total, at.row0, at.heads

    @emit
    def means_times_u():
        columns(u, Dk, row0, heads, t0, rows, at.UT)
        for t in T.vectorized(BT):
            own[0, t] = T.float32(0)
        for t in range(rows):
            for x in T.vectorized(LANES):
                lanes[0, x] = T.float32(0)
            for e in T.unroll(Dk // LANES):
                for x in T.vectorized(LANES):
                    total[e * LANES + x] = total[e * LANES + x] + k[row0 + (t0 + t) * heads, e * LANES + x]
                    lanes[0, x] = lanes[0, x] + total[e * LANES + x] * u[row0 + (t0 + t) * heads, e * LANES + x]
            for x in T.unroll(LANES):
                own[0, t] = own[0, t] + lanes[0, x]
            own[0, t] = own[0, t] / T.cast(seen + t + 1, "float32")


def choices(at, own, gamma, *, t, seen, scale, spread) -> None:
    """Gates of the LANES tokens from ``t`` on, and which segments they read; with ``spread`` gamma is 0 for others."""
    chosen, value, picks = at.chosen, at.value, at.picks

    @emit
    def largest():
        to: T.let = t if spread else seen + t
        choose(
            logits=gamma, past=at.past, picks=picks, t=t, lanes=at.lanes, best=at.best, chosen=chosen, value=value,
            at=to,
        )  # fmt: skip
        softmax(own=own, logits=value, count=picks, at=to, t=t, scale=scale, lanes=at.lanes)
        if spread:
            for i in range(at.past):
                for x in T.vectorized(LANES):
                    gamma[i, t + x] = T.float32(0)
            for p in range(picks):
                for x in range(LANES):
                    gamma[chosen[p, t + x], t + x] = value[p, t + x]
