"""One inner chunk of a deep memory backwards.

From the gradients of what it leaves and of what its tokens read, those of the state that enters it, of its rows and of
its coefficients. The names are those of :mod:`walk`; a leading d is a gradient's.

A layer W with input rows x_j and error rows e_j is read by rows q_t, whose outputs have gradients r_t,

    y_t = keep0_t q_t W - keep1_t q_t S - sum_{j <= t} c_tj (x_j . q_t) e_j

and left as W' = c W - d S - sum_j l_j x_j^T e_j, S' = p S + sum_j m_j x_j^T e_j. The rows e of both layers are made
from the state that enters (second-order terms): see :func:`gradients_backward`.
"""

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, inline, scratch
from ..tiles import LANES, add_up, columns, finite
from .tiles import add, add_row, blend, overwrite, product, scaled, subtract
from .walk import tiles


def coefficient_gradients(plan, at) -> Values:
    """Scratch for the gradients of a chunk's coefficients, and what they are made of."""
    return scratch(
        dCT=f32(at.BP, at.BP),
        dkeep=f32(2, at.BP),
        dlast=f32(2, at.BP),  # of l_j and m_j
        dends=f32(3),  # of c, d and p
        back=f32(4, LANES),  # gradients of G and of w, as they go down; sums
    )


# --- a layer that is read


def read_layer_backward(
    plan, at, *, X, XT, width, state, stateT, momentum, momentumT, inputs, inputsT, errors, errorsT, R, RT, cols, rows,
    dX, dstate, dmomentum, dinputs, derrors,
) -> None:  # fmt: skip
    """Gradients of one layer's read. ``X`` are the rows q_t, ``R`` the rows r_t; each has its columns beside it.

    dX is overwritten; to dstate, dmomentum, dinputs, derrors and the coefficients' gradients what follows is added.
    """
    A, C, P, Q = plan.WR, plan.WC, at.P, at.P2
    carried = product(A, C, plan.unroll, overwrite(A, C, dX))
    pair = product(A, LANES, plan.unroll, overwrite(A, LANES, P))
    pull = product(A, LANES, plan.unroll, overwrite(A, LANES, Q))

    def of_state(r, n):
        carried(A=RT, a0=0, ac=r, B=stateT, b0=0, bc=n, steps=cols, r0=r, n0=n)

    def of_inputs(r, n):
        pair(A=inputsT, a0=0, ac=r, B=XT, b0=0, bc=n, steps=width, r0=r, n0=n)

    def of_errors(r, n):
        pull(A=errorsT, a0=0, ac=r, B=RT, b0=0, bc=n, steps=cols, r0=r, n0=n)

    @emit
    def gradients():
        tiles(rows, width, A, C, of_state)
        weigh_entering(plan, at, X=X, dX=dX, width=width, rows=rows)
        if plan.flags.momentum:
            if at.carries > 0:
                read_momentum(plan, at, X=X, RT=RT, momentumT=momentumT, dX=dX, width=width, cols=cols, rows=rows)
        tiles(rows, at.BP, A, LANES, of_inputs)
        tiles(rows, at.BP, A, LANES, of_errors)
        weigh_pairs(plan, at, rows=rows)
        # P[j, t] = c_tj (x_j . q_t), Q[j, t] = c_tj (e_j . r_t), zero where t < j.
        earlier(plan, at, weights=Q, source=inputs, width=width, out=dX, rows=rows)
        later(plan, at, weights=Q, source=X, width=width, out=dinputs, rows=rows)
        later(plan, at, weights=P, source=R, width=cols, out=derrors, rows=rows)
        outer(plan, at, X=X, width=width, by=0, R=R, cols=cols, out=dstate, rows=rows)
        if plan.flags.momentum:
            if at.carries > 0:
                outer(plan, at, X=X, width=width, by=1, R=R, cols=cols, out=dmomentum, rows=rows)


