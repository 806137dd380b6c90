"""Register tiles of the gradients: a state times dy, with what follows from it before it leaves the registers.

In the reads everything stands as [feature, token], so that a gate's gradient is a sum of whole vectors.
"""

from tvm.script import tirx as T


def read_state(rows, cols, unroll, width, weighs):
    """P = M dy of ``rows`` features and ``cols`` tokens: dq += gate * P, and the gate's gradient += <q, P>.

    P[d, t] = sum_{n < width} M[m0 + d, n] Y[n, t]. ``gate`` and the gate's gradient are row ``i`` of G and D, the
    latter left out without ``weighs``; ``first`` says that D is to be overwritten.
    """

    @T.inline
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
                D[i, t0 + x] = part[0, x]
        for r in T.unroll(rows):
            for x in T.vectorized(cols):
                dQ[d0 + r, t0 + x] = dQ[d0 + r, t0 + x] + G[i, t0 + x] * acc[r, x]

    return tile


def read_online(rows, cols, unroll, width, weighs, decays):
    """The same of the online memory, where P = decay * (M dy) + sum_{j < steps} k_j E_j; dq is overwritten.

    ``decay`` is row 1 of G, left out without ``decays``; the gate and its gradient are rows 0 of G and D. Without
    ``linked`` there is no M.
    """

    @T.inline
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
            for r in T.unroll(rows):
                for x in T.vectorized(cols):
                    acc[r, x] = acc[r, x] * G[1, t0 + x]
        for j in range(steps):
            for r in T.unroll(rows):
                for x in T.vectorized(cols):
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


def outer(rows, cols):
    """A register tile of a state's gradient: C[c0 + d0 + r, n0 + n] += sum_{t < steps} A[t, d0 + r] B[t, n0 + n]."""

    @T.inline
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
