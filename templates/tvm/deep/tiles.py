"""Register tiles of deep memories: products that finish with what follows while their sums are in registers.

``product`` makes a tile of a function that stores it, which TVMScript calls with the sums and where they belong:
``finish(acc, r0, n0)``. The functions below make those.
"""

from tvm.script import tirx as T

from ..kernel import inline
from ..tiles import LANES, exp

_SLOPE = 1.5957691216057308  # 2 sqrt(2 / pi): gelu(x) = x sigmoid(_SLOPE (x + _CUBE x^3)), the tanh form
_CUBE = 0.044715


def product(rows, cols, unroll, finish, across=False):
    """A tile of sum_{d < steps} A[a0 + d, ac + r] B[b0 + d, bc + n], handed to ``finish``.

    Elements of A are broadcast against whole vectors of B; ``steps`` is a multiple of ``unroll``. ``across``: of A's
    transpose, A[ac + r, a0 + d], without one in memory.
    """
    add_up = summed(rows, cols, unroll, across)

    @inline
    def tile(A, a0, ac, B, b0, bc, steps, r0, n0):
        acc = T.alloc_buffer((rows, cols), "float32", scope="local")
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                acc[r, n] = T.float32(0)
        add_up(acc=acc, A=A, a0=a0, ac=ac, B=B, b0=b0, bc=bc, steps=steps)
        finish(acc=acc, r0=r0, n0=n0)

    return tile


def products(rows, cols, finish, *pairs):
    """A tile of sum_{d < steps} A[d, r0 + r] B[d, n0 + n] over pairs (A, B), handed to ``finish``."""
    add_up = summed(rows, cols, 1, False)

    def all_pairs(acc, steps, r0, n0):
        for A, B in pairs:
            add_up(acc=acc, A=A, a0=0, ac=r0, B=B, b0=0, bc=n0, steps=steps)

    @inline
    def tile(steps, r0, n0):
        acc = T.alloc_buffer((rows, cols), "float32", scope="local")
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                acc[r, n] = T.float32(0)
        all_pairs(acc=acc, steps=steps, r0=r0, n0=n0)
        finish(acc=acc, r0=r0, n0=n0)

    return tile


