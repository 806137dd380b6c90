"""What ``deep_decode`` writes for one token: the gradient at the inner chunk's start, both layers, the cache."""

from functools import partial

from tvm.script import tirx as T

from ..decode_tiles import dots, over_columns, read
from ..kernel import emit, f32, inline, scratch
from ..tiles import LANES, exp
from .tiles import rate, sigmoid

_DOTS = 8
"""Rows of a layer whose inner products are in flight together."""


def gradient(plan, at) -> None:
    """Input and error rows of both layers at the state that entered the inner chunk, which the token may open."""
    Dk, Dv, E, b, h, token = plan.Dk, plan.Dv, plan.E, at.b, at.h, at.token
    K, ZK, BACK, ERR, part = at.K, at.ZK, at.BACK, at.ERR, at.part

    @emit
    def rows():
        if at.seen % at.inner == 0:
            copy_layer(at.online_up, at.start_up, b, h, Dk, E)
            copy_layer(at.online_down, at.start_down, b, h, E, Dv)
        step_of(plan, at)
        for d in range(Dk):
            K[0, d] = at.k[b, token, h, d]
        for e in range(E):
            ZK[0, e] = T.float32(0)
        read_start(plan, at, start=at.start_up, width=Dk, cols=E, Q=K, Y=ZK)
        slope_of(ZK, BACK, E)
        for n in range(Dv):
            ERR[0, n] = -at.v[b, token, h, n]
        if plan.flags.momentum:
            read_start(plan, at, start=at.start_down, width=E, cols=Dv, Q=ZK, Y=ERR)
            if at.adds_input > 0:
                for n in range(plan.both):
                    ERR[0, n] = ERR[0, n] + K[0, n]
            for n in range(Dv):
                ERR[0, n] = T.float32(2) * ERR[0, n]
        backs(plan, at, out=part)
        for e in range(E):
            BACK[0, e] = BACK[0, e] * part[0, e]


def step_of(plan, at) -> None:
    """step = e^g, mu, eta of the token."""
    b, h, token, step = at.b, at.h, at.token, at.step

    @emit
    def gates():
        step[0] = exp(at.g[b, token, h]) if plan.flags.decays else T.float32(1)
        step[1] = at.mu[b, token, h] if plan.flags.momentum else T.float32(0)
        step[2] = at.eta[b, token, h]


def read_start(plan, at, *, start, width, cols, Q, Y) -> None:
    """Y += Q W, for the layer W at the chunk's start."""
    make = partial(read, 1, plan.rows, 1, Dk=width, ahead=0, routed=False, sparse=False)

    def columns(tile, y0, n0):
        tile(states=start, b=at.b, h=at.h, first=0, chosen=at.chosen_of, Q=Q, gates=at.one, Y=Y, y0=y0, n0=n0)

    over_columns(width=cols, cols=plan.cols, c0=0, make=make, body=columns)


