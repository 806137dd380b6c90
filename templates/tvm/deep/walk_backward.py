"""One inner chunk of a deep memory backwards.

From the gradients of what it leaves and of what its tokens read, those of the state that enters it, of its rows and of
its coefficients. The names are those of :mod:`walk`; a leading d is a gradient's.

A layer W with input rows x_j and error rows e_j is read by rows q_t, whose outputs have gradients r_t,

    y_t = keep0_t q_t W - keep1_t q_t S - sum_{j <= t} c_tj (x_j . q_t) e_j

and left as W' = c W - d S - sum_j l_j x_j^T e_j, S' = p S + sum_j m_j x_j^T e_j. The rows e of both layers are made
from the state that enters (second-order terms): see :func:`gradients_backward`.
"""

from functools import partial

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, inline, scratch
from ..tiles import LANES, add_up, columns, finite
from .tiles import add_row, in_turn, overwrite, product, products, subtract
from .walk import tiles, times_transpose, update_layer


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
    plan, at, *, X, XT, width, state, momentum, first, inputs, inputsT, errors, errorsT, R, RT, cols, rows, dX, dinputs,
    derrors,
) -> None:  # fmt: skip
    """Gradients of one layer's read. ``X`` are the rows q_t, ``R`` the rows r_t; each has its columns beside it.

    dX is overwritten; to dinputs, derrors and the coefficients' gradients what follows is added. Those of the state and
    of the momentum are left to :func:`enter_layer_backward`.
    """
    A, P, Q = plan.WR, at.P, at.P2
    of_inputs = product(LANES, plan.unroll, partial(overwrite, C=P), A=inputsT, B=XT, steps=width)
    of_errors = product(LANES, plan.unroll, partial(overwrite, C=Q), A=errorsT, B=RT, steps=cols)

    @emit
    def gradients():
        read_entering(plan, at, by=0, of=state, first=first, XT=XT, RT=RT, width=width, cols=cols)
        if plan.flags.momentum:
            if at.carries > 0:
                read_entering(plan, at, by=1, of=momentum, first=first, XT=XT, RT=RT, width=width, cols=cols)
        columns(at.turned, at.BP, 0, 1, 0, width, dX)
        tiles(rows, at.BP, A, LANES, of_inputs)
        tiles(rows, at.BP, A, LANES, of_errors)
        weigh_pairs(plan, at, rows=rows)
        # P[j, t] = c_tj (x_j . q_t), Q[j, t] = c_tj (e_j . r_t), zero where t < j.
        earlier(plan, at, weights=Q, source=inputs, width=width, out=dX, rows=rows)
        later(plan, at, weights=Q, source=X, width=width, out=dinputs, rows=rows)
        later(plan, at, weights=P, source=R, width=cols, out=derrors, rows=rows)


def read_entering(plan, at, *, by, of, first, XT, RT, width, cols) -> None:
    """turned = keep0 W r, and dkeep0 += <q, W r>; or of the momentum, by = 1, minus those with keep1.

    Columns are tokens; those past the chunk's end are of no use to anyone. Without ``XT`` there is no dkeep.
    """
    turned, keep, dkeep = at.turned, at.keep, getattr(at, "dkeep", None)

    def entering(rows, lanes):
        @inline
        def finish(acc, r0, n0):
            for r in T.unroll(rows):
                for n in T.vectorized(lanes):
                    if by == 0:
                        turned[r0 + r, n0 + n] = keep[0, n0 + n] * acc[r, n]
                    else:
                        turned[r0 + r, n0 + n] = turned[r0 + r, n0 + n] - keep[1, n0 + n] * acc[r, n]
                if XT is not None:
                    for n in T.vectorized(lanes):
                        if by == 0:
                            dkeep[0, n0 + n] = dkeep[0, n0 + n] + XT[r0 + r, n0 + n] * acc[r, n]
                        else:
                            dkeep[1, n0 + n] = dkeep[1, n0 + n] - XT[r0 + r, n0 + n] * acc[r, n]

        return finish

    of_rows = product(LANES, plan.unroll, entering, across=True, A=of, ac=first, B=RT, steps=cols)
    tiles(width, at.BP, plan.AR, LANES, of_rows)


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
    of_rows = product(C, plan.unroll, partial(subtract, C=out), A=weights, B=source, steps=rows, triangle=True)

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
    of_rows = product(C, plan.unroll, partial(subtract, C=out), A=turned, B=source, steps=rows)

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


