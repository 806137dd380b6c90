"""Gates of a read (Eq. 8-10, 16-17): softmax over segments, ssc's choice, and its tokens sorted by segment.

Logits and gates stand as [segment, token], so that LANES tokens go through each step side by side.
"""

from tvm.script import tirx as T

from .kernel import inline
from .tiles import LANES, LARGEST, exp

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