def backs(plan, at, *, out) -> None:
    """out = ERR W^T, for the second layer W at the chunk's start."""
    E, b, h, start, ERR = plan.E, at.b, at.h, at.start_down, at.ERR

    @emit
    def products():
        for i in range((E + _DOTS - 1) // _DOTS):
            sums = T.meta_var(scratch(sums=f32(_DOTS, LANES, scope="local")).sums)
            dots(
                sums,
                count=_DOTS,
                width=plan.Dv,
                row=lambda r, n: start[b, h, 0, T.min(i * _DOTS + r, E - 1), n],
                vector=lambda n: ERR[0, n],
            )
            for r in T.unroll(_DOTS):
                if i * _DOTS + r < E:
                    out[0, i * _DOTS + r] = sums[r, 0]


def write_layer(plan, at, *, up, key, error, query, out) -> None:
    """A layer and its momentum after the token; out += query times the layer."""
    width, cols = (plan.Dk, plan.E) if up else (plan.E, plan.Dv)
    state, momentum = (at.online_up, at.momentum_up) if up else (at.online_down, at.momentum_down)
    make = partial(advance, width=width, decays=plan.flags.decays, carries=plan.flags.momentum)

    def columns(tile, y0, n0):
        tile(state, momentum, at.b, at.h, key, error, query, at.step, out, n0)

    over_columns(width=cols, cols=plan.cols, c0=0, make=make, body=columns)


def advance(lanes, width, decays, carries):
    """S = mu S + eta key^T error, W = e^g W - S in the columns n0 to n0 + lanes; out += query W."""

    @inline
    def tile(state, momentum, b, h, key, error, query, step, out, n0):
        acc = T.alloc_buffer((1, lanes), "float32", scope="local")
        s = T.alloc_buffer((2, lanes), "float32", scope="local")
        for x in T.vectorized(lanes):
            acc[0, x] = T.float32(0)
        for d in range(width):
            for x in T.vectorized(lanes):
                s[0, x] = step[2] * key[0, d] * error[0, n0 + x]
            if carries:
                for x in T.vectorized(lanes):
                    s[0, x] = s[0, x] + step[1] * momentum[b, h, 0, d, n0 + x]
                for x in T.vectorized(lanes):
                    momentum[b, h, 0, d, n0 + x] = s[0, x]
            for x in T.vectorized(lanes):
                if decays:
                    s[1, x] = step[0] * state[b, h, 0, d, n0 + x] - s[0, x]
                else:
                    s[1, x] = state[b, h, 0, d, n0 + x] - s[0, x]
            for x in T.vectorized(lanes):
                state[b, h, 0, d, n0 + x] = s[1, x]
            for x in T.vectorized(lanes):
                acc[0, x] = acc[0, x] + query[0, d] * s[1, x]
        for x in T.vectorized(lanes):
            out[0, n0 + x] = out[0, n0 + x] + acc[0, x]

    return tile


def append(plan, at, *, b, h, slot) -> None:
    """The online state becomes the cache's next; it starts again, or goes on under ``checkpoint``."""
    Dk, Dv, E, key_sum, descriptors = plan.Dk, plan.Dv, plan.E, at.key_sum, at.descriptors

    @emit
    def rows():
        for d in range(Dk):
            descriptors[b, h, slot, d] = key_sum[b, h, d] / T.cast(at.length, "float32")
            key_sum[b, h, d] = T.float32(0)
        cache_layer(at.online_up, at.up, b, h, slot, Dk, E)
        cache_layer(at.online_down, at.down, b, h, slot, E, Dv)
        if not plan.flags.checkpoint:
            start_layer(at.W_up, at.online_up, b, h, Dk, E)
            start_layer(at.W_down, at.online_down, b, h, E, Dv)
            if plan.flags.momentum:
                clear_layer(at.momentum_up, b, h, Dk, E)
                clear_layer(at.momentum_down, b, h, E, Dv)


@inline
def copy_layer(source, target, b, h, rows, cols):
    for d in range(rows):
        for n in range(cols):
            target[b, h, 0, d, n] = source[b, h, 0, d, n]


@inline
def cache_layer(source, target, b, h, slot, rows, cols):
    for d in range(rows):
        for n in range(cols):
            target[b, h, slot, d, n] = source[b, h, 0, d, n]


@inline
def start_layer(source, target, b, h, rows, cols):
    for d in range(rows):
        for n in range(cols):
            target[b, h, 0, d, n] = source[h, d, n]


@inline
def clear_layer(target, b, h, rows, cols):
    for d in range(rows):
        for n in range(cols):
            target[b, h, 0, d, n] = T.float32(0)


# X = gelu(X) of one row.
@inline
def units(X, width):
    a = T.alloc_buffer((3, LANES), "float32", scope="local")
    for e in range((width + LANES - 1) // LANES):
        for x in T.unroll(LANES):
            a[2, x] = X[0, T.min(e * LANES + x, width - 1)]
        sigmoid(a, 2, a, LANES)
        for x in T.unroll(LANES):
            if e * LANES + x < width:
                X[0, e * LANES + x] = a[2, x] * a[1, x]


# Z = gelu(Z), L = its slope, of one row.
@inline
def slope_of(Z, L, width):
    a = T.alloc_buffer((3, LANES), "float32", scope="local")
    for e in range((width + LANES - 1) // LANES):
        for x in T.unroll(LANES):
            a[2, x] = Z[0, T.min(e * LANES + x, width - 1)]
        sigmoid(a, 2, a, LANES)
        for x in T.unroll(LANES):
            if e * LANES + x < width:
                Z[0, e * LANES + x] = a[2, x] * a[1, x]
                L[0, e * LANES + x] = a[1, x] + a[2, x] * a[1, x] * (T.float32(1) - a[1, x]) * rate(a[2, x])
