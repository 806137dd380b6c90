"""Register tiles of the gradients: a state times dy, with what follows from it before it leaves the registers.

In the reads everything stands as [feature, token], so that a gate's gradient is a sum of whole vectors.
"""

from tvm.script import tirx as T

from ..kernel import emit, inline
from ..tiles import LANES, weighed

_LINE = 16  # floats of a cache line
_INTO_L2, _DATA = 2, 1


def fetch(at, X, width, *, t, count, writes=0):
    """Rows ``t``, ``t + 1``, ... of the head at work, on their way into the cache while something else is computed.

    A head's rows lie apart, and the processor does not guess the next one. Rows outside of the row of tokens are moved
    inside. ``writes``: 1 for rows that are to be written.
    """

    @emit
    def lines():
        for r in range(count):
            row: T.let = at.row0 + T.min(T.max(t + r, 0), at.tokens - 1) * at.heads
            for e in range(width // _LINE):
                T.evaluate(T.call_intrin("", "tirx.prefetch", T.address_of(X[row, e * _LINE]), writes, _INTO_L2, _DATA))


def read_state(rows, cols, unroll, width, weighs, chosen=False):
    """P = M dy of ``rows`` features and ``cols`` tokens: dq += gate * P, and the gate's gradient += <q, P>.

    P[d, t] = sum_{n < width} M[m0 + d, n] Y[n, t]. ``gate`` and the gate's gradient are row ``i`` of G and D, the
    latter left out without ``weighs``; ``first`` says that D is to be overwritten. ``chosen`` says that a gate of 0
    leaves M out, even if it is not finite.
    """

    @inline
    def tile(M, m0, Y, Q, dQ, G, D, i, d0, t0, first):
        acc = T.alloc_buffer((rows, cols), "float32", scope="local")
        part = T.alloc_buffer((1, cols), "float32", scope="local")
        for r in T.unroll(rows):
            for x in T.vectorized(cols):
                acc[r, x] = T.float32(0)
        for n in range(width // unroll):
            for e in T.unroll(unroll):
                for r in T.unroll(rows):
                    for x in T.vectorized(cols):
                        acc[r, x] = acc[r, x] + M[m0 + d0 + r, n * unroll + e] * Y[n * unroll + e, t0 + x]
        if weighs:
            for x in T.vectorized(cols):
                part[0, x] = T.Select(first, T.float32(0), D[i, t0 + x])
            for r in T.unroll(rows):
                for x in T.vectorized(cols):
                    part[0, x] = part[0, x] + Q[d0 + r, t0 + x] * acc[r, x]
            for x in T.vectorized(cols):
                D[i, t0 + x] = weighed(G[i, t0 + x], part[0, x], chosen)
        for r in T.unroll(rows):
            for x in T.vectorized(cols):
                dQ[d0 + r, t0 + x] = dQ[d0 + r, t0 + x] + weighed(G[i, t0 + x], G[i, t0 + x] * acc[r, x], chosen)

    return tile


def read_online(rows, cols, unroll, width, weighs, decays, guarded):
    """The same of the online memory, where P = decay * (M dy) + sum_{j < steps} k_j E_j; dq is overwritten.

    The gate and its gradient are rows 0 of G and D. With ``decays``, row 1 of G is the decay, and row 2 of D becomes
    <q, M dy>. Without ``linked`` there is no M. ``guarded`` leaves out the later tokens, where E is 0 but k may be NaN.
    """

    @inline
    def tile(M, Y, K, E, steps, Q, dQ, G, D, d0, t0, linked, first):
        acc = T.alloc_buffer((rows, cols), "float32", scope="local")
        part = T.alloc_buffer((1, cols), "float32", scope="local")
        for r in T.unroll(rows):
            for x in T.vectorized(cols):
                acc[r, x] = T.float32(0)
        for n in range(T.if_then_else(linked, width // unroll, 0)):
            for e in T.unroll(unroll):
                for r in T.unroll(rows):
                    for x in T.vectorized(cols):
                        acc[r, x] = acc[r, x] + M[d0 + r, n * unroll + e] * Y[n * unroll + e, t0 + x]
        if decays:
            for x in T.vectorized(cols):
                part[0, x] = T.Select(first, T.float32(0), D[2, t0 + x])
            for r in T.unroll(rows):
                for x in T.vectorized(cols):
                    part[0, x] = part[0, x] + Q[d0 + r, t0 + x] * acc[r, x]
            for x in T.vectorized(cols):
                D[2, t0 + x] = part[0, x]
            for r in T.unroll(rows):
                for x in T.vectorized(cols):
                    acc[r, x] = acc[r, x] * G[1, t0 + x]
        for j in range(steps):
            for r in T.unroll(rows):
                for x in T.vectorized(cols):
                    if guarded:
                        acc[r, x] = acc[r, x] + T.Select(t0 + x >= j, K[j, d0 + r] * E[j, t0 + x], T.float32(0))
                    else:
                        acc[r, x] = acc[r, x] + K[j, d0 + r] * E[j, t0 + x]
        if weighs:
            for x in T.vectorized(cols):
                part[0, x] = T.Select(first, T.float32(0), D[0, t0 + x])
            for r in T.unroll(rows):
                for x in T.vectorized(cols):
                    part[0, x] = part[0, x] + Q[d0 + r, t0 + x] * acc[r, x]
            for x in T.vectorized(cols):
                D[0, t0 + x] = part[0, x]
        for r in T.unroll(rows):
            for x in T.vectorized(cols):
                dQ[d0 + r, t0 + x] = G[0, t0 + x] * acc[r, x]

    return tile


def read_gathered(rows, cols, width):
    """The same of scattered tokens and a transposed M: dq_i += scale * gate_i * P_i, and D[r, :] += q_i * P_i in lanes.

    P_i[d] = sum_{n < width} Y[row(i), n] MT[n, d] for ``cols`` features from ``d0`` on. ``index`` and ``gate`` hold one
    entry a token from ``x0`` on, of which ``count`` count; D is left to be summed up, and overwritten with ``first``.
    """

    @inline
    def tile(Y, MT, Q, dQ, D, d0, index, gate, x0, count, origin, stride, scale, first):
        acc = T.alloc_buffer((rows, cols), "float32", scope="local")
        for r in T.unroll(rows):
            for x in T.vectorized(cols):
                acc[r, x] = T.float32(0)
        for n in range(width):
            for r in T.unroll(rows):
                for x in T.vectorized(cols):
                    acc[r, x] = acc[r, x] + Y[origin + index[x0 + T.min(r, count - 1)] * stride, n] * MT[n, d0 + x]
        for r in T.unroll(rows):
            if r < count:
                row: T.let = origin + index[x0 + r] * stride
                if first:
                    for x in T.vectorized(LANES):
                        D[r, x] = T.float32(0)
                for e in T.unroll(cols // LANES):
                    for x in T.vectorized(LANES):
                        D[r, x] = D[r, x] + Q[row, d0 + e * LANES + x] * acc[r, e * LANES + x]
                for x in T.vectorized(cols):
                    dQ[row, d0 + x] = dQ[row, d0 + x] + scale * gate[x0 + r] * acc[r, x]

    return tile


def outer(rows, cols):
    """A register tile of a state's gradient: C[c0 + d0 + r, n0 + n] += sum_{t < steps} A[t, d0 + r] B[t, n0 + n]."""

    @inline
    def tile(A, B, steps, C, c0, d0, n0):
        acc = T.alloc_buffer((rows, cols), "float32", scope="local")
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                acc[r, n] = T.float32(0)
        for t in range(steps):
            for r in T.unroll(rows):
                for n in T.vectorized(cols):
                    acc[r, n] = acc[r, n] + A[t, d0 + r] * B[t, n0 + n]
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                C[c0 + d0 + r, n0 + n] = C[c0 + d0 + r, n0 + n] + acc[r, n]

    return tile