def summed(rows, cols, unroll, across):
    """acc += sum_{d < steps} A[a0 + d, ac + r] B[b0 + d, bc + n]; or of A's transpose."""

    @inline
    def add_up(acc, A, a0, ac, B, b0, bc, steps):
        for d in range(steps // unroll):
            for e in T.unroll(unroll):
                for r in T.unroll(rows):
                    for n in T.vectorized(cols):
                        if across:
                            acc[r, n] = acc[r, n] + A[ac + r, a0 + d * unroll + e] * B[b0 + d * unroll + e, bc + n]
                        else:
                            acc[r, n] = acc[r, n] + A[a0 + d * unroll + e, ac + r] * B[b0 + d * unroll + e, bc + n]

    return add_up


# --- what a tile finishes with


def overwrite(rows, cols, C, at=0):
    """C[at + r0 + r, n0 + n] = acc."""

    @inline
    def finish(acc, r0, n0):
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                C[at + r0 + r, n0 + n] = acc[r, n]

    return finish


def add(rows, cols, C, at=0):
    """C[at + r0 + r, n0 + n] += acc."""

    @inline
    def finish(acc, r0, n0):
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                C[at + r0 + r, n0 + n] = C[at + r0 + r, n0 + n] + acc[r, n]

    return finish


def subtract(rows, cols, C):
    """C[r0 + r, n0 + n] -= acc."""

    @inline
    def finish(acc, r0, n0):
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                C[r0 + r, n0 + n] = C[r0 + r, n0 + n] - acc[r, n]

    return finish


def scaled(rows, cols, C, gate, i=0, fresh=False, negative=False):
    """C[r0 + r, n0 + n] (+)= gate[i, r0 + r] * acc; or minus that."""

    @inline
    def finish(acc, r0, n0):
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                if fresh:
                    C[r0 + r, n0 + n] = gate[i, r0 + r] * acc[r, n]
                elif negative:
                    C[r0 + r, n0 + n] = C[r0 + r, n0 + n] - gate[i, r0 + r] * acc[r, n]
                else:
                    C[r0 + r, n0 + n] = C[r0 + r, n0 + n] + gate[i, r0 + r] * acc[r, n]

    return finish


def weighted(rows, cols, C, weights):
    """C[j, t] = weights[j, t] * acc where t >= j, else 0: a later key may be NaN."""

    @inline
    def finish(acc, r0, n0):
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                C[r0 + r, n0 + n] = T.Select(n0 + n >= r0 + r, weights[r0 + r, n0 + n] * acc[r, n], T.float32(0))

    return finish


def activated(rows, cols, Z, gate=None, i=0):
    """Z[r0 + r, n0 + n] = gelu(acc), times ``gate[i, n0 + n]`` where there is one."""

    @inline
    def finish(acc, r0, n0):
        a = T.alloc_buffer((2, cols), "float32", scope="local")
        for r in T.unroll(rows):
            sigmoid(acc, r, a, cols)
            for n in T.vectorized(cols):
                Z[r0 + r, n0 + n] = acc[r, n] * a[1, n]
            if gate is not None:
                for n in T.vectorized(cols):
                    Z[r0 + r, n0 + n] = Z[r0 + r, n0 + n] * gate[i, n0 + n]

    return finish


def activated_with_slope(rows, cols, Z, S, X=None):
    """Z = gelu(acc), S = its slope; and X = acc where there is one."""

    @inline
    def finish(acc, r0, n0):
        a = T.alloc_buffer((2, cols), "float32", scope="local")
        for r in T.unroll(rows):
            if X is not None:
                for n in T.vectorized(cols):
                    X[r0 + r, n0 + n] = acc[r, n]
            sigmoid(acc, r, a, cols)
            for n in T.vectorized(cols):
                Z[r0 + r, n0 + n] = acc[r, n] * a[1, n]
            for n in T.vectorized(cols):
                S[r0 + r, n0 + n] = a[1, n] + acc[r, n] * a[1, n] * (T.float32(1) - a[1, n]) * rate(acc[r, n])

    return finish


def rate(x):
    """The derivative of the sigmoid's argument."""
    return T.float32(_SLOPE) + T.float32(3 * _SLOPE * _CUBE) * x * x


# a[1] = sigmoid(_SLOPE (x + _CUBE x^3)) of x = row r of X: gelu(x) = x a[1]. a[0] is scratch.
@inline
def sigmoid(X, r, a, cols):
    for n in T.vectorized(cols):
        a[1, n] = X[r, n] * (T.float32(_SLOPE) + T.float32(_SLOPE * _CUBE) * X[r, n] * X[r, n])
    for n in T.vectorized(cols):
        a[0, n] = exp(T.Select(a[1, n] > T.float32(0), -a[1, n], a[1, n]))
    for n in T.vectorized(cols):
        a[1, n] = T.Select(a[1, n] > T.float32(0), T.float32(1), a[0, n]) / (T.float32(1) + a[0, n])


# X = gelu(X), ``rows`` rows of ``width`` columns.
@inline
def activate(X, rows, width):
    a = T.alloc_buffer((3, LANES), "float32", scope="local")
    for r in range(rows):
        for e in range(width // LANES):
            for x in T.vectorized(LANES):
                a[2, x] = X[r, e * LANES + x]
            sigmoid(a, 2, a, LANES)
            for x in T.vectorized(LANES):
                X[r, e * LANES + x] = a[2, x] * a[1, x]


# Z = gelu(H), L = its slope.
@inline
def slopes(H, Z, L, rows, width):
    a = T.alloc_buffer((3, LANES), "float32", scope="local")
    for r in range(rows):
        for e in range(width // LANES):
            for x in T.vectorized(LANES):
                a[2, x] = H[r, e * LANES + x]
            sigmoid(a, 2, a, LANES)
            for x in T.vectorized(LANES):
                Z[r, e * LANES + x] = a[2, x] * a[1, x]
            for x in T.vectorized(LANES):
                L[r, e * LANES + x] = a[1, x] + a[2, x] * a[1, x] * (T.float32(1) - a[1, x]) * rate(a[2, x])


# out = by * other * the second derivative of gelu at H: 2 s' + x s'' for gelu(x) = x s.
@inline
def curve(H, by, other, out, rows, width):
    a = T.alloc_buffer((3, LANES), "float32", scope="local")
    for r in range(rows):
        for e in range(width // LANES):
            for x in T.vectorized(LANES):
                a[2, x] = H[r, e * LANES + x]
            sigmoid(a, 2, a, LANES)
            for x in T.vectorized(LANES):
                a[0, x] = a[1, x] * (T.float32(1) - a[1, x])
            for x in T.vectorized(LANES):
                out[r, e * LANES + x] = (
                    by[r, e * LANES + x]
                    * other[r, e * LANES + x]
                    * a[0, x]
                    * (
                        T.float32(2) * rate(a[2, x])
                        + a[2, x]
                        * (
                            (T.float32(1) - T.float32(2) * a[1, x]) * rate(a[2, x]) * rate(a[2, x])
                            + T.float32(6 * _SLOPE * _CUBE) * a[2, x]
                        )
                    )
                )


# ``rows`` rows of ``width`` columns.
@inline
def copy(source, row, target, at, rows, width):
    for d in range(rows):
        for n in range(width // LANES):
            for x in T.vectorized(LANES):
                target[at + d, n * LANES + x] = source[row + d, n * LANES + x]


# The same, added to what is there.
@inline
def accumulate(source, row, target, at, rows, width):
    for d in range(rows):
        for n in range(width // LANES):
            for x in T.vectorized(LANES):
                target[at + d, n * LANES + x] = target[at + d, n * LANES + x] + source[row + d, n * LANES + x]


# target[r] += weight * source[s], ``width`` columns.
@inline
def add_row(target, r, weight, source, s, width):
    for e in range(width // LANES):
        for x in T.vectorized(LANES):
            target[r, e * LANES + x] = target[r, e * LANES + x] + weight * source[s, e * LANES + x]