def weigh_entering(plan, at, *, X, dX, width, rows) -> None:
    """dX = keep0 dX, and dkeep0 += <q, dX>, for dX = r W^T."""
    dkeep, keep, lanes = at.dkeep, at.keep, at.back

    @emit
    def by_row():
        for t in range(rows):
            dot(X, dX, t, width, lanes)
            dkeep[0, t] = dkeep[0, t] + lanes[3, 0]
            for d in range(width // LANES):
                for x in T.vectorized(LANES):
                    dX[t, d * LANES + x] = keep[0, t] * dX[t, d * LANES + x]


def read_momentum(plan, at, *, X, RT, momentumT, dX, width, cols, rows) -> None:
    """dX -= keep1 r S^T, and dkeep1 -= <q, r S^T>."""
    A, C, dkeep, keep, lanes, Y = plan.WR, plan.WC, at.dkeep, at.keep, at.back, at.weighed
    carried = product(A, C, plan.unroll, overwrite(A, C, Y))

    def of_momentum(r, n):
        carried(A=RT, a0=0, ac=r, B=momentumT, b0=0, bc=n, steps=cols, r0=r, n0=n)

    @emit
    def by_row():
        tiles(rows, width, A, C, of_momentum)
        for t in range(rows):
            dot(X, Y, t, width, lanes)
            dkeep[1, t] = dkeep[1, t] - lanes[3, 0]
            for d in range(width // LANES):
                for x in T.vectorized(LANES):
                    dX[t, d * LANES + x] = dX[t, d * LANES + x] - keep[1, t] * Y[t, d * LANES + x]


# lanes[3, 0] = <X[t], Y[t]>.
@inline
def dot(X, Y, t, width, lanes):
    for x in T.vectorized(LANES):
        lanes[2, x] = T.float32(0)
    for e in range(width // LANES):
        for x in T.vectorized(LANES):
            lanes[2, x] = lanes[2, x] + X[t, e * LANES + x] * Y[t, e * LANES + x]
    lanes[3, 0] = T.float32(0)
    for x in T.unroll(LANES):
        lanes[3, 0] = lanes[3, 0] + lanes[2, x]


def weigh_pairs(plan, at, *, rows) -> None:
    """dc_tj -= P Q where t >= j; then both times c_tj, and 0 elsewhere."""
    P, Q, CT, dCT = at.P, at.P2, at.CT, at.dCT

    @emit
    def by_row():
        for j in range(rows):
            for tb in range(at.BP // LANES):
                for x in T.vectorized(LANES):
                    t = T.meta_var(tb * LANES + x)
                    dCT[j, t] = T.Select(
                        T.And(t >= j, t < rows), dCT[j, t] - P[j, t] * Q[j, t], dCT[j, t]
                    )  # fmt: skip
                for x in T.vectorized(LANES):
                    t = T.meta_var(tb * LANES + x)
                    P[j, t] = T.Select(T.And(t >= j, t < rows), CT[j, t] * P[j, t], T.float32(0))
                for x in T.vectorized(LANES):
                    t = T.meta_var(tb * LANES + x)
                    Q[j, t] = T.Select(T.And(t >= j, t < rows), CT[j, t] * Q[j, t], T.float32(0))


def earlier(plan, at, *, weights, source, width, out, rows) -> None:
    """out_t -= sum_{j <= t} weights[j, t] source_j."""
    A, C = plan.WR, plan.WC
    tile = product(A, C, 1, subtract(A, C, out))

    def of_rows(r, n):
        tile(A=weights, a0=0, ac=r, B=source, b0=0, bc=n, steps=T.min(r + A, rows), r0=r, n0=n)

    @emit
    def sums():
        add_up(source, rows, width, at.sum_of_rows)
        if finite(at.sum_of_rows[0]):
            tiles(rows, width, A, C, of_rows)
        else:
            for t in range(rows):
                for j in range(t + 1):
                    for d in range(width // LANES):
                        for x in T.vectorized(LANES):
                            out[t, d * LANES + x] = out[t, d * LANES + x] - weights[j, t] * source[j, d * LANES + x]


def later(plan, at, *, weights, source, width, out, rows) -> None:
    """out_j -= sum_{t >= j} weights[j, t] source_t."""
    A, C, turned = plan.WR, plan.WC, at.PT
    tile = product(A, C, 1, subtract(A, C, out))

    def of_rows(r, n):
        tile(A=turned, a0=0, ac=r, B=source, b0=0, bc=n, steps=rows, r0=r, n0=n)

    @emit
    def sums():
        add_up(source, rows, width, at.sum_of_rows)
        if finite(at.sum_of_rows[0]):
            columns(weights, at.BP, 0, 1, 0, rows, turned)
            tiles(rows, width, A, C, of_rows)
        else:
            for j in range(rows):
                for t in range(rows - j):
                    add_row(out, j, -weights[j, j + t], source, j + t, width)


def outer(plan, at, *, X, width, by, R, cols, out, rows) -> None:
    """out += sum_t keep0_t q_t^T r_t; or of the momentum, by = 1, minus that with keep1."""
    A, C, keep, Y = plan.WR, plan.WC, at.keep, at.weighed
    tile = product(A, C, 1, (subtract if by else add)(A, C, out))

    def of_rows(r, n):
        tile(A=Y, a0=0, ac=r, B=R, b0=0, bc=n, steps=rows, r0=r, n0=n)

    @emit
    def sums():
        for t in range(rows):
            for d in range(width // LANES):
                for x in T.vectorized(LANES):
                    Y[t, d * LANES + x] = keep[by, t] * X[t, d * LANES + x]
        tiles(width, cols, A, C, of_rows)


# --- a layer that is left


def leave_layer_backward(
    plan, at, *, inputs, inputsT, width, errors, errorsT, cols, state, momentum, dstate, dstateT, dmomentum, dmomentumT,
    dinputs, derrors, rows,
) -> None:  # fmt: skip
    """Gradients of c W - d S - sum_j l_j x_j^T e_j and of S'; dstate and dmomentum become those of what enters."""
    A, C, V, ends, dends = plan.WR, plan.WC, at.weighed, at.ends, at.dends
    of_inputs = product(A, C, plan.unroll, overwrite(A, C, V))

    def read_gradient(source):
        def tile(r, n):
            of_inputs(A=inputsT, a0=0, ac=r, B=source, b0=0, bc=n, steps=width, r0=r, n0=n)

        return tile

    def pull_gradient(by, turned, negative):
        tile = product(A, C, plan.unroll, scaled(A, C, dinputs, at.last, by, negative=negative))
        return lambda r, n: tile(A=errorsT, a0=0, ac=r, B=turned, b0=0, bc=n, steps=cols, r0=r, n0=n)

    @emit
    def gradients():
        columns(dstate, cols, 0, 1, 0, width, dstateT)
        tiles(rows, cols, A, C, read_gradient(dstate))
        by_rows(plan, at, V=V, errors=errors, derrors=derrors, cols=cols, by=0, rows=rows)
        tiles(rows, width, A, C, pull_gradient(0, dstateT, True))
        if plan.flags.momentum:
            if at.carries > 0:
                columns(dmomentum, cols, 0, 1, 0, width, dmomentumT)
                tiles(rows, cols, A, C, read_gradient(dmomentum))
                by_rows(plan, at, V=V, errors=errors, derrors=derrors, cols=cols, by=1, rows=rows)
                tiles(rows, width, A, C, pull_gradient(1, dmomentumT, False))
                inner(dends, 1, dstate, momentum, width, cols, at.back, T.float32(-1))
                inner(dends, 2, dmomentum, momentum, width, cols, at.back, T.float32(1))
                blend(dmomentum, ends[2], dstate, -ends[1], width, cols)
        if plan.flags.decays:
            inner(dends, 0, dstate, state, width, cols, at.back, T.float32(1))
            for d in range(width):
                for n in range(cols // LANES):
                    for x in T.vectorized(LANES):
                        dstate[d, n * LANES + x] = ends[0] * dstate[d, n * LANES + x]


def by_rows(plan, at, *, V, errors, derrors, cols, by, rows) -> None:
    """de_j -= l_j v_j and dl_j -= <v_j, e_j>, for v_j = x_j dW'; with m_j both are added."""
    last, dlast, lanes = at.last, at.dlast, at.back

    @emit
    def each():
        for j in range(rows):
            dot(V, errors, j, cols, lanes)
            if by == 0:
                dlast[0, j] = dlast[0, j] - lanes[3, 0]
                for n in range(cols // LANES):
                    for x in T.vectorized(LANES):
                        derrors[j, n * LANES + x] = derrors[j, n * LANES + x] - last[0, j] * V[j, n * LANES + x]
            else:
                dlast[1, j] = dlast[1, j] + lanes[3, 0]
                for n in range(cols // LANES):
                    for x in T.vectorized(LANES):
                        derrors[j, n * LANES + x] = derrors[j, n * LANES + x] + last[1, j] * V[j, n * LANES + x]


# total[at] += sign <X, Y>.
@inline
def inner(total, at, X, Y, rows, width, lanes, sign):
    for x in T.vectorized(LANES):
        lanes[2, x] = T.float32(0)
    for d in range(rows):
        for e in range(width // LANES):
            for x in T.vectorized(LANES):
                lanes[2, x] = lanes[2, x] + X[d, e * LANES + x] * Y[d, e * LANES + x]
    for x in T.unroll(LANES):
        total[at] = total[at] + sign * lanes[2, x]
