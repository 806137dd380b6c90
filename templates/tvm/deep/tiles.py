"""Register tiles of deep memories: products that finish with what follows while their sums are in registers.

A ``product`` has a tile for every number of rows that :func:`walk.tiles` asks for. It ends with what ``finish(rows,
cols)`` gives: ``f(acc, r0, n0)``, which TVMScript calls with the sums and where they belong. The functions below make
those.
"""

from tvm.script import tirx as T

from ..kernel import inline
from ..tiles import LANES

_SLOPE = 1.5957691216057308  # 2 sqrt(2 / pi): gelu(x) = x sigmoid(_SLOPE (x + _CUBE x^3)), the tanh form
_CUBE = 0.044715
_LOG2_E = 1.4426950408889634
_ROUND = 1.5 * 2**23 + 127
# The polynomial of degree 5 with the least relative error.
_POWER = (1.0000001, 0.69314694, 0.2402212, 0.05550713, 0.00967554, 0.0013276473)


def product(cols, unroll, finish, *, A, B, steps, a0=0, ac=0, b0=0, across=False, triangle=False):
    """Tiles of sum_{d < steps} A[a0 + d, ac + r] B[b0 + d, n], by their rows: for :func:`walk.tiles`.

    Elements of A are broadcast against whole vectors of B, in loops of ``unroll`` steps a turn. ``across``: of A's
    transpose, A[ac + r, a0 + d], without one in memory. ``triangle``: A is 0 for d > r.
    """

    def of(rows):
        def add(acc, r0, n0):
            here = T.min(r0 + rows, steps) if triangle else steps
            add_up(acc=acc, A=A, a0=a0, ac=ac + r0, B=B, b0=b0, bc=n0, steps=here)

        add_up = summed(rows, cols, unroll, across)
        return _tile(rows, cols, add, finish(rows, cols))

    return of


def products(cols, unroll, finish, *pairs, steps):
    """Tiles of sum_{d < steps} A[d, r] B[d, n] over pairs (A, B), by their rows."""

    def of(rows):
        def add(acc, r0, n0):
            for A, B in pairs:
                add_up(acc=acc, A=A, a0=0, ac=r0, B=B, b0=0, bc=n0, steps=steps)

        add_up = summed(rows, cols, unroll, False)
        return _tile(rows, cols, add, finish(rows, cols))

    return of


def in_turn(*products):
    """Of each place, the tiles of several products one after another."""

    def of(rows):
        every = [product(rows) for product in products]

        def tile(r0, n0):
            for one in every:
                one(r0, n0)

        return tile

    return of


def _tile(rows, cols, add, finish):
    """``tile(r0, n0)``: sums that begin at 0, ``add(acc, r0, n0)``, and what ends them."""

    @inline
    def tile(r0, n0):
        acc = T.alloc_buffer((rows, cols), "float32", scope="local")
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                acc[r, n] = T.float32(0)
        add(acc=acc, r0=r0, n0=n0)
        finish(acc=acc, r0=r0, n0=n0)

    return tile


def summed(rows, cols, unroll, across):
    """acc += sum_{d < steps} A[a0 + d, ac + r] B[b0 + d, bc + n]; or of A's transpose."""

    @inline
    def step(acc, A, a, ac, B, b, bc):
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                if across:
                    acc[r, n] = acc[r, n] + A[ac + r, a] * B[b, bc + n]
                else:
                    acc[r, n] = acc[r, n] + A[a, ac + r] * B[b, bc + n]

    @inline
    def add_up(acc, A, a0, ac, B, b0, bc, steps):
        for d in range(steps // unroll):
            for e in T.unroll(unroll):
                step(acc, A, a0 + d * unroll + e, ac, B, b0 + d * unroll + e, bc)
        for d in range(steps % unroll):
            step(acc, A, a0 + steps // unroll * unroll + d, ac, B, b0 + steps // unroll * unroll + d, bc)

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


def power(x):
    """2^x for x in [-1/2, 1/2]; its relative error is 2e-7."""
    value = T.float32(_POWER[-1])
    for coefficient in reversed(_POWER[:-1]):
        value = value * x + T.float32(coefficient)
    return value


# a[1] = sigmoid(_SLOPE (x + _CUBE x^3)) of x = row r of X: gelu(x) = x a[1]. a[0] is scratch.
#
# It is 1 / (1 + 2^p), 2^p = 2^k 2^f for the whole number k next to p. Adding _ROUND leaves k + 127 in the last bits of
# a float, and a shift makes them an exponent. A maximum of both would swallow NaN.
@inline
def sigmoid(X, r, a, cols):
    for n in T.vectorized(cols):
        a[0, n] = X[r, n] * (T.float32(-_SLOPE * _LOG2_E) + T.float32(-_SLOPE * _LOG2_E * _CUBE) * X[r, n] * X[r, n])
    for n in T.vectorized(cols):
        a[0, n] = T.Select(a[0, n] < T.float32(-126), T.float32(-126), a[0, n])
    for n in T.vectorized(cols):
        a[0, n] = T.Select(a[0, n] > T.float32(126), T.float32(126), a[0, n])
    for n in T.vectorized(cols):
        a[1, n] = a[0, n] + T.float32(_ROUND)
    for n in T.vectorized(cols):
        a[0, n] = power(a[0, n] - (a[1, n] - T.float32(_ROUND)))
    for n in T.vectorized(cols):
        a[1, n] = T.float32(1) / (
            T.float32(1) + a[0, n] * T.reinterpret("float32", T.reinterpret("int32", a[1, n]) << T.int32(23))
        )


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
