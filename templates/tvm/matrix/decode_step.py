"""New tokens of a linear or SWLA Memory Caching layer over its cache (Eq. 2, 4, 6-17, 26-27), float32, on a CPU.

Token by token: write, read, and at a segment's end append the state and the mean key to the cache:

    M_t = e^{g_t} M_{t-1} + beta_t k_{t-1}^T v_{t-1} + lam_t k_t^T v_t          linear: M_t = M_{t-1} + k_t^T v_t
    y_t = gamma_t^(s) (q_t M_t) + sum_{i < s} gamma_t^(i) (q_t M^(i))

One task is a head, or one of ``split`` groups of its value columns. Tokens between two segment boundaries see the same
cached states: a tile of TOKENS reads each of them once, in place, and walks once over the rows of the online state. A
single token, and ssc, where every token reads states of its own, go one at a time.

For a linear memory the soup of the states is their gated sum (Eq. 14-15), so soup is computed as grm.
"""

from functools import partial

from tvm.script import tirx as T

from ..decode_tiles import advance, over_columns, read
from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import LANES
from .decode_token import Plan, gates, leave_empty, prepare, remember, take


def build(problem, config, target):
    """The PrimFunc ``decode_step`` for the widths of ``problem``; B, n, H, the capacity and C are run-time values.

    Of the cache, all is written in place but ``cached`` and ``filled``, which stay as they are; last_key and last_value
    are ``[1, 1, 1]`` for linear, as are the gates. ``length`` is C; the output is y. Arrays need no alignment beyond
    that of a float.
    """
    plan, n = Plan(problem, config, target), sizes("B", "n", "H", "capacity", "length", "top_k")
    Dk, Dv, tokens, heads = plan.Dk, plan.Dv, (n.B, n.n, n.H), (n.B, n.H)
    absent = (1, 1, 1)
    gate, last_key, last_value = (tokens, (*heads, Dk), (*heads, Dv)) if plan.flags.gated else (absent,) * 3
    arguments = dict(
        q=f32(*tokens, Dk, align=4), u=f32(*tokens, Dk, align=4), k=f32(*tokens, Dk, align=4),
        v=f32(*tokens, Dv, align=4), g=f32(*gate, align=4), beta=f32(*gate, align=4), lam=f32(*gate, align=4),
        states=f32(*heads, n.capacity, Dk, Dv, align=4), descriptors=f32(*heads, n.capacity, Dk, align=4),
        online=f32(*heads, Dk, Dv, align=4), key_sum=f32(*heads, Dk, align=4),
        last_key=f32(*last_key, align=4), last_value=f32(*last_value, align=4),
        cached=i32(n.B, align=4), filled=i32(n.B, align=4),
        length=n.length, top_k=n.top_k, scale=T.float32, y=f32(*tokens, Dv, align=4),
    )  # fmt: skip
    return prim_func("decode_step", arguments, n, lambda x: every_head(plan, x))


