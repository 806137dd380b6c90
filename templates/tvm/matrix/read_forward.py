"""Read of a linear or SWLA Memory Caching layer (Eq. 6-17), float32, on a CPU.

    y_t = gamma_t^(s) M_t(q_t) + sum_{i < s} gamma_t^(i) M^(i)(q_t)

One task is one segment of one head, or one head whose segments follow each other; then the running state at the end
of each is the state that later ones read, and no ``segment_states`` runs before. A segment is walked in chunks of BT
tokens with a running state M:

    online = (W . Q K^T) V + decay * (Q M)          W: the causal weights of the recurrence
    y      = gamma^(s) * online + the cached states, in one of these formulations
        per_segment   C += gamma^(i) * (Q M^(i)), one product a segment
        gated         C += [gamma^(i) * Q]_i [M^(i)]_i, one long-K product over panels of ``panel`` segments
        summed        C += gamma * (Q sum_i M^(i)), where gamma is the same for every segment (residual, mean)
        gather        each state times just the tokens that chose it (ssc)

For a linear memory the soup of the states is their gated sum (Eq. 14-15), so soup is computed as grm.
"""

from tvm.script import tirx as T

from .gates import choose, softmax, sort_by_segment
from .tiles import LANES, columns, dot_rows, exp, gather, multiply