# --- a layer that is left


def leave_layer_backward(
    plan, at, *, inputs, inputsT, width, errors, errorsT, cols, state, momentum, first, dstate, dmomentum, dinputs,
    derrors, rows,
) -> None:  # fmt: skip
    """Gradients of c W - d S - sum_j l_j x_j^T e_j and of S', but for those of what enters."""
    A, C, V, Y, dends = plan.WR, plan.WC, at.weighed, at.carried, at.dends
    of_inputs = partial(product, C, plan.unroll, partial(overwrite, C=V), A=inputsT, steps=width)
    pulled = dict(XT=errorsT, steps=cols, width=width, out=Y)

    @emit
    def gradients():
        tiles(rows, cols, A, C, of_inputs(B=dstate))
        by_rows(plan, at, V=V, errors=errors, derrors=derrors, cols=cols, by=0, rows=rows)
        times_transpose(plan, at, **pulled, state=dstate)
        add_weighed(dinputs, at.last, 0, Y, rows, width, T.float32(-1))
        if plan.flags.momentum:
            if at.carries > 0:
                tiles(rows, cols, A, C, of_inputs(B=dmomentum))
                by_rows(plan, at, V=V, errors=errors, derrors=derrors, cols=cols, by=1, rows=rows)
                times_transpose(plan, at, **pulled, state=dmomentum)
                add_weighed(dinputs, at.last, 1, Y, rows, width, T.float32(1))
                inner(dends, 1, dstate, momentum, first, width, cols, at.back, T.float32(-1))
                inner(dends, 2, dmomentum, momentum, first, width, cols, at.back, T.float32(1))
        if plan.flags.decays:
            inner(dends, 0, dstate, state, first, width, cols, at.back, T.float32(1))


# X[j] += sign weights[by, j] Y[j].
@inline
def add_weighed(X, weights, by, Y, rows, width, sign):
    for j in range(rows):
        for d in range(width // LANES):
            for x in T.vectorized(LANES):
                X[j, d * LANES + x] = X[j, d * LANES + x] + sign * weights[by, j] * Y[j, d * LANES + x]


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


# total[at] += sign <X, Y>, Y from row ``first`` on.
@inline
def inner(total, at, X, Y, first, rows, width, lanes, sign):
    for x in T.vectorized(LANES):
        lanes[2, x] = T.float32(0)
    for d in range(rows):
        for e in range(width // LANES):
            for x in T.vectorized(LANES):
                lanes[2, x] = lanes[2, x] + X[d, e * LANES + x] * Y[first + d, e * LANES + x]
    for x in T.unroll(LANES):
        total[at] = total[at] + sign * lanes[2, x]


# --- what enters


def enter_layer_backward(plan, at, *, X, R, width, cols, dstate, dmomentum, pairs, rows) -> None:
    """From the gradients of what a chunk leaves of a layer, and of its reads, those of what enters.

    dW = c dW' + sum_t keep0_t q_t^T r_t + sum_t a_t^T b_t over ``pairs`` of rows (a, b), the second-order terms;
    dS = p dS' - d dW' - sum_t keep1_t q_t^T r_t.
    """
    C, ends, kept, carried = plan.WC, at.ends, at.weighed, at.carried
    alone = products(C, plan.unroll, partial(entered, dW=dstate, ends=ends), (kept, R), *pairs, steps=rows)
    momentum = partial(entered_momentum, dS=dmomentum, dW=dstate, ends=ends)
    # The momentum first: it takes the state's gradient from after the chunk.
    both = in_turn(products(C, plan.unroll, momentum, (carried, R), steps=rows), alone)
    update_layer(plan, at, weights=at.keep, inputs=X, width=width, cols=cols, rows=rows, alone=alone, both=both)


def entered(rows, cols, dW, ends):
    """dW = c dW' + acc."""

    @inline
    def finish(acc, r0, n0):
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                dW[r0 + r, n0 + n] = ends[0] * dW[r0 + r, n0 + n] + acc[r, n]

    return finish


def entered_momentum(rows, cols, dS, dW, ends):
    """dS = p dS' - d dW' - acc."""

    @inline
    def finish(acc, r0, n0):
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                dS[r0 + r, n0 + n] = ends[2] * dS[r0 + r, n0 + n] - ends[1] * dW[r0 + r, n0 + n] - acc[r, n]

    return finish
