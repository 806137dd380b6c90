"""What the CPU templates share: a register tile and a polynomial exponential."""

from tvm.script import tirx as T

from .kernel import inline

LANES = 16
"""Widths are padded to a multiple of this many floats: one AVX-512 vector, two AVX2 vectors."""

_LOG2_E = 1.4426950408889634
_SERIES = (0.6931471805599453, 0.2402265069591007, 0.0555041086648216, 0.009618129107628477)
_SERIES += (0.0013333558146428443, 0.0001540353039338161, 1.5252733804059840e-05)


def exp(x):
    """exp(x) for x <= 0 in float32; the relative error is about 1e-7 * max(1, -x).

    Range reduction to 2**f with f in [-1/2, 1/2], then its series: LLVM would call libm once per lane instead.
    """
    # A maximum would swallow NaN.
    scaled = T.Select(x < T.float32(-87.0), T.float32(-87.0), x) * T.float32(_LOG2_E)
    whole = T.floor(scaled + T.float32(0.5))
    part = scaled - whole
    value = T.float32(_SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        value = value * part + T.float32(coefficient)
    value = value * part + T.float32(1.0)
    return value * T.reinterpret("float32", (T.cast(whole, "int32") + T.int32(127)) << T.int32(23))


LARGEST = 3.4028234663852886e38


def finite(x):
    """Whether x is neither infinite nor NaN, which compares with nothing."""
    return T.And(x <= T.float32(LARGEST), x >= T.float32(-LARGEST))


def read_at_all(gate):
    """Whether a gate is other than +0, NaN included: with that, TVM's ``!=`` is false."""
    return T.reinterpret("int32", gate) != T.int32(0)


def weighed(gate, x, chosen):
    """x, which the gate weighs; with ``chosen``, a gate of 0 leaves it out, even if it is not finite."""
    return T.Select(gate == T.float32(0), T.float32(0), x) if chosen else x


def stain(gate):
    """0, or a gate that is not finite: what it adds where it has nothing to scale and is seen all the same."""
    return T.Select(finite(gate), T.float32(0), gate)


# total[0] = the sum of ``rows`` rows of X from ``row`` on: not finite if anything in them is not.
@inline
def add_up(X, rows, width, total, row=0):
    lanes = T.alloc_buffer((LANES,), "float32", scope="local")
    for x in T.vectorized(LANES):
        lanes[x] = T.float32(0)
    for r in range(rows):
        for e in T.unroll(width // LANES):
            for x in T.vectorized(LANES):
                lanes[x] = lanes[x] + X[row + r, e * LANES + x]
    total[0] = T.float32(0)
    for x in T.unroll(LANES):
        total[0] = total[0] + lanes[x]


# Zeros in the first ``width`` columns of ``rows`` rows from ``row`` on.
@inline
def clear(target, row, rows, width):
    for d in range(rows):
        for n in T.vectorized(width):
            target[row + d, n] = T.float32(0)


# A state, which begins at row ``row`` of ``states``, into M.
@inline
def copy_state(states, row, M, Dk, Dv):
    for d in range(Dk):
        for n in T.vectorized(Dv):
            M[d, n] = states[row + d, n]


# The sum of ``count`` states from ``base`` on.
@inline
def sum_states(states, base, count, summed, Dk, Dv):
    clear(summed, 0, Dk, Dv)
    for i in range(count):
        for d in range(Dk):
            for n in T.vectorized(Dv):
                summed[d, n] = summed[d, n] + states[(base + i) * Dk + d, n]


def multiply(rows, cols, unroll, chosen=False):
    """A register tile of ``rows`` by ``cols``: C[r0 + r, n0 + n] (+)= gate_r sum_d A[a0 + d, r0 + r] B[b0 + d, n0 + n].

    Consecutive elements of A are broadcast against whole vectors of B. ``steps``, the number of d, is a multiple of
    ``unroll``. ``gate`` is row ``g0`` of G, or absent (``gated=False``); ``fresh`` overwrites C instead of adding.
    ``chosen`` says that a gate of 0 leaves B out, even if it is not finite.
    """

    @inline
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
                    C[r0 + r, n0 + n] = C[r0 + r, n0 + n] + weighed(G[g0, r0 + r], G[g0, r0 + r] * acc[r, n], chosen)
                elif fresh:
                    C[r0 + r, n0 + n] = acc[r, n]
                else:
                    C[r0 + r, n0 + n] = C[r0 + r, n0 + n] + acc[r, n]

    return tile


def dot_rows(rows, cols, unroll, width):
    """A register tile of inner products: C[c0 + r, t0 + n] = sum_{d < width} A[min(a0 + r, a1), d] B[d, t0 + n]."""

    @inline
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

    @inline
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


BLOCK = 8
"""Side of the square block that ``transpose`` moves in registers."""


# Lanes of two vectors in one butterfly step: runs of 4, 2 or 1 lanes of each in turn, the low or the high ones.
LOW4, HIGH4 = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
LOW2, HIGH2 = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
LOW1, HIGH1 = [0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15]


@inline
def transpose(source, first, stride, last, target, d0, t0):
    # target[d0 + d, t0 + t] = source[first + min(t, last) * stride, d0 + d] for a block of BLOCK tokens and widths, in
    # three butterfly steps of vector shuffles: element by element, LLVM makes scatters of it, eight times slower.
    a = T.alloc_buffer((BLOCK, BLOCK), "float32", scope="local")
    b = T.alloc_buffer((BLOCK, BLOCK), "float32", scope="local")
    for r in T.unroll(BLOCK):
        for x in T.vectorized(BLOCK):
            a[r, x] = source[first + T.min(r, last) * stride, d0 + x]
    for r in T.unroll(4):
        b[r, T.Ramp(0, 1, 8)] = T.Shuffle([a[r, T.Ramp(0, 1, 8)], a[r + 4, T.Ramp(0, 1, 8)]], LOW4)
        b[r + 4, T.Ramp(0, 1, 8)] = T.Shuffle([a[r, T.Ramp(0, 1, 8)], a[r + 4, T.Ramp(0, 1, 8)]], HIGH4)
    for e in T.unroll(2):
        for r in T.unroll(2):
            a[e * 4 + r, T.Ramp(0, 1, 8)] = T.Shuffle(
                [b[e * 4 + r, T.Ramp(0, 1, 8)], b[e * 4 + r + 2, T.Ramp(0, 1, 8)]], LOW2
            )
            a[e * 4 + r + 2, T.Ramp(0, 1, 8)] = T.Shuffle(
                [b[e * 4 + r, T.Ramp(0, 1, 8)], b[e * 4 + r + 2, T.Ramp(0, 1, 8)]], HIGH2
            )
    for r in T.unroll(4):
        target[d0 + r * 2, T.Ramp(t0, 1, 8)] = T.Shuffle(
            [a[r * 2, T.Ramp(0, 1, 8)], a[r * 2 + 1, T.Ramp(0, 1, 8)]], LOW1
        )
        target[d0 + r * 2 + 1, T.Ramp(t0, 1, 8)] = T.Shuffle(
            [a[r * 2, T.Ramp(0, 1, 8)], a[r * 2 + 1, T.Ramp(0, 1, 8)]], HIGH1
        )


# Tokens t0 to t0 + rows of one head into columns: target[d, t] = source[row0 + (t0 + t) * heads, d].
@inline
def columns(source, width, row0, heads, t0, rows, target):
    for tb in range((rows + BLOCK - 1) // BLOCK):
        for db in range(width // BLOCK):
            transpose(
                source, row0 + (t0 + tb * BLOCK) * heads, heads, rows - 1 - tb * BLOCK, target, db * BLOCK, tb * BLOCK
            )