def every_head(plan: Plan, x: Values) -> None:
    """One task a head, or a group of its value columns."""
    split, H, heads, gated = plan.split, x.H, x.B * x.H, plan.flags.gated

    @emit
    def tasks():
        shared = T.meta_var(scratch(own=f32(x.B, H, x.n)))  # logits of the tokens' own segments
        c = T.meta_var(x.plus(shared))
        if split > 1:
            # Shared by the column groups: serial, because there are only a few heads where columns are split.
            for bh in range(heads):
                prepare(plan, c, b=bh // H, h=bh % H)
        for task in T.parallel(heads * split):
            b: T.let = task // split // H
            h: T.let = task // split % H
            c0: T.let = task % split * plan.W
            at = T.meta_var(c.plus(scratch_of(plan, x), b=b, h=h, c0=c0))
            if split == 1:
                prepare(plan, c, b=b, h=h)
            every_segment(plan, at)
            if gated and split == 1:
                remember(plan, x, b=b, h=h)
        if gated and split > 1:
            for bh in range(heads):
                remember(plan, x, b=bh // H, h=bh % H)


def scratch_of(plan: Plan, x: Values) -> Values:
    """What one task keeps to itself."""
    Dk, W, tile, flags = plan.Dk, plan.W, plan.tile, plan.flags
    w = scratch(
        Q=f32(tile, Dk),
        K=f32(tile, Dk),
        P=f32(tile if flags.gated else 1, Dk),  # beta times the key before
        V=f32(tile + 1, W),  # from the value before the first token on
        Y=f32(tile, W),
        decay=f32(tile),
        share=f32(tile),  # the gate of the own segment
        lanes=f32(2, LANES, scope="local"),
        index=i32(LANES, scope="local"),
    )
    if flags.routed:
        w = w.plus(scratch(gamma=f32(tile, x.capacity + LANES)))
    if flags.sparse:
        w = w.plus(scratch(value=f32(1, x.capacity + LANES), chosen=i32(x.capacity + LANES)))
    return w


def every_segment(plan: Plan, at: Values) -> None:
    """The call's tokens, from one segment boundary to the next; at a boundary the state goes into the cache."""
    tile, length, n = plan.tile, at.length, at.n
    filled, cached, b = at.filled, at.cached, at.b

    @emit
    def pieces():
        for piece in range((filled[b] + n + length - 1) // length):
            begin: T.let = T.max(piece * length - filled[b], 0)
            end: T.let = T.min((piece + 1) * length - filled[b], n)
            past: T.let = cached[b] + piece
            for j in range((end - begin + tile - 1) // tile):
                token: T.let = begin + j * tile
                if tile > 1:
                    if end - token > 1:
                        count: T.let = T.min(tile, end - token)
                        walk(plan, at, size=tile, token=token, count=count, begin=begin, past=past)
                    else:
                        walk(plan, at, size=1, token=token, count=1, begin=begin, past=past)
                else:
                    walk(plan, at, size=1, token=token, count=1, begin=begin, past=past)
            if filled[b] + end == (piece + 1) * length:
                append(plan, at, past=past)


def append(plan: Plan, at: Values, *, past) -> None:
    """The online state becomes the cache's next; it starts again from nothing, or goes on under ``checkpoint``."""
    Dk, W, b, h, c0, online, states = plan.Dk, plan.W, at.b, at.h, at.c0, at.online, at.states

    @emit
    def rows():
        for d in range(Dk):
            for x in T.vectorized(W):
                states[b, h, past, d, c0 + x] = online[b, h, d, c0 + x]
        if not plan.flags.checkpoint:
            for d in range(Dk):
                for x in T.vectorized(W):
                    online[b, h, d, c0 + x] = T.float32(0)


def walk(plan: Plan, at: Values, *, size, token, count, begin, past) -> None:
    """``count`` tokens from ``token`` on, of one segment, which began with token ``begin`` of the call or before.

    Together, ``size`` of them: then those after ``count`` are empty.
    """
    W, flags, b, h, c0, y, Y = plan.W, plan.flags, at.b, at.h, at.c0, at.y, at.Y

    @emit
    def tokens():
        if flags.gated:
            value_before(plan, at, token=token, begin=begin)
        for t in range(size):
            if t < count:
                linked = T.meta_var(T.Or(T.Or(token + t > begin, flags.checkpoint), token + t == 0))
                take(plan, at, t=t, token=token + t, linked=linked)
                gates(plan, at, t=t, token=token + t, past=past)
            else:
                leave_empty(plan, at, t=t, past=past)
        write_online(plan, at, size=size)
        read_cached(plan, at, size=size, past=past)
        for t in range(size):
            if t < count:
                for x in T.vectorized(W):
                    y[b, token + t, h, c0 + x] = Y[t, x]


def value_before(plan: Plan, at: Values, *, token, begin) -> None:
    """The value before ``token`` into row 0 of V: of this call, of the last one, or nobody's."""
    W, V, v, b, h, c0 = plan.W, at.V, at.v, at.b, at.h, at.c0

    @emit
    def row():
        for x in T.vectorized(W):
            V[0, x] = T.float32(0)
        if T.Or(token > begin, T.And(plan.flags.checkpoint, token > 0)):
            for x in T.vectorized(W):
                V[0, x] = v[b, token - 1, h, c0 + x]
        if token == 0:
            for x in T.vectorized(W):
                V[0, x] = at.last_value[b, h, c0 + x]


def write_online(plan: Plan, at: Values, *, size) -> None:
    """Write the tokens to the online state, and read it after each: Y is overwritten."""
    Dk, W, gated = plan.Dk, plan.W, plan.flags.gated
    cols, rows = (plan.few, 1) if size > 1 else (plan.cols, plan.rows)

    def columns(tile, y0, n0):
        tile(
            online=at.online, b=at.b, h=at.h, Q=at.Q, K=at.K, P=at.P, V=at.V, decay=at.decay, share=at.share, Y=at.Y,
            y0=y0, n0=n0,
        )  # fmt: skip

    make = partial(advance, size, rows, Dk=Dk, gated=gated)
    over_columns(width=W, cols=cols, c0=at.c0, make=make, body=columns)


def read_cached(plan: Plan, at: Values, *, size, past) -> None:
    """Add to Y what the tokens read of the ``past`` cached states, ``streams`` of them side by side for one token."""
    flags, streams = plan.flags, plan.streams if size == 1 else 1

    @emit
    def groups():
        count: T.let = T.min(at.top_k, past) if flags.sparse else past
        for i in range(count // streams):
            read_states(plan, at, size=size, first=i * streams, streams=streams)
        if streams > 1:
            for i in range(count % streams):
                read_states(plan, at, size=size, first=count // streams * streams + i, streams=1)


def read_states(plan: Plan, at: Values, *, size, first, streams) -> None:
    """Add to Y what the tokens read of ``streams`` states from the ``first`` on, or of the first chosen ones."""
    Dk, W, ahead, flags = plan.Dk, plan.W, plan.ahead, plan.flags
    cols, rows = (plan.few, 1) if size > 1 else (plan.cols, plan.rows)
    chosen = at.chosen if flags.sparse else at.Q
    read_gates = at.value if flags.sparse else at.gamma if flags.routed else at.share

    def columns(tile, y0, n0):
        tile(
            states=at.states, b=at.b, h=at.h, first=first, chosen=chosen, Q=at.Q, gates=read_gates, Y=at.Y, y0=y0, n0=n0
        )

    make = partial(read, size, rows, streams, Dk=Dk, ahead=ahead, routed=flags.routed, sparse=flags.sparse)
    over_columns(width=W, cols=cols, c0=at.c0, make=make, body=columns)
