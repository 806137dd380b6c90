"""New tokens of a linear or SWLA Memory Caching layer over its cache (Eq. 2, 4, 6-17, 26-27), float32, on a CPU.

Token by token: write, read, and at a segment's end append the state and the mean key to the cache:

    M_t = e^{g_t} M_{t-1} + beta_t k_{t-1}^T v_{t-1} + lam_t k_t^T v_t          linear: M_t = M_{t-1} + k_t^T v_t
    y_t = gamma_t^(s) (q_t M_t) + sum_{i < s} gamma_t^(i) (q_t M^(i))

One task is a head, or one of ``split`` groups of its value columns. Tokens between two segment boundaries see the same
cached states: a tile of TOKENS reads each of them once, in place, and walks once over the rows of the online state. A
single token, and ssc, where every token reads states of its own, go one at a time.

For a linear memory the soup of the states is their gated sum (Eq. 14-15), so soup is computed as grm.
"""

from tvm.script import tirx as T

from .decode_tiles import LOW, advance, choose, dots, over_columns, read, softmax, tiles
from .tiles import LANES, exp

_DOTS = 8
"""Descriptors whose inner products with u are in flight together."""
_TOKENS = 4
"""Tokens of a tile."""


def build(problem, config, target):
    """The PrimFunc ``decode_step`` for the widths of ``problem``; B, n, H, the capacity and C are run-time values.

    Arguments of the kernel: q, u, k ``[B, n, H, Dk]``, v ``[B, n, H, Dv]``, g, beta, lam ``[B, n, H]`` (``[1, 1, 1]``
    where the recurrence has none); of the cache, written in place, states ``[B, H, capacity, Dk, Dv]``, descriptors
    ``[B, H, capacity, Dk]``, online ``[B, H, Dk, Dv]``, key_sum ``[B, H, Dk]``, last_key ``[B, H, Dk]`` and last_value
    ``[B, H, Dv]`` (``[1, 1, 1]`` for linear); cached and filled ``[B]`` int32, which stay as they are; C, top_k, scale;
    then the output y ``[B, n, H, Dv]``. Arrays need no alignment beyond that of a float.
    """
    Dk, Dv = problem.Dk, problem.Dv
    split, cols, rows, streams = config["split"], config["cols"], config["rows"], config["streams"]
    ahead = -(-config["prefetch"] // (4 * Dv))
    swla = problem.recurrence == "swla"
    checkpoint = problem.state_init == "checkpoint"
    routed = problem.routed
    chooses = problem.aggregation == "ssc"
    averages = problem.aggregation == "mean"
    W = Dv // split
    tile = 1 if chooses else _TOKENS

    # Of a tile of tokens: so narrow that its sums stay in 32 registers of 16 floats, or in 16 of 8.
    few = min(cols, 64 if target.vector_floats == 16 else 16)
    over, over_few = over_columns(W, cols), over_columns(W, few)
    write_one = tiles(W, cols, lambda n: advance(1, rows, n, Dk, swla))
    write_some = tiles(W, few, lambda n: advance(tile, 1, n, Dk, swla))
    read_one = tiles(W, cols, lambda n: read(1, rows, 1, n, Dk, ahead, routed, chooses))
    read_pair = tiles(W, cols, lambda n: read(1, rows, streams, n, Dk, ahead, routed, chooses))
    read_some = tiles(W, few, lambda n: read(tile, 1, 1, n, Dk, ahead, routed, chooses))

    @T.prim_func(s_tir=True)
    def decode_step(
        q_: T.handle, u_: T.handle, k_: T.handle, v_: T.handle, g_: T.handle, beta_: T.handle, lam_: T.handle,
        states_: T.handle, descriptors_: T.handle, online_: T.handle, key_sum_: T.handle,
        last_key_: T.handle, last_value_: T.handle, cached_: T.handle, filled_: T.handle,
        length: T.int32, top_k: T.int32, scale: T.float32, y_: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "decode_step", "tirx.noalias": True})
        B, n, H, capacity = T.int32(), T.int32(), T.int32(), T.int32()
        q = T.match_buffer(q_, (B, n, H, Dk), "float32", align=4)
        u = T.match_buffer(u_, (B, n, H, Dk), "float32", align=4)
        k = T.match_buffer(k_, (B, n, H, Dk), "float32", align=4)
        v = T.match_buffer(v_, (B, n, H, Dv), "float32", align=4)
        g = T.match_buffer(g_, (B, n, H) if swla else (1, 1, 1), "float32", align=4)
        beta = T.match_buffer(beta_, (B, n, H) if swla else (1, 1, 1), "float32", align=4)
        lam = T.match_buffer(lam_, (B, n, H) if swla else (1, 1, 1), "float32", align=4)
        states = T.match_buffer(states_, (B, H, capacity, Dk, Dv), "float32", align=4)
        descriptors = T.match_buffer(descriptors_, (B, H, capacity, Dk), "float32", align=4)
        online = T.match_buffer(online_, (B, H, Dk, Dv), "float32", align=4)
        key_sum = T.match_buffer(key_sum_, (B, H, Dk), "float32", align=4)
        last_key = T.match_buffer(last_key_, (B, H, Dk) if swla else (1, 1, 1), "float32", align=4)
        last_value = T.match_buffer(last_value_, (B, H, Dv) if swla else (1, 1, 1), "float32", align=4)
        cached = T.match_buffer(cached_, (B,), "int32", align=4)
        filled = T.match_buffer(filled_, (B,), "int32", align=4)
        y = T.match_buffer(y_, (B, n, H, Dv), "float32", align=4)
        own = T.alloc_buffer((B, H, n), "float32")

        # What does not depend on the states: sums and means of keys, and the logits of the tokens' own segments.
        @T.inline
        def prepare(b, h):
            place = T.alloc_buffer((2,), "int32", scope="local")
            place[0] = filled[b]
            place[1] = cached[b]
            for t in range(n):
                for d in T.vectorized(Dk):
                    key_sum[b, h, d] = key_sum[b, h, d] + k[b, t, h, d]
                place[0] = place[0] + 1
                if routed:
                    sums = T.alloc_buffer((1, LANES), "float32", scope="local")
                    dots(1, Dk, lambda r, d: key_sum[b, h, d], lambda d: u[b, t, h, d])(sums)
                    own[b, h, t] = sums[0, 0] / T.cast(place[0], "float32")
                if place[0] == length:
                    for d in T.vectorized(Dk):
                        descriptors[b, h, place[1], d] = key_sum[b, h, d] / T.cast(length, "float32")
                        key_sum[b, h, d] = T.float32(0)
                    place[0] = 0
                    place[1] = place[1] + 1

        # The newest token, for the next call; nobody's previous one at an independent segment's start.
        @T.inline
        def remember(b, h):
            for d in T.vectorized(Dk):
                last_key[b, h, d] = k[b, n - 1, h, d]
            for x in T.vectorized(Dv):
                last_value[b, h, x] = v[b, n - 1, h, x]
            if not checkpoint:
                if (filled[b] + n) % length == 0:
                    for d in T.vectorized(Dk):
                        last_key[b, h, d] = T.float32(0)
                    for x in T.vectorized(Dv):
                        last_value[b, h, x] = T.float32(0)

        if split > 1:
            # Shared by the column groups: serial, because there are only a few heads where columns are split.
            for bh in range(B * H):
                prepare(bh // H, bh % H)
        for task in T.parallel(B * H * split):
            b: T.let = task // split // H
            h: T.let = task // split % H
            c0: T.let = task % split * W
            Q = T.alloc_buffer((tile, Dk), "float32")
            K = T.alloc_buffer((tile, Dk), "float32")
            P = T.alloc_buffer((tile if swla else 1, Dk), "float32")
            V = T.alloc_buffer((tile + 1, W), "float32")
            Y = T.alloc_buffer((tile, W), "float32")
            decay = T.alloc_buffer((tile,), "float32")
            share = T.alloc_buffer((tile,), "float32")
            lanes = T.alloc_buffer((2, LANES), "float32", scope="local")
            index = T.alloc_buffer((LANES,), "int32", scope="local")
            if routed:
                gamma = T.alloc_buffer((tile, capacity + LANES), "float32")
            if chooses:
                value = T.alloc_buffer((1, capacity + LANES), "float32")
                chosen = T.alloc_buffer((capacity + LANES,), "int32")
            if split == 1:
                prepare(b, h)

            # Row t of the tile: token ``at`` of the call, or nothing at all.
            @T.inline
            def take(t, at, linked):
                for d in T.vectorized(Dk):
                    Q[t, d] = scale * q[b, at, h, d]
                for x in T.vectorized(W):
                    V[t + 1, x] = v[b, at, h, c0 + x]
                if swla:
                    decay[t] = exp(g[b, at, h])
                    for d in T.vectorized(Dk):
                        K[t, d] = lam[b, at, h] * k[b, at, h, d]
                        P[t, d] = T.float32(0)
                    if linked:
                        if at > 0:
                            for d in T.vectorized(Dk):
                                P[t, d] = beta[b, at, h] * k[b, at - 1, h, d]
                        else:
                            for d in T.vectorized(Dk):
                                P[t, d] = beta[b, at, h] * last_key[b, h, d]
                else:
                    for d in T.vectorized(Dk):
                        K[t, d] = k[b, at, h, d]

            @T.inline
            def leave_empty(t, past):
                decay[t] = T.float32(1)
                share[t] = T.float32(0)
                if routed:
                    for i in range(past):
                        gamma[t, i] = T.float32(0)
                for d in T.vectorized(Dk):
                    Q[t, d] = T.float32(0)
                    K[t, d] = T.float32(0)
                if swla:
                    for d in T.vectorized(Dk):
                        P[t, d] = T.float32(0)
                for x in T.vectorized(W):
                    V[t + 1, x] = T.float32(0)

            @T.inline
            def logits(t, at, past):
                for i in range((past + _DOTS - 1) // _DOTS):
                    sums = T.alloc_buffer((_DOTS, LANES), "float32", scope="local")
                    dots(
                        _DOTS,
                        Dk,
                        lambda r, d: descriptors[b, h, T.min(i * _DOTS + r, past - 1), d],
                        lambda d: u[b, at, h, d],
                    )(sums)
                    for r in T.unroll(_DOTS):
                        gamma[t, i * _DOTS + r] = sums[r, 0]
                for x in T.vectorized(LANES):
                    gamma[t, past + x] = T.float32(LOW)

            @T.inline
            def gates(t, at, past):
                if routed:
                    logits(t, at, past)
                    share[t] = own[b, h, at]
                    if chooses:
                        choose(gamma, past, T.min(top_k, past), lanes, index, chosen, value)
                        softmax(value, 0, T.min(top_k, past), share, t, lanes)
                    else:
                        softmax(gamma, t, past, share, t, lanes)
                else:
                    share[t] = T.float32(1) / T.cast(past + 1, "float32") if averages else T.float32(1)

            # ``count`` tokens from ``at`` on, of one segment, which began with token ``begin`` of the call or before.
            @T.inline
            def walk(size, at, count, begin, past, columns, written, reads, together, rest):
                if swla:
                    for x in T.vectorized(W):
                        V[0, x] = T.float32(0)
                    if T.Or(at > begin, T.And(checkpoint, at > 0)):
                        for x in T.vectorized(W):
                            V[0, x] = v[b, at - 1, h, c0 + x]
                    if at == 0:
                        for x in T.vectorized(W):
                            V[0, x] = last_value[b, h, c0 + x]
                for t in range(size):
                    if t < count:
                        take(t, at + t, T.Or(T.Or(at + t > begin, checkpoint), at + t == 0))
                        gates(t, at + t, past)
                    else:
                        leave_empty(t, past)

                @T.inline
                def write_columns(tile, y0, n0):
                    tile(online, b, h, Q, K, P, V, decay, share, Y, y0, n0)

                columns(written, write_columns, c0)
                count_read: T.let = T.min(top_k, past) if chooses else past
                for i in range(count_read // together):

                    @T.inline
                    def read_columns(tile, y0, n0):
                        tile(
                            states, b, h, i * together, chosen if chooses else Q, Q,
                            value if chooses else gamma if routed else share, Y, y0, n0,
                        )  # fmt: skip

                    columns(reads, read_columns, c0)
                if together > 1:
                    for i in range(count_read % together):

                        @T.inline
                        def read_rest_columns(tile, y0, n0):
                            tile(
                                states, b, h, count_read // together * together + i, chosen if chooses else Q, Q,
                                value if chooses else gamma if routed else share, Y, y0, n0,
                            )  # fmt: skip

                        columns(rest, read_rest_columns, c0)
                for t in range(size):
                    if t < count:
                        for x in T.vectorized(W):
                            y[b, at + t, h, c0 + x] = Y[t, x]

            for piece in range((filled[b] + n + length - 1) // length):
                begin: T.let = T.max(piece * length - filled[b], 0)
                end: T.let = T.min((piece + 1) * length - filled[b], n)
                past: T.let = cached[b] + piece
                for j in range((end - begin + tile - 1) // tile):
                    at: T.let = begin + j * tile
                    if tile > 1:
                        if end - at > 1:
                            count: T.let = T.min(tile, end - at)
                            walk(tile, at, count, begin, past, over_few, write_some, read_some, 1, read_some)
                        else:
                            walk(1, at, 1, begin, past, over, write_one, read_pair, streams, read_one)
                    else:
                        walk(1, at, 1, begin, past, over, write_one, read_pair, streams, read_one)
                if filled[b] + end == (piece + 1) * length:
                    for d in range(Dk):
                        for x in T.vectorized(W):
                            states[b, h, past, d, c0 + x] = online[b, h, d, c0 + x]
                    if not checkpoint:
                        for d in range(Dk):
                            for x in T.vectorized(W):
                                online[b, h, d, c0 + x] = T.float32(0)
            if swla and split == 1:
                remember(b, h)
        if swla and split > 1:
            for bh in range(B * H):
                remember(bh // H, bh % H)

    return decode_step
