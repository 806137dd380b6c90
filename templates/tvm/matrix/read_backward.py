"""Gradients of the read of a linear or SWLA Memory Caching layer (Eq. 6-17) to q, u and the gates, float32, on a CPU.

    P_t^(i)  = M^(i) dy_t                       for the cached states, and of the online memory
    dq_t     = scale sum_i gamma_t^(i) P_t^(i)
    dgamma_t^(i) = scale <q_t, P_t^(i)>
    dr_t^(i) = gamma_t^(i) (dgamma_t^(i) - sum_j gamma_t^(j) dgamma_t^(j))        the logits' gradient
    du_t     = sum_i dr_t^(i) p_i

One task is one segment of one head, walked in chunks of BT tokens with the running state X: what the tokens before
the chunk leave in the memory of its first token. Gates and logits are computed as in ``read_forward``, to the bit.
Formulations of the cached read: ``per_segment``, one product a state; ``summed``, one product with their sum where
gates are equal (residual, mean); ``gather``, each state times just the tokens that chose it (ssc).
"""

from tvm.script import tirx as T

from .backward_tiles import prefetch, read_gathered, read_online, read_state
from .gates import choose, softmax, sort_by_segment
from .tiles import BLOCK, LANES, columns, dot_rows, exp, multiply, transpose


