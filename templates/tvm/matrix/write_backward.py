"""Gradients of the writes of a linear or SWLA memory (Eq. 2, 26-27) and of its descriptors, float32, on a CPU.

A segment is walked in chunks of BT tokens from its end. With Q_t = scale * gamma_t^(s) * q_t, the gradient Z of the
memory at the first token after the chunk and the causal weight w_jt of token j in the memory of token t,

    dv_j = sum_{t >= j} w_jt (Q_t . k_j) dy_t + w_jz k_j Z         w_jz: the weight of token j in that memory
    dk_j = sum_{t >= j} w_jt (dy_t . v_j) Q_t + w_jz Z v_j + dp / length + sum_{t >= j} dr_t u_t / n_t
    Z   <- decay Z + sum_t decay_t Q_t^T dy_t

where n_t counts the segment's tokens up to t. In SWLA, w_jt = lam_j e^{g_{j+1}}...e^{g_t} + beta_{j+1} e^{g_{j+2}}...
e^{g_t}, and with Z_t the gradient of M_t, dlam_j = k_j Z_j v_j, dbeta_{j+1} = k_j Z_{j+1} v_j and
dg_t = e^{g_t} <M_{t-1}, Z_t>.
"""

from tvm.script import tirx as T

from .backward_tiles import prefetch
from .tiles import BLOCK, LANES, columns, dot_rows, exp, multiply, transpose


