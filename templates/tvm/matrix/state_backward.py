"""Gradients of the cached states and descriptors of a linear or SWLA memory, float32, on a CPU.

    dM^(i) = sum_t gamma_t^(i) q_t^T dy_t,   dp_i = sum_t dr_t^(i) u_t     over the tokens of later segments

Formulations: ``per_segment`` and ``gather``, which passes over the tokens whose gate is zero (ssc); ``summed``, where
gates do not depend on i (residual, mean): one product a segment, then sums over the later segments. Under
``checkpoint`` a state also starts the next segment; a last pass carries that gradient backwards.
"""

from tvm.script import tirx as T

from .backward_tiles import outer, prefetch
from .tiles import LANES, exp


def build(problem, config, target):
    """The PrimFunc ``state_backward`` for the widths of ``problem``; B, T, H and the segments are run-time values.

    Arguments of the kernel: dy ``[B*T*H, Dv]``, q, u ``[B*T*H, Dk]``, g ``[B*T*H]``; gamma, dr, own of
    ``read_backward``; begin, end, first ``[N]`` int32; T, H, scale; scratch ``[P, Dv]`` with B*H*N*Dk rows for
    ``summed`` and as many for checkpoint; then the outputs: gradients of the states ``[B*H*N*Dk, Dv]``, all that
    follows a segment's end included, and of the descriptors ``[B*H*N, Dk]`` (left alone where there are no logits).
    """
    Dk, Dv = problem.Dk, problem.Dv
    ST, SR, SC = config["state_chunk"], config["state_rows"], config["state_cols"]
    panel = config["panel"]
    formulation = config["formulation"]
    swla = problem.recurrence == "swla"
    checkpoint = problem.state_init == "checkpoint"
    averages = problem.aggregation == "mean"
    tile = outer(SR, SC)
    share = -(-ST * SR // Dk)  # of a chunk's rows, fetched while a row of tiles is computed

    @T.prim_func(s_tir=True)
    def state_backward(
        dy_: T.handle, q_: T.handle, u_: T.handle, g_: T.handle, gamma_: T.handle, dr_: T.handle, own_: T.handle,
        begin_: T.handle, end_: T.handle, first_: T.handle, tokens: T.int32, heads: T.int32, scale: T.float32,
        parts_: T.handle, dstates_: T.handle, dmeans_: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "state_backward", "tirx.noalias": True})
        R, N, S, G, X, J, P = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        dy = T.match_buffer(dy_, (R, Dv), "float32")
        q = T.match_buffer(q_, (R, Dk), "float32")
        u = T.match_buffer(u_, (R, Dk), "float32")
        g = T.match_buffer(g_, (G,), "float32")
        gammas = T.match_buffer(gamma_, (X,), "float32")
        drs = T.match_buffer(dr_, (X,), "float32")
        owns = T.match_buffer(own_, (J, tokens), "float32")
        begin = T.match_buffer(begin_, (N,), "int32")
        end = T.match_buffer(end_, (N,), "int32")
        first = T.match_buffer(first_, (N,), "int32")
        parts = T.match_buffer(parts_, (P, Dv), "float32")
        dstates = T.match_buffer(dstates_, (S * Dk, Dv), "float32")
        dmeans = T.match_buffer(dmeans_, (S, Dk), "float32")

        @T.inline
        def clear(C, state):
            for d in range(Dk):
                for n in T.vectorized(Dv):
                    C[state * Dk + d, n] = T.float32(0)

        @T.inline
        def add(A, Y, rows, C, state):
            for nn in range(Dv // SC):
                for dd in range(Dk // SR):
                    tile(A, Y, rows, C, state * Dk, dd * SR, nn * SC)

        @T.inline
        def fetch(row0, t, count):
            prefetch(q, Dk, row0, t, count, tokens, heads, 0)
            prefetch(u, Dk, row0, t, count, tokens, heads, 0)
            prefetch(dy, Dv, row0, t, count, tokens, heads, 0)

        @T.inline
        def copy_values(Y, at, row):
            for n in T.vectorized(Dv):
                Y[at, n] = dy[row, n]

        # parts[at] = sum over the tokens of segment s of weight * q^T dy.
        @T.inline
        def segment_sum(bh, s, at, through):
            A = T.alloc_buffer((ST, Dk), "float32")
            Y = T.alloc_buffer((ST, Dv), "float32")
            weight = T.alloc_buffer((2,), "float32")
            row0: T.let = bh // heads * tokens * heads + bh % heads
            clear(parts, at)
            weight[1] = T.float32(1)
            for c in range((end[s] - begin[s] + ST - 1) // ST):
                t0: T.let = begin[s] + c * ST
                rows: T.let = T.min(ST, end[s] - t0)
                for t in range(rows):
                    row: T.let = row0 + (t0 + t) * heads
                    weight[0] = scale
                    if through:  # the segment's own tokens, through the state that they started from
                        if swla:
                            weight[1] = weight[1] * exp(g[row])
                        weight[0] = scale * weight[1] * owns[bh * 3, t0 + t]
                    elif averages:
                        weight[0] = scale / T.cast(s - first[s] + 1, "float32")
                    for d in T.vectorized(Dk):
                        A[t, d] = weight[0] * q[row, d]
                    copy_values(Y, t, row)
                add(A, Y, rows, parts, at)

        if formulation == "summed":
            for task in T.parallel(S):
                segment_sum(task // N, task % N, task, False)
            for line in T.parallel(S // N * (Dk // LANES)):
                bh: T.let = line // (Dk // LANES)
                d0: T.let = line % (Dk // LANES) * LANES
                for turn in range(N):
                    i: T.let = N - 1 - turn
                    for d in range(LANES):
                        for n in T.vectorized(Dv):
                            dstates[(bh * N + i) * Dk + d0 + d, n] = T.float32(0)
                    if i + 1 < N:
                        if first[i + 1] <= i:
                            for d in range(LANES):
                                for n in T.vectorized(Dv):
                                    dstates[(bh * N + i) * Dk + d0 + d, n] = (
                                        dstates[(bh * N + i + 1) * Dk + d0 + d, n]
                                        + parts[(bh * N + i + 1) * Dk + d0 + d, n]
                                    )
        else:
            for task in T.parallel(S // N * ((N + panel - 1) // panel)):
                groups: T.let = (N + panel - 1) // panel
                bh: T.let = task // groups
                turn: T.let = task % groups
                # Early states are read more: pairing them with late ones balances contiguous shares of the tasks.
                i0: T.let = T.if_then_else(turn % 2 == 0, turn // 2, groups - 1 - turn // 2) * panel
                row0: T.let = bh // heads * tokens * heads + bh % heads
                members: T.let = T.min(panel, N - i0)
                A = T.alloc_buffer((ST, Dk), "float32")
                Y = T.alloc_buffer((ST, Dv), "float32")
                packed = T.alloc_buffer((1,), "int32")
                for p in range(members):
                    clear(dstates, bh * N + i0 + p)
                    for d in T.vectorized(Dk):
                        dmeans[bh * N + i0 + p, d] = T.float32(0)

                if formulation == "gather":
                    for p in range(members):
                        i: T.let = i0 + p
                        packed[0] = 0
                        for later in range(N - 1 - i):
                            s: T.let = i + 1 + later
                            if first[s] <= i:
                                at: T.let = (bh * tokens + begin[s]) * N + i * (end[s] - begin[s])
                                for t in range(end[s] - begin[s]):
                                    if gammas[at + t] != T.float32(0):
                                        row: T.let = row0 + (begin[s] + t) * heads
                                        for d in T.vectorized(Dk):
                                            A[packed[0], d] = scale * gammas[at + t] * q[row, d]
                                            dmeans[bh * N + i, d] = dmeans[bh * N + i, d] + drs[at + t] * u[row, d]
                                        copy_values(Y, packed[0], row)
                                        packed[0] = packed[0] + 1
                                        if packed[0] == ST:
                                            add(A, Y, ST, dstates, bh * N + i)
                                            packed[0] = 0
                        add(A, Y, packed[0], dstates, bh * N + i)
                else:
                    for later in range(N - 1 - i0):
                        s: T.let = i0 + 1 + later
                        length: T.let = end[s] - begin[s]
                        if first[s] < i0 + members:
                            for c in range((length + ST - 1) // ST):
                                t0: T.let = begin[s] + c * ST
                                rows: T.let = T.min(ST, end[s] - t0)
                                for t in range(rows):
                                    copy_values(Y, t, row0 + (t0 + t) * heads)
                                for p in range(members):
                                    i: T.let = i0 + p
                                    at: T.let = (bh * tokens + begin[s]) * N + i * length + c * ST
                                    if T.And(first[s] <= i, i < s):
                                        for t in range(rows):
                                            for d in T.vectorized(Dk):
                                                A[t, d] = scale * gammas[at + t] * q[row0 + (t0 + t) * heads, d]
                                        for dd in range(Dk // SR):
                                            if p == 0:
                                                fetch(row0, t0 + ST + dd * share, share)
                                            for nn in range(Dv // SC):
                                                tile(A, Y, rows, dstates, (bh * N + i) * Dk, dd * SR, nn * SC)
                                        total = T.alloc_buffer((1, Dk), "float32", scope="local")
                                        for d in T.vectorized(Dk):
                                            total[0, d] = T.float32(0)
                                        for t in range(rows):
                                            for d in T.vectorized(Dk):
                                                total[0, d] = total[0, d] + drs[at + t] * u[row0 + (t0 + t) * heads, d]
                                        for d in T.vectorized(Dk):
                                            dmeans[bh * N + i, d] = dmeans[bh * N + i, d] + total[0, d]
        if checkpoint:
            after: T.let = P // Dk - S  # where the gradients of the states that segments start from stand in parts
            for task in T.parallel(S):
                if task % N != first[task % N]:
                    segment_sum(task // N, task % N, after + task, True)
            for line in T.parallel(S // N * (Dk // LANES)):
                bh: T.let = line // (Dk // LANES)
                d0: T.let = line % (Dk // LANES) * LANES
                carry = T.alloc_buffer((1,), "float32")
                row0: T.let = bh // heads * tokens * heads + bh % heads
                for turn in range(N - 1):
                    s: T.let = N - 1 - turn
                    if s != first[s]:
                        carry[0] = T.float32(1)
                        if swla:
                            for j in range(end[s] - begin[s]):
                                carry[0] = carry[0] * exp(g[row0 + (begin[s] + j) * heads])
                        for d in range(LANES):
                            for n in T.vectorized(Dv):
                                dstates[(bh * N + s - 1) * Dk + d0 + d, n] = (
                                    dstates[(bh * N + s - 1) * Dk + d0 + d, n]
                                    + parts[(after + bh * N + s) * Dk + d0 + d, n]
                                    + carry[0] * dstates[(bh * N + s) * Dk + d0 + d, n]
                                )

    return state_backward