def build(problem, config, target):
    """The PrimFunc ``read_backward`` for the widths of ``problem``; B, T, H and the segments are run-time values.

    Arguments of the kernel: dy ``[B*T*H, Dv]``, q, u, k ``[B*T*H, Dk]``, v ``[B*T*H, Dv]``, g, beta, lam ``[B*T*H]``
    (one element each where the recurrence has none); states ``[B*H*N*Dk, Dv]`` and means ``[B*H*N, Dk]`` of
    ``segment_states``; begin, end, first ``[N]`` int32; T, H, the longest segment, top_k, scale; then the outputs:

    gamma, dr ``[B*H*T*N]``: gates and logits' gradients of the cached segments, [i, t] within a segment's part, which
    starts at (bh * T + begin) * N; own ``[B*H*3, T]``: of the online segment gamma, dr and gamma * <q_t, X dy_t>;
    entering ``[B*H*(T//BT+N)*Dk, Dv]``: X of the chunks (swla), chunk c of segment s at begin // BT + s + c; dq, du
    ``[B*T*H, Dk]``. gamma, dr and du are left alone where there are no logits.
    """
    Dk, Dv = problem.Dk, problem.Dv
    BT, NK = config["chunk"], config["key_cols"]
    MR, RR, RL = config["rows"], config["read_rows"], config["read_lanes"]
    JR, TL, unroll = config["score_rows"], config["score_lanes"], config["unroll"]
    SR, SC = config["state_rows"], config["state_cols"]
    formulation = config["formulation"]
    swla = problem.recurrence == "swla"
    checkpoint = problem.state_init == "checkpoint"
    routed = problem.routed
    chooses = problem.aggregation == "ssc"
    averages = problem.aggregation == "mean"

    logits = dot_rows(JR, TL, unroll, Dk)
    scores = dot_rows(JR, TL, unroll, Dv)
    from_cached = read_state(RR, RL, unroll, Dv, routed)
    from_online = read_online(RR, RL, unroll, Dv, routed, swla)
    from_chosen = read_gathered(MR, NK, Dv)
    connect = multiply(MR, NK, 1)
    write = multiply(SR, SC, 1)

    @T.prim_func(s_tir=True)
    def read_backward(
        dy_: T.handle, q_: T.handle, u_: T.handle, k_: T.handle, v_: T.handle, g_: T.handle, beta_: T.handle,
        lam_: T.handle, states_: T.handle, means_: T.handle, begin_: T.handle, end_: T.handle, first_: T.handle,
        tokens: T.int32, heads: T.int32, longest: T.int32, top_k: T.int32, scale: T.float32,
        gamma_: T.handle, dr_: T.handle, own_: T.handle, entering_: T.handle, dq_: T.handle, du_: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "read_backward", "tirx.noalias": True})
        R, N, S, G, X, J, P = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        dy = T.match_buffer(dy_, (R, Dv), "float32")
        q = T.match_buffer(q_, (R, Dk), "float32")
        u = T.match_buffer(u_, (R, Dk), "float32")
        k = T.match_buffer(k_, (R, Dk), "float32")
        v = T.match_buffer(v_, (R, Dv), "float32")
        g = T.match_buffer(g_, (G,), "float32")
        beta = T.match_buffer(beta_, (G,), "float32")
        lam = T.match_buffer(lam_, (G,), "float32")
        states = T.match_buffer(states_, (S * Dk, Dv), "float32")
        means = T.match_buffer(means_, (S, Dk), "float32")
        begin = T.match_buffer(begin_, (N,), "int32")
        end = T.match_buffer(end_, (N,), "int32")
        first = T.match_buffer(first_, (N,), "int32")
        gammas = T.match_buffer(gamma_, (X,), "float32")
        drs = T.match_buffer(dr_, (X,), "float32")
        owns = T.match_buffer(own_, (J, tokens), "float32")
        entering = T.match_buffer(entering_, (P, Dv), "float32")
        dq = T.match_buffer(dq_, (R, Dk), "float32")
        du = T.match_buffer(du_, (R, Dk), "float32")

        for task in T.parallel(S):
            bh: T.let = task // N
            turn: T.let = task % N
            # Late segments read more: pairing early with late ones balances contiguous shares of the tasks.
            s: T.let = T.if_then_else(turn % 2 == 0, turn // 2, N - 1 - turn // 2)
            row0: T.let = bh // heads * tokens * heads + bh % heads
            past: T.let = s - first[s]
            base: T.let = bh * N + first[s]
            length: T.let = end[s] - begin[s]
            picks: T.let = T.min(top_k, past)
            saved: T.let = (bh * tokens + begin[s]) * N + first[s] * length
            QT = T.alloc_buffer((Dk, BT), "float32")
            UT = T.alloc_buffer((Dk, BT), "float32")
            YT = T.alloc_buffer((Dv, BT), "float32")  # scale * dy
            dQT = T.alloc_buffer((Dk, BT), "float32")
            K = T.alloc_buffer((BT, Dk), "float32")
            V = T.alloc_buffer((BT, Dv), "float32")
            E = T.alloc_buffer((BT, BT), "float32")
            M = T.alloc_buffer((Dk, Dv), "float32")
            rows_of = T.alloc_buffer((BT, Dk), "float32")
            total = T.alloc_buffer((2, Dk), "float32")
            own = T.alloc_buffer((2, BT), "float32")  # the own segment's gate; decay of X
            down = T.alloc_buffer((3, BT), "float32")  # gradients of the gate and of the logit; <q, X dy>
            gamma = T.alloc_buffer((N + JR, BT), "float32")
            dgamma = T.alloc_buffer((N + JR, BT), "float32")
            lanes = T.alloc_buffer((3, LANES), "float32")
            token_gates = T.alloc_buffer((3, BT + LANES), "float32")  # of the chunk's tokens: e^g, beta, lam
            if chooses:
                best = T.alloc_buffer((LANES,), "int32")
                chosen = T.alloc_buffer((top_k + 1, longest + BT if formulation == "gather" else BT), "int32")
                value = T.alloc_buffer((top_k + 1, longest + BT if formulation == "gather" else BT), "float32")

            @T.inline
            def fetch(X, width, t, count):
                prefetch(X, width, row0, t, count, tokens, heads, 0)

            @T.inline
            def own_logits(t0, rows, seen):
                for t in T.vectorized(BT):
                    own[0, t] = T.float32(0)
                for t in range(rows):
                    for x in T.vectorized(LANES):
                        lanes[0, x] = T.float32(0)
                    for e in T.unroll(Dk // LANES):
                        for x in T.vectorized(LANES):
                            total[0, e * LANES + x] = total[0, e * LANES + x] + K[t, e * LANES + x]
                            lanes[0, x] = (
                                lanes[0, x] + total[0, e * LANES + x] * u[row0 + (t0 + t) * heads, e * LANES + x]
                            )
                    for x in T.unroll(LANES):
                        own[0, t] = own[0, t] + lanes[0, x]
                    own[0, t] = own[0, t] / T.cast(seen + t + 1, "float32")

            @T.inline
            def gates(t0, rows, seen):
                if routed:
                    columns(u, Dk, row0, heads, t0, rows, UT)
                    own_logits(t0, rows, seen)
                    for ii in range((past + JR - 1) // JR):
                        for tt in range((rows + TL - 1) // TL):
                            logits(means, base + ii * JR, base + past - 1, UT, gamma, ii * JR, tt * TL)
                    for tb in range((rows + LANES - 1) // LANES):
                        if chooses:
                            at: T.let = seen + tb * LANES if formulation == "gather" else tb * LANES
                            choose(gamma, past, picks, tb * LANES, lanes, best, chosen, value, at)
                            softmax(own, value, picks, at, tb * LANES, T.float32(1), lanes)
                            if formulation != "gather":
                                for i in range(past):
                                    for x in T.vectorized(LANES):
                                        gamma[i, tb * LANES + x] = T.float32(0)
                                for p in range(picks):
                                    for x in range(LANES):
                                        gamma[chosen[p, tb * LANES + x], tb * LANES + x] = value[p, tb * LANES + x]
                        else:
                            softmax(own, gamma, past, tb * LANES, tb * LANES, T.float32(1), lanes)
                else:
                    for t in T.vectorized(BT):
                        own[0, t] = T.float32(1) / T.cast(past + 1, "float32") if averages else T.float32(1)

            # E[j, t] = (v_j . dy_t) * the weight of token j in the memory of token t.
            @T.inline
            def weigh(t0, rows):
                for jj in range((rows + JR - 1) // JR):
                    fetch(q, Dk, t0 + BT + jj * JR, JR)
                    fetch(dy, Dv, t0 + BT + jj * JR, JR)
                    fetch(k, Dk, t0 + BT + jj * JR, JR)
                    fetch(v, Dv, t0 + BT + jj * JR, JR)
                    if routed:
                        fetch(u, Dk, t0 + BT + jj * JR, JR)
                    for tt in range((rows + TL - 1) // TL):
                        if jj * JR < (tt + 1) * TL:
                            scores(V, jj * JR, rows - 1, YT, E, jj * JR, tt * TL)
                if swla:
                    for j in T.vectorized(BT + LANES):
                        token_gates[0, j] = T.float32(1)
                        token_gates[1, j] = T.float32(0)
                        token_gates[2, j] = T.float32(0)
                    # The next chunk's first token too: advance() ends there.
                    for j in range(T.min(rows + 1, end[s] - t0)):
                        token_gates[0, j] = exp(g[row0 + (t0 + j) * heads])
                        token_gates[1, j] = beta[row0 + (t0 + j) * heads]
                        token_gates[2, j] = lam[row0 + (t0 + j) * heads]
                for tb in range((rows + LANES - 1) // LANES):
                    if swla:
                        for x in T.vectorized(LANES):
                            lanes[0, x] = T.float32(0)
                        for i in range(rows):
                            j: T.let = rows - 1 - i
                            for x in T.vectorized(LANES):
                                lanes[1, x] = lanes[0, x]
                                lanes[0, x] = T.Select(
                                    tb * LANES + x == j, T.float32(1), lanes[0, x] * token_gates[0, j + 1]
                                )
                                E[j, tb * LANES + x] = T.Select(
                                    tb * LANES + x >= j,
                                    E[j, tb * LANES + x]
                                    * (token_gates[2, j] * lanes[0, x] + token_gates[1, j + 1] * lanes[1, x]),
                                    T.float32(0),
                                )
                        for x in T.vectorized(LANES):
                            own[1, tb * LANES + x] = lanes[0, x]
                    else:
                        for j in range(rows):
                            for x in T.vectorized(LANES):
                                E[j, tb * LANES + x] = T.Select(tb * LANES + x >= j, E[j, tb * LANES + x], T.float32(0))

            @T.inline
            def keep(c):
                slot: T.let = bh * (tokens // BT + N) + begin[s] // BT + s + c
                for d in range(Dk):
                    for n in T.vectorized(Dv):
                        entering[slot * Dk + d, n] = M[d, n]

            # X of the next chunk; this one is BT tokens long.
            @T.inline
            def advance():
                if swla:
                    lanes[0, 0] = T.float32(1)
                    for i in range(BT):
                        j: T.let = BT - 1 - i
                        lanes[0, 1] = lanes[0, 0]
                        lanes[0, 0] = lanes[0, 0] * token_gates[0, j + 1]
                        for d in T.vectorized(Dk):
                            K[j, d] = K[j, d] * (token_gates[2, j] * lanes[0, 0] + token_gates[1, j + 1] * lanes[0, 1])
                    for d in range(Dk):
                        for n in T.vectorized(Dv):
                            M[d, n] = M[d, n] * lanes[0, 0]
                for dd in range(Dk // SR):
                    for nn in range(Dv // SC):
                        write(K, 0, V, 0, BT, M, dd * SR, nn * SC, own, 0, False, False)

            # dr of the chunk's tokens, and du.
            @T.inline
            def connectors(t0, rows, seen):
                for tb in range((rows + LANES - 1) // LANES):
                    for x in T.vectorized(LANES):
                        lanes[0, x] = own[0, tb * LANES + x] * down[0, tb * LANES + x]
                    for i in range(past):
                        for x in T.vectorized(LANES):
                            lanes[0, x] = lanes[0, x] + gamma[i, tb * LANES + x] * dgamma[i, tb * LANES + x]
                    for x in T.vectorized(LANES):
                        down[1, tb * LANES + x] = own[0, tb * LANES + x] * (down[0, tb * LANES + x] - lanes[0, x])
                    for i in range(past):
                        for x in T.vectorized(LANES):
                            dgamma[i, tb * LANES + x] = gamma[i, tb * LANES + x] * (
                                dgamma[i, tb * LANES + x] - lanes[0, x]
                            )
                for tt in range((rows + MR - 1) // MR):
                    for dd in range(Dk // NK):
                        connect(dgamma, 0, means, base, past, rows_of, tt * MR, dd * NK, own, 0, False, True)
                for t in range(rows):
                    lanes[1, 0] = down[1, t] / T.cast(seen + t + 1, "float32")
                    for d in T.vectorized(Dk):
                        total[1, d] = total[1, d] + k[row0 + (t0 + t) * heads, d]
                        du[row0 + (t0 + t) * heads, d] = rows_of[t, d] + lanes[1, 0] * total[1, d]
                for t in range(rows):
                    owns[bh * 3 + 1, t0 + t] = down[1, t]
                for i in range(past):
                    for t in range(rows):
                        gammas[saved + i * length + seen + t] = gamma[i, t]
                        drs[saved + i * length + seen + t] = dgamma[i, t]

            for d in range(Dk):
                for n in T.vectorized(Dv):
                    M[d, n] = T.float32(0)
            for d in T.vectorized(Dk):
                total[0, d] = T.float32(0)
                total[1, d] = T.float32(0)
            if checkpoint:
                if past > 0:
                    for d in range(Dk):
                        for n in T.vectorized(Dv):
                            M[d, n] = states[(base + past - 1) * Dk + d, n]
                    if swla:
                        b: T.let = row0 + begin[s] * heads
                        for d in range(Dk):
                            for n in T.vectorized(Dv):
                                M[d, n] = exp(g[b]) * M[d, n] + beta[b] * k[b - heads, d] * v[b - heads, n]
                        keep(0)
            if formulation == "summed":
                summed = T.alloc_buffer((Dk, Dv), "float32")
                for d in range(Dk):
                    for n in T.vectorized(Dv):
                        summed[d, n] = T.float32(0)
                for i in range(past):
                    for d in range(Dk):
                        for n in T.vectorized(Dv):
                            summed[d, n] = summed[d, n] + states[(base + i) * Dk + d, n]
            for c in range((length + BT - 1) // BT):
                t0: T.let = begin[s] + c * BT
                rows: T.let = T.min(BT, end[s] - t0)
                linked: T.let = T.Or(c > 0, T.And(checkpoint, past > 0))
                columns(q, Dk, row0, heads, t0, rows, QT)
                columns(dy, Dv, row0, heads, t0, rows, YT)
                for n in range(Dv):
                    for t in T.vectorized(BT):
                        YT[n, t] = YT[n, t] * scale
                for t in range(rows):
                    for d in T.vectorized(Dk):
                        K[t, d] = k[row0 + (t0 + t) * heads, d]
                    for n in T.vectorized(Dv):
                        V[t, n] = v[row0 + (t0 + t) * heads, n]
                gates(t0, rows, c * BT)
                weigh(t0, rows)
                for tt in range((rows + RL - 1) // RL):
                    for dd in range(Dk // RR):
                        from_online(
                            M, YT, K, E, T.min((tt + 1) * RL, rows), QT, dQT, own, down, dd * RR, tt * RL, linked,
                            dd == 0,
                        )  # fmt: skip
                    if formulation == "summed":
                        if past > 0:
                            for dd in range(Dk // RR):
                                from_cached(summed, 0, YT, QT, dQT, own, down, 0, dd * RR, tt * RL, dd == 0)
                    if formulation == "per_segment":
                        for i in range(past):
                            for dd in range(Dk // RR):
                                from_cached(
                                    states, (base + i) * Dk, YT, QT, dQT, gamma, dgamma, i, dd * RR, tt * RL, dd == 0
                                )
                if routed and formulation != "gather":
                    connectors(t0, rows, c * BT)
                for t in range(rows):
                    owns[bh * 3, t0 + t] = own[0, t]
                    if formulation == "gather":
                        owns[bh * 3 + 1, t0 + t] = down[0, t]
                    if swla:
                        owns[bh * 3 + 2, t0 + t] = own[0, t] * down[2, t]
                for tb in range((rows + BLOCK - 1) // BLOCK):
                    for db in range(Dk // BLOCK):
                        transpose(dQT, db * BLOCK, 1, BLOCK - 1, rows_of, tb * BLOCK, db * BLOCK)
                for t in range(rows):
                    for d in T.vectorized(Dk):
                        dq[row0 + (t0 + t) * heads, d] = rows_of[t, d]
                if (c + 1) * BT < length:
                    advance()
                    if swla:
                        keep(c + 1)

            if formulation == "gather":
                where = T.alloc_buffer((N + 2,), "int32")
                tokens_of = T.alloc_buffer((top_k * longest + 1,), "int32")
                gates_of = T.alloc_buffer((top_k * longest + 1,), "float32")
                MT = T.alloc_buffer((Dv, Dk), "float32")
                parts = T.alloc_buffer((MR, LANES), "float32")
                sort_by_segment(chosen, value, picks, length, past, where, tokens_of, gates_of)
                for x in range(past * length):
                    gammas[saved + x] = T.float32(0)
                    drs[saved + x] = T.float32(0)
                for i in range(past):
                    for nn in range(Dv // BLOCK):
                        for dd in range(Dk // BLOCK):
                            transpose(states, (base + i) * Dk + dd * BLOCK, 1, BLOCK - 1, MT, nn * BLOCK, dd * BLOCK)
                    for xx in range((where[i + 1] - where[i] + MR - 1) // MR):
                        x0: T.let = where[i] + xx * MR
                        count: T.let = T.min(MR, where[i + 1] - x0)
                        for dd in range(Dk // NK):
                            from_chosen(
                                dy, MT, q, dq, parts, dd * NK, tokens_of, gates_of, x0, count,
                                row0 + begin[s] * heads, heads, scale, dd == 0,
                            )  # fmt: skip
                        for r in range(count):
                            at: T.let = saved + i * length + tokens_of[x0 + r]
                            gammas[at] = gates_of[x0 + r]
                            for x in T.vectorized(LANES // 2):
                                parts[r, x] = parts[r, x] + parts[r, x + LANES // 2]
                            for x in T.unroll(LANES // 2):
                                drs[at] = drs[at] + scale * parts[r, x]
                for c in range((length + BT - 1) // BT):
                    t0: T.let = begin[s] + c * BT
                    rows: T.let = T.min(BT, end[s] - t0)
                    for t in range(rows):
                        own[0, t] = owns[bh * 3, t0 + t]
                        down[0, t] = owns[bh * 3 + 1, t0 + t]
                    for i in range(past):
                        for t in range(rows):
                            gamma[i, t] = gammas[saved + i * length + c * BT + t]
                            dgamma[i, t] = drs[saved + i * length + c * BT + t]
                    connectors(t0, rows, c * BT)

    return read_backward