def build(problem, config, target):
    """The PrimFunc ``write_backward`` for the widths of ``problem``; B, T, H and the segments are run-time values.

    Arguments of the kernel: dy ``[B*T*H, Dv]``, q, u, k ``[B*T*H, Dk]``, v ``[B*T*H, Dv]``, g, beta, lam ``[B*T*H]``;
    own and entering of ``read_backward``; states of ``segment_states`` and the gradients of states and descriptors from
    ``state_backward``; begin, end, first ``[N]`` int32; T, H, scale; scratch ``[B*H*N, Dk]`` and ``[B*H*N, Dv]``; then
    the outputs dk ``[B*T*H, Dk]``, dv ``[B*T*H, Dv]`` and dg, dbeta, dlam, shaped as the gates.
    """
    Dk, Dv = problem.Dk, problem.Dv
    BT, MR, NV, NK = config["chunk"], config["rows"], config["cols"], config["key_cols"]
    JR, TL, unroll = config["score_rows"], config["score_lanes"], config["unroll"]
    SR, SC = config["state_rows"], config["state_cols"]
    swla = problem.recurrence == "swla"
    checkpoint = problem.state_init == "checkpoint"
    routed = problem.routed

    by_key = dot_rows(JR, TL, unroll, Dk)
    by_value = dot_rows(JR, TL, unroll, Dv)
    to_values = multiply(MR, NV, unroll)
    to_keys = multiply(MR, NK, unroll)
    from_values = multiply(MR, NV, 1)
    from_keys = multiply(MR, NK, 1)
    update = multiply(SR, SC, 1)

    @T.prim_func(s_tir=True)
    def write_backward(
        dy_: T.handle, q_: T.handle, u_: T.handle, k_: T.handle, v_: T.handle, g_: T.handle, beta_: T.handle,
        lam_: T.handle, own_: T.handle, entering_: T.handle, states_: T.handle, dstates_: T.handle, dmeans_: T.handle,
        begin_: T.handle, end_: T.handle, first_: T.handle, tokens: T.int32, heads: T.int32, scale: T.float32,
        lead_key_: T.handle, lead_value_: T.handle,
        dk_: T.handle, dv_: T.handle, dg_: T.handle, dbeta_: T.handle, dlam_: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "write_backward", "tirx.noalias": True})
        R, N, S, G, J, P = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        dy = T.match_buffer(dy_, (R, Dv), "float32")
        q = T.match_buffer(q_, (R, Dk), "float32")
        u = T.match_buffer(u_, (R, Dk), "float32")
        k = T.match_buffer(k_, (R, Dk), "float32")
        v = T.match_buffer(v_, (R, Dv), "float32")
        g = T.match_buffer(g_, (G,), "float32")
        beta = T.match_buffer(beta_, (G,), "float32")
        lam = T.match_buffer(lam_, (G,), "float32")
        owns = T.match_buffer(own_, (J, tokens), "float32")
        entering = T.match_buffer(entering_, (P, Dv), "float32")
        states = T.match_buffer(states_, (S * Dk, Dv), "float32")
        dstates = T.match_buffer(dstates_, (S * Dk, Dv), "float32")
        dmeans = T.match_buffer(dmeans_, (S, Dk), "float32")
        begin = T.match_buffer(begin_, (N,), "int32")
        end = T.match_buffer(end_, (N,), "int32")
        first = T.match_buffer(first_, (N,), "int32")
        lead_key = T.match_buffer(lead_key_, (S, Dk), "float32")
        lead_value = T.match_buffer(lead_value_, (S, Dv), "float32")
        dk = T.match_buffer(dk_, (R, Dk), "float32")
        dv = T.match_buffer(dv_, (R, Dv), "float32")
        dg = T.match_buffer(dg_, (G,), "float32")
        dbeta = T.match_buffer(dbeta_, (G,), "float32")
        dlam = T.match_buffer(dlam_, (G,), "float32")

        for task in T.parallel(S):
            bh: T.let = task // N
            # Backwards, so that the chunk before the one at work is the next one, whose rows are fetched meanwhile.
            s: T.let = N - 1 - task % N
            row0: T.let = bh // heads * tokens * heads + bh % heads
            length: T.let = end[s] - begin[s]
            chunks: T.let = (length + BT - 1) // BT
            # Something later reads the segment's end state.
            ends_linked: T.let = T.And(s + 1 < N, first[T.min(s + 1, N - 1)] == first[s])
            Q = T.alloc_buffer((BT, Dk), "float32")
            Y = T.alloc_buffer((BT, Dv), "float32")
            KT = T.alloc_buffer((Dk, BT), "float32")
            VT = T.alloc_buffer((Dv, BT), "float32")
            W1 = T.alloc_buffer((BT, BT), "float32")
            W2 = T.alloc_buffer((BT, BT), "float32")
            Z = T.alloc_buffer((Dk, Dv), "float32")
            ZT = T.alloc_buffer((Dv, Dk), "float32")
            C = T.alloc_buffer((BT, Dv), "float32")
            CK = T.alloc_buffer((BT, Dk), "float32")
            through = T.alloc_buffer((Dk,), "float32")  # of the descriptors: dp / length and the later tokens' sum
            lanes = T.alloc_buffer((4, LANES), "float32")
            token_gates = T.alloc_buffer((2, BT + LANES), "float32")  # of the chunk's tokens and the next: e^g, beta
            # By row: lam, the next beta, k_j Z v_j, their gradients dlam and the next dbeta; decay of X.
            of_row = T.alloc_buffer((6, BT + LANES), "float32")
            W = T.alloc_buffer((BT + 1, BT), "float32")  # w_jt at [t, j], up to the token after the chunk
            forgotten = T.alloc_buffer(
                (BT + 1, LANES), "float32"
            )  # by token, lanes to be summed: what its decay scales
            none = T.alloc_buffer((1, 1), "float32")

            @T.inline
            def fetch(X, width, t, count, writes):
                prefetch(X, width, row0, t, count, tokens, heads, writes)

            # W1[t, j] = w_jt (Q_t . k_j), W2[t, j] = w_jt (dy_t . v_j), 0 for t < j; swla's w_jt comes later.
            @T.inline
            def weigh(t0, rows):
                for tt in range((rows + JR - 1) // JR):
                    fetch(k, Dk, t0 - BT + tt * JR, JR, 0)
                    fetch(v, Dv, t0 - BT + tt * JR, JR, 0)
                    for jj in range((rows + TL - 1) // TL):
                        if jj * TL < (tt + 1) * JR:
                            by_key(Q, tt * JR, rows - 1, KT, W1, tt * JR, jj * TL)
                            by_value(Y, tt * JR, rows - 1, VT, W2, tt * JR, jj * TL)
                if not swla:
                    for jb in range((rows + LANES - 1) // LANES):
                        # Below the diagonal nothing changes.
                        for i in range(T.min(LANES, rows - jb * LANES)):
                            for x in T.vectorized(LANES):
                                W1[jb * LANES + i, jb * LANES + x] = T.Select(
                                    i >= x, W1[jb * LANES + i, jb * LANES + x], T.float32(0)
                                )
                                W2[jb * LANES + i, jb * LANES + x] = T.Select(
                                    i >= x, W2[jb * LANES + i, jb * LANES + x], T.float32(0)
                                )

            # C = dv, CK = dk of the chunk's rows, without the descriptors' part.
            @T.inline
            def rows_of_chunk(t0, rows, linked):
                if linked:
                    for nn in range(Dv // BLOCK):
                        for dd in range(Dk // BLOCK):
                            transpose(Z, dd * BLOCK, 1, BLOCK - 1, ZT, nn * BLOCK, dd * BLOCK)
                    for jj in range((rows + MR - 1) // MR):
                        fetch(q, Dk, t0 - BT + jj * MR, MR, 0)
                        fetch(dy, Dv, t0 - BT + jj * MR, MR, 0)
                        for nn in range(Dv // NV):
                            to_values(KT, 0, Z, 0, Dk, C, jj * MR, nn * NV, none, 0, False, True)
                        for dd in range(Dk // NK):
                            to_keys(VT, 0, ZT, 0, Dv, CK, jj * MR, dd * NK, none, 0, False, True)
                else:
                    for j in range(BT):
                        for n in T.vectorized(Dv):
                            C[j, n] = T.float32(0)
                        for d in T.vectorized(Dk):
                            CK[j, d] = T.float32(0)

            # swla's w_jt, and the gradients of its gates: with h_jt = k_j Z_t v_j, which is (Q_t . k_j) (dy_t . v_j) +
            # e^{g_{t+1}} h_j,t+1, dg_t = e^{g_t} sum_{j < t} w_j,t-1 h_jt. X enters the chunk like one more write.
            @T.inline
            def weigh_gated(t0, rows, turn, c):
                for x in T.vectorized(BT + LANES):
                    token_gates[0, x] = T.float32(1)
                    token_gates[1, x] = T.float32(0)
                    of_row[0, x] = T.float32(0)
                    of_row[2, x] = T.float32(0)
                # The token after the chunk too; none after the segment, whose last memory is kept as it is.
                for j in range(T.min(rows + 1, end[s] - t0)):
                    token_gates[0, j] = exp(g[row0 + (t0 + j) * heads])
                    token_gates[1, j] = beta[row0 + (t0 + j) * heads]
                    of_row[0, j] = lam[row0 + (t0 + j) * heads]
                for j in range(BT):
                    of_row[1, j] = token_gates[1, j + 1]
                for j in range(rows):
                    for x in T.vectorized(LANES):
                        lanes[0, x] = T.float32(0)
                    for e in T.unroll(Dv // LANES):
                        for x in T.vectorized(LANES):
                            lanes[0, x] = lanes[0, x] + C[j, e * LANES + x] * v[row0 + (t0 + j) * heads, e * LANES + x]
                    for x in T.unroll(LANES):
                        of_row[2, j] = of_row[2, j] + lanes[0, x]
                for t in range(rows + 1):
                    for x in T.vectorized(LANES):
                        forgotten[t, x] = T.float32(0)
                for jb in range((rows + LANES - 1) // LANES):
                    for x in T.vectorized(LANES):
                        lanes[0, x] = T.float32(0)
                        lanes[1, x] = T.float32(0)
                        lanes[2, x] = of_row[2, jb * LANES + x]
                    for i in range(rows + 1 - jb * LANES):
                        t: T.let = jb * LANES + i
                        for x in T.vectorized(LANES):
                            lanes[0, x] = T.Select(i == x, T.float32(1), lanes[0, x] * token_gates[0, t])
                            lanes[1, x] = T.Select(i == x + 1, T.float32(1), lanes[1, x] * token_gates[0, t])
                            W[t, jb * LANES + x] = (
                                of_row[0, jb * LANES + x] * lanes[0, x] + of_row[1, jb * LANES + x] * lanes[1, x]
                            )
                    for turned in range(rows + 1 - jb * LANES):
                        t: T.let = rows - turned
                        i: T.let = t - jb * LANES
                        if t < rows:
                            for x in T.vectorized(LANES):
                                # Beyond the chunk's rows there may be anything.
                                lanes[2, x] = token_gates[0, t + 1] * lanes[2, x] + T.Select(
                                    i >= x, W1[t, jb * LANES + x] * W2[t, jb * LANES + x], T.float32(0)
                                )
                                W1[t, jb * LANES + x] = W1[t, jb * LANES + x] * W[t, jb * LANES + x]
                                W2[t, jb * LANES + x] = W2[t, jb * LANES + x] * W[t, jb * LANES + x]
                        for x in T.vectorized(LANES):
                            of_row[3, jb * LANES + x] = T.Select(i == x, lanes[2, x], of_row[3, jb * LANES + x])
                            of_row[4, jb * LANES + x] = T.Select(i == x + 1, lanes[2, x], of_row[4, jb * LANES + x])
                        if i > 0:
                            for x in T.vectorized(LANES):
                                forgotten[t, x] = forgotten[t, x] + W[t - 1, jb * LANES + x] * lanes[2, x]
                for j in range(rows):
                    dlam[row0 + (t0 + j) * heads] = of_row[3, j]
                    if t0 + j + 1 < end[s]:
                        dbeta[row0 + (t0 + j + 1) * heads] = of_row[4, j]
                    for n in T.vectorized(Dv):
                        C[j, n] = C[j, n] * W[rows, j]
                    for d in T.vectorized(Dk):
                        CK[j, d] = CK[j, d] * W[rows, j]

                # X, in lane 0.
                lanes[0, 0] = T.float32(0)
                if T.And(T.Or(turn > 0, ends_linked), T.Or(c > 0, T.And(checkpoint, s != first[s]))):
                    slot: T.let = bh * (tokens // BT + N) + begin[s] // BT + s + c
                    for x in T.vectorized(LANES):
                        lanes[1, x] = T.float32(0)
                    for d in range(Dk):
                        for e in T.unroll(Dv // LANES):
                            for x in T.vectorized(LANES):
                                lanes[1, x] = lanes[1, x] + entering[slot * Dk + d, e * LANES + x] * Z[d, e * LANES + x]
                    for x in T.unroll(LANES):
                        lanes[0, 0] = lanes[0, 0] + lanes[1, x]
                of_row[5, 0] = T.float32(1)
                for t in range(rows):
                    of_row[5, t + 1] = of_row[5, t] * token_gates[0, t + 1]
                for turned in range(rows):
                    t: T.let = rows - turned
                    if t < rows:
                        lanes[0, 0] = owns[bh * 3 + 2, t0 + t] + token_gates[0, t + 1] * lanes[0, 0]
                    lanes[0, 1] = of_row[5, t - 1] * lanes[0, 0]
                    for x in T.unroll(LANES):
                        lanes[0, 1] = lanes[0, 1] + forgotten[t, x]
                    if t0 + t < end[s]:
                        dg[row0 + (t0 + t) * heads] = token_gates[0, t] * lanes[0, 1]

            # Z at the chunk's own first token.
            @T.inline
            def retreat(rows):
                if swla:
                    lanes[0, 0] = T.float32(1)
                    for t in range(rows):
                        if t > 0:
                            lanes[0, 0] = lanes[0, 0] * token_gates[0, t]
                        for d in T.vectorized(Dk):
                            Q[t, d] = Q[t, d] * lanes[0, 0]
                    lanes[0, 0] = lanes[0, 0] * token_gates[0, rows]
                    for d in range(Dk):
                        for n in T.vectorized(Dv):
                            Z[d, n] = Z[d, n] * lanes[0, 0]
                for dd in range(Dk // SR):
                    for nn in range(Dv // SC):
                        update(Q, 0, Y, 0, rows, Z, dd * SR, nn * SC, none, 0, False, False)

            for d in range(Dk):
                for n in T.vectorized(Dv):
                    Z[d, n] = T.float32(0)
            for d in T.vectorized(Dk):
                through[d] = T.float32(0)
            if ends_linked:
                for d in range(Dk):
                    for n in T.vectorized(Dv):
                        Z[d, n] = dstates[(bh * N + s) * Dk + d, n]
                if routed:
                    for d in T.vectorized(Dk):
                        through[d] = dmeans[bh * N + s, d] / T.cast(length, "float32")
            for turn in range(chunks):
                t0: T.let = begin[s] + (chunks - 1 - turn) * BT
                rows: T.let = T.min(BT, end[s] - t0)
                linked: T.let = T.Or(turn > 0, ends_linked)
                columns(k, Dk, row0, heads, t0, rows, KT)
                columns(v, Dv, row0, heads, t0, rows, VT)
                for t in range(rows):
                    lanes[0, 0] = scale * owns[bh * 3, t0 + t]
                    for d in T.vectorized(Dk):
                        Q[t, d] = lanes[0, 0] * q[row0 + (t0 + t) * heads, d]
                    for n in T.vectorized(Dv):
                        Y[t, n] = dy[row0 + (t0 + t) * heads, n]
                weigh(t0, rows)
                rows_of_chunk(t0, rows, linked)
                if swla:
                    weigh_gated(t0, rows, turn, chunks - 1 - turn)
                for jj in range((rows + MR - 1) // MR):
                    fetch(dk, Dk, t0 + jj * MR, MR, 1)
                    fetch(dv, Dv, t0 + jj * MR, MR, 1)
                    if routed:
                        fetch(u, Dk, t0 + jj * MR, MR, 0)
                    for nn in range(Dv // NV):
                        from_values(W1, jj * MR, Y, jj * MR, rows - jj * MR, C, jj * MR, nn * NV, none, 0, False, False)
                    for dd in range(Dk // NK):
                        from_keys(W2, jj * MR, Q, jj * MR, rows - jj * MR, CK, jj * MR, dd * NK, none, 0, False, False)
                for i in range(rows):
                    j: T.let = rows - 1 - i
                    row: T.let = row0 + (t0 + j) * heads
                    if routed:
                        lanes[0, 0] = owns[bh * 3 + 1, t0 + j] / T.cast(t0 + j + 1 - begin[s], "float32")
                        for d in T.vectorized(Dk):
                            through[d] = through[d] + lanes[0, 0] * u[row, d]
                            dk[row, d] = CK[j, d] + through[d]
                    else:
                        for d in T.vectorized(Dk):
                            dk[row, d] = CK[j, d]
                    for n in T.vectorized(Dv):
                        dv[row, n] = C[j, n]
                if T.Or(swla and checkpoint, turn + 1 < chunks):
                    retreat(rows)

            if swla:
                # The token before the segment, through the segment's first.
                b: T.let = row0 + begin[s] * heads
                dbeta[b] = T.float32(0)
                dg[b] = T.float32(0)
                if checkpoint:
                    if s != first[s]:
                        for x in T.vectorized(LANES):
                            lanes[2, x] = T.float32(0)
                        for d in range(Dk):
                            for e in T.unroll(Dv // LANES):
                                for x in T.vectorized(LANES):
                                    lanes[2, x] = lanes[2, x] + (
                                        states[(bh * N + s - 1) * Dk + d, e * LANES + x] * Z[d, e * LANES + x]
                                    )
                        for x in T.unroll(LANES):
                            dg[b] = dg[b] + exp(g[b]) * lanes[2, x]
                        for n in T.vectorized(Dv):
                            lead_value[bh * N + s, n] = T.float32(0)
                        for d in range(Dk):
                            for x in T.vectorized(LANES):
                                lanes[0, x] = T.float32(0)
                            for e in T.unroll(Dv // LANES):
                                for x in T.vectorized(LANES):
                                    lanes[0, x] = lanes[0, x] + Z[d, e * LANES + x] * v[b - heads, e * LANES + x]
                            lanes[1, 0] = T.float32(0)
                            for x in T.unroll(LANES):
                                lanes[1, 0] = lanes[1, 0] + lanes[0, x]
                            dbeta[b] = dbeta[b] + k[b - heads, d] * lanes[1, 0]
                            lead_key[bh * N + s, d] = beta[b] * lanes[1, 0]
                            for n in T.vectorized(Dv):
                                lead_value[bh * N + s, n] = (
                                    lead_value[bh * N + s, n] + beta[b] * k[b - heads, d] * Z[d, n]
                                )

        if swla:
            if checkpoint:
                for task in T.parallel(S):
                    if task % N != first[task % N]:
                        row: T.let = (
                            task // N // heads * tokens * heads + task // N % heads + (begin[task % N] - 1) * heads
                        )
                        for d in T.vectorized(Dk):
                            dk[row, d] = dk[row, d] + lead_key[task, d]
                        for n in T.vectorized(Dv):
                            dv[row, n] = dv[row, n] + lead_value[task, n]

    return write_backward