def build(problem, config, target):
    """The PrimFunc ``read_forward`` for the widths of ``problem``; B, T, H and the segments are run-time values.

    Arguments of the kernel: q, u, k ``[B*T*H, Dk]``, v ``[B*T*H, Dv]``, g, beta, lam ``[B*T*H]`` (one element each
    where the recurrence has none); states ``[B*H*N*Dk, Dv]`` and means ``[B*H*N, Dk]`` of ``segment_states``, or
    scratch for them with one task a head; begin, end, first ``[N]`` int32; T, H, the longest segment, top_k, scale;
    then the output y ``[B*T*H, Dv]``.
    """
    Dk, Dv = problem.Dk, problem.Dv
    BT, MR, NR = config["chunk"], config["rows"], config["cols"]
    JR, TL = config["score_rows"], config["score_lanes"]
    formulation = config["formulation"]
    panel = config["panel"]
    by_head = config["parallel"] == "head"
    rows_outer = config["loop_order"] == "rows_outer"
    swla = problem.recurrence == "swla"
    checkpoint = problem.state_init == "checkpoint"
    routed = problem.routed
    chooses = problem.aggregation == "ssc"
    averages = problem.aggregation == "mean"
    lead = 1 if swla else 0  # swla's chunk starts with the row before it

    product = multiply(MR, NR, config["unroll"])
    intra = multiply(MR, NR, 1)
    SR, SC = config["state_rows"], config["state_cols"]
    write = multiply(SR, SC, 1)
    scores = dot_rows(JR, TL, config["unroll"], Dk)
    scattered = gather(MR, NR, Dk)

    @T.prim_func(s_tir=True)
    def read_forward(
        q_: T.handle, u_: T.handle, k_: T.handle, v_: T.handle, g_: T.handle, beta_: T.handle, lam_: T.handle,
        states_: T.handle, means_: T.handle, begin_: T.handle, end_: T.handle, first_: T.handle,
        tokens: T.int32, heads: T.int32, longest: T.int32, top_k: T.int32, scale: T.float32, y_: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "read_forward", "tirx.noalias": True})
        R, N, S, G = T.int32(), T.int32(), T.int32(), T.int32()
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
        y = T.match_buffer(y_, (R, Dv), "float32")

        for outer in T.parallel(S // N if by_head else S):
            for inner in range(N if by_head else 1):
                bh: T.let = outer if by_head else outer // N
                place: T.let = inner if by_head else outer % N
                # Late segments read more: pairing early with late ones balances contiguous shares of the tasks.
                s: T.let = place if by_head else T.if_then_else(place % 2 == 0, place // 2, N - 1 - place // 2)
                row0: T.let = bh // heads * tokens * heads + bh % heads
                past: T.let = s - first[s]
                base: T.let = bh * N + first[s]
                length: T.let = end[s] - begin[s]
                picks: T.let = T.min(top_k, past)
                C = T.alloc_buffer((BT, Dv), "float32")
                QT = T.alloc_buffer((Dk, BT), "float32")
                UT = T.alloc_buffer((Dk, BT), "float32")
                K = T.alloc_buffer((BT + lead * JR, Dk), "float32")
                V = T.alloc_buffer((BT + lead, Dv), "float32")
                W = T.alloc_buffer((BT + lead * JR, BT), "float32")
                M = T.alloc_buffer((Dk, Dv), "float32")
                total = T.alloc_buffer((Dk,), "float32")
                own = T.alloc_buffer((2, BT), "float32")
                gamma = T.alloc_buffer((N + JR, BT), "float32")
                lanes = T.alloc_buffer((4, LANES), "float32")
                best = T.alloc_buffer((LANES,), "int32")
                token_gates = T.alloc_buffer((4, BT + 1), "float32")

                if formulation == "gated":
                    A = T.alloc_buffer((panel * Dk, BT), "float32")
                if chooses:
                    chosen = T.alloc_buffer((top_k + 1, longest + BT if formulation == "gather" else BT), "int32")
                    value = T.alloc_buffer((top_k + 1, longest + BT if formulation == "gather" else BT), "float32")

                @T.inline
                def over_tiles(count, body):
                    if rows_outer:
                        for tt in range(count):
                            for nn in range(Dv // NR):
                                body(tt * MR, nn * NR)
                    else:
                        for nn in range(Dv // NR):
                            for tt in range(count):
                                body(tt * MR, nn * NR)

                @T.inline
                def pack(t0, rows, linked):
                    columns(q, Dk, row0, heads, t0, rows, QT)
                    for t in range(rows):
                        for d in T.vectorized(Dk):
                            K[lead + t, d] = k[row0 + (t0 + t) * heads, d]
                        for n in T.vectorized(Dv):
                            V[lead + t, n] = v[row0 + (t0 + t) * heads, n]
                    for t in range(BT - rows):
                        for d in T.vectorized(Dk):
                            K[lead + rows + t, d] = T.float32(0)
                        for n in T.vectorized(Dv):
                            V[lead + rows + t, n] = T.float32(0)
                    if swla:
                        for j in range(JR - 1):
                            for d in T.vectorized(Dk):
                                K[BT + 1 + j, d] = T.float32(0)
                        for d in T.vectorized(Dk):
                            K[0, d] = T.float32(0)
                        for n in T.vectorized(Dv):
                            V[0, n] = T.float32(0)
                        if linked:
                            for d in T.vectorized(Dk):
                                K[0, d] = k[row0 + (t0 - 1) * heads, d]
                            for n in T.vectorized(Dv):
                                V[0, n] = v[row0 + (t0 - 1) * heads, n]

                @T.inline
                def own_logits(t0, rows, seen):
                    columns(u, Dk, row0, heads, t0, rows, UT)
                    for t in range(BT - rows):
                        own[0, rows + t] = T.float32(0)
                    for t in range(rows):
                        for x in T.vectorized(LANES):
                            lanes[0, x] = T.float32(0)
                        for e in T.unroll(Dk // LANES):
                            for x in T.vectorized(LANES):
                                total[e * LANES + x] = total[e * LANES + x] + K[lead + t, e * LANES + x]
                                lanes[0, x] = (
                                    lanes[0, x] + total[e * LANES + x] * u[row0 + (t0 + t) * heads, e * LANES + x]
                                )
                        own[0, t] = T.float32(0)
                        for x in T.unroll(LANES):
                            own[0, t] = own[0, t] + lanes[0, x]
                        own[0, t] = own[0, t] / T.cast(seen + t + 1, "float32")

                # W[lead + j, t] = (q_t . k_j) * (weight of token j in the state of token t) * gate of the own segment.
                @T.inline
                def weigh(t0, rows):
                    for jj in range((BT + lead + JR - 1) // JR):
                        for tt in range(BT // TL):
                            if jj * JR - lead < (tt + 1) * TL:
                                scores(K, jj * JR, jj * JR + JR - 1, QT, W, jj * JR, tt * TL)
                    if swla:
                        for j in range(BT + 1):
                            token_gates[0, j] = T.float32(1)
                            token_gates[1, j] = T.float32(0)
                            token_gates[2, j] = T.float32(0)
                        for j in range(rows):
                            token_gates[0, j] = exp(g[row0 + (t0 + j) * heads])
                            token_gates[1, j] = beta[row0 + (t0 + j) * heads]
                            token_gates[2, j] = lam[row0 + (t0 + j) * heads]
                        for tb in range(BT // LANES):
                            for x in T.vectorized(LANES):
                                lanes[0, x] = T.float32(0)
                            for i in range(BT):
                                j: T.let = BT - 1 - i
                                for x in T.vectorized(LANES):
                                    lanes[1, x] = lanes[0, x]
                                    lanes[0, x] = T.Select(
                                        tb * LANES + x == j, T.float32(1), lanes[0, x] * token_gates[0, j + 1]
                                    )
                                    lanes[2, x] = token_gates[2, j] * lanes[0, x] + token_gates[1, j + 1] * lanes[1, x]
                                    W[1 + j, tb * LANES + x] = T.Select(
                                        tb * LANES + x >= j,
                                        W[1 + j, tb * LANES + x] * lanes[2, x] * own[0, tb * LANES + x],
                                        T.float32(0),
                                    )
                                token_gates[3, 1 + j] = lanes[2, LANES - 1]
                            token_gates[3, 0] = token_gates[1, 0] * lanes[0, LANES - 1]
                            for x in T.vectorized(LANES):
                                W[0, tb * LANES + x] = (
                                    W[0, tb * LANES + x] * token_gates[1, 0] * lanes[0, x] * own[0, tb * LANES + x]
                                )
                                own[1, tb * LANES + x] = own[0, tb * LANES + x] * lanes[0, x] * token_gates[0, 0]
                            lanes[3, 0] = lanes[0, LANES - 1] * token_gates[0, 0]
                    else:
                        for j in range(BT):
                            for tb in range(BT // LANES):
                                for x in T.vectorized(LANES):
                                    W[j, tb * LANES + x] = T.Select(
                                        tb * LANES + x >= j, W[j, tb * LANES + x] * own[0, tb * LANES + x], T.float32(0)
                                    )

                # The running state at the end of a chunk.
                @T.inline
                def advance():
                    if swla:
                        for j in range(BT + 1):
                            for d in T.vectorized(Dk):
                                K[j, d] = K[j, d] * token_gates[3, j]
                        for d in range(Dk):
                            for n in T.vectorized(Dv):
                                M[d, n] = M[d, n] * lanes[3, 0]
                    for dd in range(Dk // SR):
                        for nn in range(Dv // SC):
                            write(K, 0, V, 0, BT + lead, M, dd * SR, nn * SC, own, 0, False, False)

                for d in range(Dk):
                    for n in T.vectorized(Dv):
                        M[d, n] = T.float32(0)
                for d in T.vectorized(Dk):
                    total[d] = T.float32(0)
                if checkpoint:
                    if past > 0:
                        for d in range(Dk):
                            for n in T.vectorized(Dv):
                                M[d, n] = states[(base + past - 1) * Dk + d, n]
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
                    tiles: T.let = (rows + MR - 1) // MR
                    pack(t0, rows, T.Or(c > 0, T.And(checkpoint, past > 0)))
                    if routed:
                        own_logits(t0, rows, c * BT)
                        for ii in range((past + JR - 1) // JR):
                            for tt in range(BT // TL):
                                scores(means, base + ii * JR, base + past - 1, UT, gamma, ii * JR, tt * TL)
                        if chooses:
                            at: T.let = c * BT if formulation == "gather" else 0
                            for tb in range(BT // LANES):
                                choose(gamma, past, picks, tb * LANES, lanes, best, chosen, value, at + tb * LANES)
                            for tb in range(BT // LANES):
                                softmax(own, value, picks, at + tb * LANES, tb * LANES, scale, lanes)
                            if formulation != "gather":
                                for i in range(past):
                                    for t in T.vectorized(BT):
                                        gamma[i, t] = T.float32(0)
                                for p in range(picks):
                                    for t in range(BT):
                                        gamma[chosen[p, t], t] = value[p, t]
                        else:
                            for tb in range(BT // LANES):
                                softmax(own, gamma, past, tb * LANES, tb * LANES, scale, lanes)
                    else:
                        for t in T.vectorized(BT):
                            own[0, t] = scale / T.cast(past + 1, "float32") if averages else scale
                    if not swla:
                        for t in T.vectorized(BT):
                            own[1, t] = own[0, t]
                    weigh(t0, rows)

                    @T.inline
                    def from_tokens(t, n):
                        intra(W, 0, V, 0, lead + T.min(t + MR, BT), C, t, n, own, 0, False, True)

                    over_tiles(tiles, from_tokens)
                    if T.Or(c > 0, T.And(checkpoint, past > 0)):

                        @T.inline
                        def from_running(t, n):
                            product(QT, 0, M, 0, Dk, C, t, n, own, 1, True, False)

                        over_tiles(tiles, from_running)
                    if formulation == "summed":
                        if past > 0:

                            @T.inline
                            def from_sum(t, n):
                                product(QT, 0, summed, 0, Dk, C, t, n, own, 0, True, False)

                            over_tiles(tiles, from_sum)
                    if formulation == "per_segment":
                        for i in range(past):

                            @T.inline
                            def from_segment(t, n):
                                product(
                                    QT, 0, states, (base + i) * Dk, Dk, C, t, n,
                                    gamma if routed else own, i if routed else 0, True, False,
                                )  # fmt: skip

                            over_tiles(tiles, from_segment)
                    if formulation == "gated":
                        for i in range((past + panel - 1) // panel):
                            width: T.let = T.min(panel, past - i * panel)
                            for p in range(width):
                                for d in range(Dk):
                                    for t in T.vectorized(BT):
                                        A[p * Dk + d, t] = QT[d, t] * gamma[i * panel + p, t]

                            @T.inline
                            def from_panel(t, n):
                                product(
                                    A, 0, states, (base + i * panel) * Dk, width * Dk, C, t, n, own, 0, False, False
                                )

                            over_tiles(tiles, from_panel)
                    for t in range(rows):
                        for n in T.vectorized(Dv):
                            y[row0 + (t0 + t) * heads, n] = C[t, n]
                    # One task a head computes the states as it goes: what segment_states would have left.
                    if T.Or((c + 1) * BT < length, by_head):
                        advance()
                if by_head:
                    for d in range(Dk):
                        for n in T.vectorized(Dv):
                            states[(bh * N + s) * Dk + d, n] = M[d, n]
                    for d in T.vectorized(Dk):
                        means[bh * N + s, d] = total[d] / T.cast(length, "float32")

                if formulation == "gather":
                    where = T.alloc_buffer((N + 2,), "int32")
                    tokens_of = T.alloc_buffer((top_k * longest + 1,), "int32")
                    gates_of = T.alloc_buffer((top_k * longest + 1,), "float32")
                    sort_by_segment(chosen, value, picks, length, past, where, tokens_of, gates_of)
                    for i in range(past):
                        for nn in range(Dv // NR):
                            for xx in range((where[i + 1] - where[i] + MR - 1) // MR):
                                scattered(
                                    q, states, (base + i) * Dk, y, nn * NR, tokens_of, gates_of, where[i] + xx * MR,
                                    where[i + 1] - where[i] - xx * MR, row0 + begin[s] * heads, heads,
                                )  # fmt: skip

    return read_forward
