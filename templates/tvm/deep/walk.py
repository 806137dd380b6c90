"""One inner chunk of a deep memory's writes: its gradients, what its tokens read of it, and the state that it leaves.

All gradients of an inner chunk of b tokens are taken at the state that enters it (arXiv:2602.24281, Eq. 30-31, 34-36).
Within it every layer W, with input rows x_j and error rows e_j, obeys

    W_t = c_t W - d_t S - sum_{j <= t} c_tj x_j^T e_j

S being the momentum that enters. Rows of a chunk stand in arrays of BP rows, b in whole vectors; what is past its end
is zero. A state is U [Dk, E] and W [E, Dv], its momentum SU and SW.
"""

from functools import partial

from tvm.script import tirx as T

from ..kernel import Values, emit, f32, inline, scratch
from ..tiles import LANES, add_up, columns, exp, finite
from .tiles import activated_with_slope, in_turn, overwrite, product, scaled, subtract, weighted


def gates_of(plan, at) -> Values:
    """Scratch for the coefficients of a chunk: c_tj as CT[j, t], c_t and d_t; those of its end; gates by token."""
    return scratch(
        CT=f32(at.BP, at.BP),
        keep=f32(2, at.BP),  # c_t, d_t
        last=f32(2, at.BP),  # c_j of the chunk's end, and eta_j prod mu past j
        ends=f32(4),  # c, d and prod mu of the chunk's end; whether rows are all finite
        token=f32(3, at.BP + 1),  # e^g, mu, eta
        lanes=f32(2, LANES),
    )


