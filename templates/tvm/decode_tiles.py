"""What the decode template is made of: tiles that work on states in place, inner products, a softmax, a top k."""

from tvm.script import tirx as T

from .kernel import emit, inline
from .tiles import LANES, LARGEST, exp

LOW = -3.0e38
"""Less than any logit; its exponential is 0."""


def over_columns(*, width, cols, c0, make, body):
    """Call ``body(tile, y0, c0 + y0)`` for tiles of ``cols`` of ``width`` columns, then for what remains.

    What remains are whole vectors, in one tile, and fewer columns than a vector has; ``make(lanes)`` gives a tile.
    """
    full, middle, tail = width // cols, width % cols // LANES * LANES, width % LANES

    @emit
    def tiles():
        if full > 0:
            for j in range(full):
                body(make(cols), j * cols, c0 + j * cols)
        if middle > 0:
            body(make(middle), full * cols, c0 + full * cols)
        if tail > 0:
            body(make(tail), width - tail, c0 + width - tail)


def advance(tokens, rows, lanes, Dk, gated):
    """Write ``tokens`` to the columns n0 to n0 + lanes of the online state and read it after each: Y = share (Q M)."""

    @inline
    def row(online, b, h, Q, K, P, V, decay, m, acc, r, d, y0, n0):
        for x in T.vectorized(lanes):
            m[r, x] = online[b, h, d, n0 + x]
        for t in T.unroll(tokens):
            for x in T.vectorized(lanes):
                if gated:
                    m[r, x] = decay[t] * m[r, x] + (P[t, d] * V[t, y0 + x] + K[t, d] * V[t + 1, y0 + x])
                else:
                    m[r, x] = m[r, x] + K[t, d] * V[t + 1, y0 + x]
            for x in T.vectorized(lanes):
                acc[r * tokens + t, x] = acc[r * tokens + t, x] + Q[t, d] * m[r, x]
        for x in T.vectorized(lanes):
            online[b, h, d, n0 + x] = m[r, x]

    @inline
    def tile(online, b, h, Q, K, P, V, decay, share, Y, y0, n0):
        m = T.alloc_buffer((rows, lanes), "float32", scope="local")
        acc = T.alloc_buffer((rows * tokens, lanes), "float32", scope="local")
        for a in T.unroll(rows * tokens):
            for x in T.vectorized(lanes):
                acc[a, x] = T.float32(0)
        for e in range(Dk // rows):
            for r in T.unroll(rows):
                row(online, b, h, Q, K, P, V, decay, m, acc, r, e * rows + r, y0, n0)
        if Dk % rows > 0:
            for r in T.unroll(Dk % rows):
                row(online, b, h, Q, K, P, V, decay, m, acc, r, Dk // rows * rows + r, y0, n0)
        for t in T.unroll(tokens):
            for r in T.unroll(rows - 1):
                for x in T.vectorized(lanes):
                    acc[t, x] = acc[t, x] + acc[(r + 1) * tokens + t, x]
            for x in T.vectorized(lanes):
                Y[t, y0 + x] = share[t] * acc[t, x]

    return tile


def read(tokens, rows, streams, lanes, Dk, ahead, routed, sparse):
    """Y += gate (Q M) over the columns n0 to n0 + lanes of ``streams`` cached states side by side.

    ``rows`` rows of each are summed apart from each other, so that loads and sums do not wait for one another; the row
    ``ahead`` rows further on is fetched meanwhile.
    """

    @inline
    def row(states, b, h, first, chosen, Q, acc, r, d, n0):
        for s in T.unroll(streams):
            slot: T.let = chosen[first + s] if sparse else first + s
            if ahead > 0:
                for line in T.unroll((lanes + LANES - 1) // LANES):
                    T.evaluate(
                        T.call_intrin(
                            "void",
                            "tirx.prefetch",
                            T.address_of(states[b, h, slot, d + ahead, n0 + line * LANES]),
                            T.int32(0),
                            T.int32(3),
                            T.int32(1),
                        )
                    )
            for t in T.unroll(tokens):
                for x in T.vectorized(lanes):
                    acc[(s * tokens + t) * rows + r, x] = (
                        acc[(s * tokens + t) * rows + r, x] + Q[t, d] * states[b, h, slot, d, n0 + x]
                    )

    @inline
    def tile(states, b, h, first, chosen, Q, gates, Y, y0, n0):
        acc = T.alloc_buffer((streams * tokens * rows, lanes), "float32", scope="local")
        for a in T.unroll(streams * tokens * rows):
            for x in T.vectorized(lanes):
                acc[a, x] = T.float32(0)
        for e in range(Dk // rows):
            for r in T.unroll(rows):
                row(states, b, h, first, chosen, Q, acc, r, e * rows + r, n0)
        if Dk % rows > 0:
            for r in T.unroll(Dk % rows):
                row(states, b, h, first, chosen, Q, acc, r, Dk // rows * rows + r, n0)
        for s in T.unroll(streams):
            for t in T.unroll(tokens):
                for r in T.unroll(rows - 1):
                    for x in T.vectorized(lanes):
                        acc[(s * tokens + t) * rows, x] = (
                            acc[(s * tokens + t) * rows, x] + acc[(s * tokens + t) * rows + r + 1, x]
                        )
                for x in T.vectorized(lanes):
                    # Without logits all gates of a token are the same.
                    if routed:
                        Y[t, y0 + x] = Y[t, y0 + x] + gates[t, first + s] * acc[(s * tokens + t) * rows, x]
                    else:
                        Y[t, y0 + x] = Y[t, y0 + x] + gates[t] * acc[(s * tokens + t) * rows, x]

    return tile


def dots(sums, *, count, width, row, vector):
    """sums[r, 0] = sum_d row(r, d) vector(d) for ``count`` rows together; sums ``[count, LANES]`` is overwritten."""

    @emit
    def product():
        for r in T.unroll(count):
            for x in T.vectorized(LANES):
                sums[r, x] = T.float32(0)
        for e in range(width // LANES):
            for r in T.unroll(count):
                for x in T.vectorized(LANES):
                    sums[r, x] = sums[r, x] + row(r, e * LANES + x) * vector(e * LANES + x)
        if width % LANES > 0:
            for r in T.unroll(count):
                for x in T.vectorized(width % LANES):
                    sums[r, x] = sums[r, x] + row(r, width // LANES * LANES + x) * vector(width // LANES * LANES + x)
        for r in T.unroll(count):
            fold(sums, r)


@inline
def fold(w, r):
    # w[r, 0] = the sum of the LANES of row r.
    for x in T.vectorized(8):
        w[r, x] = w[r, x] + w[r, x + 8]
    for x in T.vectorized(4):
        w[r, x] = w[r, x] + w[r, x + 4]
    for x in T.vectorized(2):
        w[r, x] = w[r, x] + w[r, x + 2]
    w[r, 0] = w[r, 0] + w[r, 1]


@inline
def softmax(logits, t, count, own, at, lanes):
    # Gates in place of own[at] and of the ``count`` logits [t, :]; the LANES after them are LOW.
    for x in T.vectorized(LANES):
        lanes[0, x] = own[at]
    for i in range((count + LANES - 1) // LANES):
        for x in T.vectorized(LANES):
            lanes[0, x] = T.max(lanes[0, x], logits[t, i * LANES + x])
    for x in T.unroll(LANES - 1):
        lanes[0, 0] = T.max(lanes[0, 0], lanes[0, x + 1])
    for x in T.vectorized(LANES):
        lanes[1, x] = T.float32(0)
    for i in range((count + LANES - 1) // LANES):
        for x in T.vectorized(LANES):
            logits[t, i * LANES + x] = exp(logits[t, i * LANES + x] - lanes[0, 0])
            lanes[1, x] = lanes[1, x] + logits[t, i * LANES + x]
    fold(lanes, 1)
    own[at] = exp(own[at] - lanes[0, 0])
    lanes[1, 0] = T.float32(1) / (lanes[1, 0] + own[at])
    own[at] = own[at] * lanes[1, 0]
    for i in range((count + LANES - 1) // LANES):
        for x in T.vectorized(LANES):
            logits[t, i * LANES + x] = logits[t, i * LANES + x] * lanes[1, 0]


@inline
def choose(logits, past, picks, lanes, index, chosen, value):
    # The ``picks`` largest of ``past`` logits [0, :], largest first, the earlier in a tie: which, and how large.
    # What is NaN is chosen first, as infinity: its gate will be NaN.
    for i in range((past + LANES - 1) // LANES):
        for x in T.vectorized(LANES):
            logits[0, i * LANES + x] = T.Select(
                logits[0, i * LANES + x] <= T.float32(LARGEST), logits[0, i * LANES + x], T.infinity("float32")
            )
    for p in range(picks):
        for x in T.vectorized(LANES):
            lanes[0, x] = logits[0, x]
            index[x] = x
        for i in range((past + LANES - 1) // LANES - 1):
            for x in T.vectorized(LANES):
                index[x] = T.Select(logits[0, (i + 1) * LANES + x] > lanes[0, x], (i + 1) * LANES + x, index[x])
                lanes[0, x] = T.max(lanes[0, x], logits[0, (i + 1) * LANES + x])
        for x in T.unroll(LANES - 1):
            if T.Or(lanes[0, x + 1] > lanes[0, 0], T.And(lanes[0, x + 1] == lanes[0, 0], index[x + 1] < index[0])):
                lanes[0, 0] = lanes[0, x + 1]
                index[0] = index[x + 1]
        # Not a number compares with nothing: even then the index stays within the cache.
        chosen[p] = T.min(index[0], past - 1)
        value[0, p] = lanes[0, 0]
        logits[0, chosen[p]] = T.float32(LOW)
    for x in T.vectorized(LANES):
        value[0, picks + x] = T.float32(LOW)
