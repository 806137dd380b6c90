"""What the CPU templates share: a register tile and a polynomial exponential."""

from tvm.script import tirx as T

LANES = 16
"""Widths are padded to a multiple of this many floats: one AVX-512 vector, two AVX2 vectors."""

_LOG2_E = 1.4426950408889634
_SERIES = (0.6931471805599453, 0.2402265069591007, 0.0555041086648216, 0.009618129107628477)
_SERIES += (0.0013333558146428443, 0.0001540353039338161, 1.5252733804059840e-05)


def exp(x):
    """exp(x) for x <= 0 in float32; the relative error is about 1e-7 * max(1, -x).

    Range reduction to 2**f with f in [-1/2, 1/2], then its series: LLVM would call libm once per lane instead.
    """
    scaled = T.max(x, T.float32(-87.0)) * T.float32(_LOG2_E)
    whole = T.floor(scaled + T.float32(0.5))
    part = scaled - whole
    value = T.float32(_SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        value = value * part + T.float32(coefficient)
    value = value * part + T.float32(1.0)
    return value * T.reinterpret("float32", (T.cast(whole, "int32") + T.int32(127)) << T.int32(23))


def multiply(rows, cols, unroll):
    """A register tile of ``rows`` by ``cols``: C[r0 + r, n0 + n] (+)= gate[r] * sum_d A[a0 + d, r0 + r] B[b0 + d, n0 + n].

    Consecutive elements of A are broadcast against whole vectors of B. ``steps``, the number of d, is a multiple of
    ``unroll``. ``gate`` is row ``g0`` of G, or absent (``gated=False``); ``fresh`` overwrites C instead of adding.
    """

    @T.inline
    def tile(A, a0, B, b0, steps, C, r0, n0, G, g0, gated, fresh):
        acc = T.alloc_buffer((rows, cols), "float32", scope="local")
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                acc[r, n] = T.float32(0)
        for d in range(steps // unroll):
            for e in T.unroll(unroll):
                for r in T.unroll(rows):
                    for n in T.vectorized(cols):
                        acc[r, n] = acc[r, n] + A[a0 + d * unroll + e, r0 + r] * B[b0 + d * unroll + e, n0 + n]
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                if gated:
                    C[r0 + r, n0 + n] = C[r0 + r, n0 + n] + G[g0, r0 + r] * acc[r, n]
                elif fresh:
                    C[r0 + r, n0 + n] = acc[r, n]
                else:
                    C[r0 + r, n0 + n] = C[r0 + r, n0 + n] + acc[r, n]

    return tile


def dot_rows(rows, cols, unroll, width):
    """A register tile of inner products: C[c0 + r, t0 + n] = sum_{d < width} A[min(a0 + r, a1), d] B[d, t0 + n]."""

    @T.inline
    def tile(A, a0, a1, B, C, c0, t0):
        acc = T.alloc_buffer((rows, cols), "float32", scope="local")
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                acc[r, n] = T.float32(0)
        for d in range(width // unroll):
            for e in T.unroll(unroll):
                for r in T.unroll(rows):
                    for n in T.vectorized(cols):
                        acc[r, n] = acc[r, n] + A[T.min(a0 + r, a1), d * unroll + e] * B[d * unroll + e, t0 + n]
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                C[c0 + r, t0 + n] = acc[r, n]

    return tile


def gather(rows, cols, width):
    """A register tile over scattered rows: C[i_r, n0 + n] += weight_r * sum_{d < width} A[i_r, d] B[b0 + d, n0 + n].

    ``index`` and ``weight`` hold one entry a row from ``x0`` on; ``row(i)`` maps an entry to a row of A and C.
    """

    @T.inline
    def tile(A, B, b0, C, n0, index, weight, x0, count, origin, stride):
        acc = T.alloc_buffer((rows, cols), "float32", scope="local")
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                acc[r, n] = T.float32(0)
        for d in range(width):
            for r in T.unroll(rows):
                for n in T.vectorized(cols):
                    acc[r, n] = acc[r, n] + A[origin + index[x0 + T.min(r, count - 1)] * stride, d] * B[b0 + d, n0 + n]
        for r in T.unroll(rows):
            if r < count:
                for n in T.vectorized(cols):
                    C[origin + index[x0 + r] * stride, n0 + n] = (
                        C[origin + index[x0 + r] * stride, n0 + n] + weight[x0 + r] * acc[r, n]
                    )

    return tile