def coefficients(plan, at, *, t0, rows) -> None:
    """c_t, d_t and c_tj of a chunk of ``rows`` tokens from ``t0`` on."""
    decays, momentum = plan.flags.decays, plan.flags.momentum
    token, lanes, CT, keep, last, ends = at.token, at.lanes, at.CT, at.keep, at.last, at.ends
    g, eta, mu, row0, heads = at.g, at.eta, at.mu, at.row0, at.heads
    tables = hasattr(at, "decay_since")  # a backward wants what the coefficients are made of

    @emit
    def table():
        for j in range(at.BP + 1):
            token[0, j] = T.float32(1)
            token[1, j] = T.float32(0)
            token[2, j] = T.float32(0)
        for j in range(rows):
            if decays:
                token[0, j] = exp(g[row0 + (t0 + j) * heads])
            if momentum:
                token[1, j] = mu[row0 + (t0 + j) * heads]
            token[2, j] = eta[row0 + (t0 + j) * heads]
        for tb in range(at.BP // LANES):
            for x in T.vectorized(LANES):
                lanes[0, x] = T.float32(0)
                lanes[1, x] = T.float32(0)
            for i in range(at.BP):
                j: T.let = at.BP - 1 - i
                # From the token that writes on to the later ones, whose gates do not reach it.
                for x in T.vectorized(LANES):
                    lanes[0, x] = T.Select(
                        tb * LANES + x > j, lanes[0, x] * token[0, j + 1],
                        T.Select(tb * LANES + x == j, T.float32(1), T.float32(0)),
                    )  # fmt: skip
                for x in T.vectorized(LANES):
                    lanes[1, x] = T.Select(
                        tb * LANES + x > j, lanes[0, x] + token[1, j + 1] * lanes[1, x],
                        T.Select(tb * LANES + x == j, T.float32(1), T.float32(0)),
                    )  # fmt: skip
                for x in T.vectorized(LANES):
                    CT[j, tb * LANES + x] = T.Select(tb * LANES + x >= j, token[2, j] * lanes[1, x], T.float32(0))
                if tables:
                    for x in T.vectorized(LANES):
                        at.decay_since[j, tb * LANES + x] = lanes[0, x]
                    for x in T.vectorized(LANES):
                        at.worth_since[j, tb * LANES + x] = lanes[1, x]
            for x in T.vectorized(LANES):
                keep[0, tb * LANES + x] = token[0, 0] * lanes[0, x]
                keep[1, tb * LANES + x] = token[1, 0] * lanes[1, x]
        ends[0] = keep[0, rows - 1]
        ends[1] = keep[1, rows - 1]
        ends[2] = T.float32(1)
        for j in range(at.BP):
            last[0, j] = CT[j, rows - 1]
            last[1, j] = T.float32(0)
        for i in range(rows):
            j: T.let = rows - 1 - i
            last[1, j] = token[2, j] * ends[2]
            if tables:
                at.momentum_since[j] = ends[2]
            ends[2] = ends[2] * token[1, j]


def rows_of(plan, at) -> Values:
    """Scratch for a chunk's rows: keys, errors of both layers, hidden units. Those with T have tokens in columns."""
    Dk, Dv, E, BP = plan.Dk, plan.Dv, plan.E, at.BP
    return scratch(
        K=f32(BP, Dk), KT=f32(Dk, BP), ERR=f32(BP, Dv), ERRT=f32(Dv, BP), Z=f32(BP, E), ZT=f32(E, BP), L=f32(BP, E),
        BACK=f32(BP, E), turned=f32(E, BP), O=f32(BP, Dv), P=f32(BP, BP),
    )  # fmt: skip


def take_rows(source, width, at, target, *, t0, rows) -> None:
    """Rows of the head at work from token ``t0`` on; zeros after ``rows`` of them."""
    row0, heads = at.row0, at.heads

    @emit
    def copies():
        for t in range(rows):
            for d in range(width // LANES):
                for x in T.vectorized(LANES):
                    target[t, d * LANES + x] = source[row0 + (t0 + t) * heads, d * LANES + x]
        for t in range(at.BP - rows):
            for d in range(width // LANES):
                for x in T.vectorized(LANES):
                    target[rows + t, d * LANES + x] = T.float32(0)


def put_rows(at, source, target, width, *, t0, rows) -> None:
    """The other way."""
    row0, heads = at.row0, at.heads

    @emit
    def copies():
        for t in range(rows):
            for d in range(width // LANES):
                for x in T.vectorized(LANES):
                    target[row0 + (t0 + t) * heads, d * LANES + x] = source[t, d * LANES + x]


def chunk_rows(inner):
    """BP: the rows of a chunk of ``inner`` tokens."""
    return (inner + LANES - 1) // LANES * LANES


def tiles(count, width, rows, cols, make, room=LANES) -> None:
    """Tiles of ``count`` rows and ``width`` columns: ``make(rows)`` is ``tile(r, n)`` of so many rows.

    Arrays have multiples of ``room`` rows, or ``count`` where it is fixed. Where ``rows`` do not divide that, some of
    the tiles have one row less: 16 rows are 6 + 5 + 5. The last one may reach over ``count``. Rows in the inner loop:
    what they share of the right factor stays in the first cache.
    """
    fixed = isinstance(count, int)
    split = (count if fixed else room) % rows
    number = (count + rows - 1) // rows
    least = count - number * (rows - 1)
    tall, low = (max(least, 0) if fixed else T.max(least, 0), rows - 1) if split else (number, rows)
    first, rest = make(rows), make(low) if split else None

    @emit
    def loops():
        for nn in range(width // cols):
            for rr in range(tall):
                first(rr * rows, nn * cols)
            if rest is not None:
                for rr in range(number - tall):
                    rest(tall * rows + rr * low, nn * cols)


def gradients(plan, at, *, t0, rows) -> None:
    """Error rows of both layers at the state that enters.

    H = K U, Z = gelu(H), ERR = -V or 2 (Z W (+ K) - V), BACK = RAW * L for RAW = ERR W^T and L = gelu'(H).
    """
    Dk, Dv, E, R, C, unroll, squared = plan.Dk, plan.Dv, plan.E, plan.WR, plan.WC, plan.unroll, plan.flags.momentum
    K, KT, ERR, Z, L = at.K, at.KT, at.ERR, at.Z, at.L
    activate = partial(activated_with_slope, Z=Z, S=L, X=at.H)
    hidden = product(C, unroll, activate, A=KT, B=at.U, steps=Dk)
    out = product(C, unroll, partial(overwrite, C=at.O), A=at.ZT, B=at.W, steps=E)
    pulled = dict(XT=at.ERRT, steps=Dv, state=at.W, width=E)

    @emit
    def rows_and_products():
        take_rows(at.k, Dk, at, K, t0=t0, rows=rows)
        take_rows(at.v, Dv, at, ERR, t0=t0, rows=rows)
        columns(K, Dk, 0, 1, 0, at.BP, KT)
        tiles(rows, E, R, C, hidden)
        columns(Z, E, 0, 1, 0, rows, at.ZT)
        if squared:
            tiles(rows, Dv, R, C, out)
            for t in range(rows):
                for n in range(Dv // LANES):
                    for x in T.vectorized(LANES):
                        ERR[t, n * LANES + x] = T.float32(2) * (at.O[t, n * LANES + x] - ERR[t, n * LANES + x])
                if at.adds_input > 0:
                    for n in range(plan.both // LANES):
                        for x in T.vectorized(LANES):
                            ERR[t, n * LANES + x] = ERR[t, n * LANES + x] + T.float32(2) * K[t, n * LANES + x]
        else:
            for t in range(rows):
                for n in range(Dv // LANES):
                    for x in T.vectorized(LANES):
                        ERR[t, n * LANES + x] = -ERR[t, n * LANES + x]
        columns(ERR, Dv, 0, 1, 0, at.BP, at.ERRT)
        times_transpose(plan, at, **pulled, out=at.BACK)
        keep_gradients(plan, at, t0=t0, rows=rows)
        multiply_rows(at.BACK, L, rows, E)


def keep_gradients(plan, at, *, t0, rows) -> None:
    """H, ERR and RAW, which BACK is so far, to where a backward finds them; a read of mixed parameters needs two."""
    mixes = plan.flags.mixes

    @emit
    def copies():
        if T.Or(mixes, at.keeps > 0):
            put_rows(at, at.H, at.rows_h, plan.E, t0=t0, rows=rows)
            put_rows(at, at.ERR, at.rows_err, plan.Dv, t0=t0, rows=rows)
        if at.keeps > 0:
            put_rows(at, at.BACK, at.rows_raw, plan.E, t0=t0, rows=rows)


def times_transpose(plan, at, *, XT, steps, state, width, out, first=0) -> None:
    """out[t] = x_t W^T, for ``width`` rows of W from ``first`` on; ``XT`` [steps, BP] has the x_t as columns.

    The product is that of W with columns x_t, so W is read as it is: what is transposed is the result.
    """
    R, turned = plan.AR, at.turned
    of_rows = product(
        LANES, plan.unroll, partial(overwrite, C=turned), across=True, A=state, ac=first, B=XT, steps=steps
    )

    @emit
    def both():
        tiles(width, at.BP, R, LANES, of_rows)
        columns(turned, at.BP, 0, 1, 0, width, out)


def read_layer(plan, at, *, XT, width, state, momentum, inputs, errors, out, cols, rows) -> None:
    """out[t] = x_t W_t of one layer: what enters, its momentum, and the rows of the chunk's tokens up to t.

    ``XT`` [width, BP] has queries as columns; so have ``inputs`` the layer's input rows. ``errors`` [BP, cols] are its
    error rows.
    """
    R, C, P = plan.WR, plan.WC, at.P
    fresh = partial(scaled, C=out, gate=at.keep, i=0, fresh=True)
    less = partial(scaled, C=out, gate=at.keep, i=1, negative=True)
    of_state = product(C, plan.unroll, fresh, A=XT, B=state, steps=width)
    of_momentum = product(C, plan.unroll, less, A=XT, B=momentum, steps=width)
    of_pairs = product(LANES, plan.unroll, partial(weighted, C=P, weights=at.CT), A=inputs, B=XT, steps=width)
    of_rows = product(C, plan.unroll, partial(subtract, C=out), A=P, B=errors, steps=rows, triangle=True)

    @emit
    def products():
        tiles(rows, cols, R, C, of_state)
        if plan.flags.momentum:
            if at.carries > 0:
                tiles(rows, cols, R, C, of_momentum)
        tiles(rows, at.BP, R, LANES, of_pairs)
        add_up(errors, rows, cols, at.sum_of_rows)
        if finite(at.sum_of_rows[0]):
            tiles(rows, cols, R, C, of_rows)
        else:
            # Tiles go beyond the diagonal, where a weight is 0 but a row may be NaN.
            for t in range(rows):
                for j in range(t + 1):
                    for n in range(cols // LANES):
                        for x in T.vectorized(LANES):
                            out[t, n * LANES + x] = out[t, n * LANES + x] - P[j, t] * errors[j, n * LANES + x]


def leave_layer(plan, at, *, inputs, width, errors, cols, state, momentum, rows, first=0, to=0) -> None:
    """The state and the momentum of a layer at the chunk's end: c W - d S - sum_j c_j x_j^T e_j, and S alike.

    Both begin at row ``first``, and are left from row ``to`` on.
    """
    C, ends, X, Y = plan.WC, at.ends, at.weighed, getattr(at, "carried", None)
    leave = partial(left, W=state, ends=ends, first=first, to=to)
    gather = partial(carried, S=momentum, ends=ends, first=first, to=to)
    alone = product(C, plan.unroll, partial(leave, S=None), A=X, B=errors, steps=rows)
    # The state first: it takes the momentum that entered.
    both = in_turn(
        product(C, plan.unroll, partial(leave, S=momentum), A=X, B=errors, steps=rows),
        product(C, plan.unroll, gather, A=Y, B=errors, steps=rows),
    )
    update_layer(plan, at, weights=at.last, inputs=inputs, width=width, cols=cols, rows=rows, alone=alone, both=both)


def update_layer(plan, at, *, weights, inputs, width, cols, rows, alone, both) -> None:
    """Tiles ``both`` of a layer's state and momentum, ``alone`` of the state where there is no momentum.

    Before them the inputs are weighed, into ``weighed`` for the state and ``carried`` for the momentum.
    """
    R, C = plan.WR, plan.WC

    @emit
    def updates():
        weigh_rows(weights, inputs=inputs, width=width, by=0, rows=rows, out=at.weighed)
        if plan.flags.momentum:
            if at.carries > 0:
                weigh_rows(weights, inputs=inputs, width=width, by=1, rows=rows, out=at.carried)
                tiles(width, cols, R, C, both)
            else:
                tiles(width, cols, R, C, alone)
        else:
            tiles(width, cols, R, C, alone)


def left(rows, cols, W, ends, S, first, to):
    """W' = c W - acc, or c W - d S - acc."""

    @inline
    def finish(acc, r0, n0):
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                if S is None:
                    W[to + r0 + r, n0 + n] = ends[0] * W[first + r0 + r, n0 + n] - acc[r, n]
                else:
                    W[to + r0 + r, n0 + n] = (
                        ends[0] * W[first + r0 + r, n0 + n] - ends[1] * S[first + r0 + r, n0 + n] - acc[r, n]
                    )

    return finish


def carried(rows, cols, S, ends, first, to):
    """S' = p S + acc."""

    @inline
    def finish(acc, r0, n0):
        for r in T.unroll(rows):
            for n in T.vectorized(cols):
                S[to + r0 + r, n0 + n] = ends[2] * S[first + r0 + r, n0 + n] + acc[r, n]

    return finish


def weigh_rows(weights, *, inputs, width, by, rows, out) -> None:
    """Rows times what each weighs: of inputs, what it is worth at the chunk's end."""

    @emit
    def products():
        for j in range(rows):
            for d in range(width // LANES):
                for x in T.vectorized(LANES):
                    out[j, d * LANES + x] = weights[by, j] * inputs[j, d * LANES + x]


# X *= Y, ``rows`` rows of ``width`` columns.
@inline
def multiply_rows(X, Y, rows, width):
    for t in range(rows):
        for e in range(width // LANES):
            for x in T.vectorized(LANES):
                X[t, e * LANES + x] = X[t, e * LANES + x] * Y[t, e * LANES + x]
