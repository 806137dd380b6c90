"""End state and descriptor of every segment of a linear or SWLA memory (Eq. 2, 4, 10, 26-27), float32, on a CPU.

    M_s = sum_t w_t k_t^T v_t,   p_s = mean of k over the segment

``linear`` has w_t = 1; for ``swla`` w_t = lam_t e^{G_t} + beta_{t+1} e^{G_{t+1}} with G_t the sum of g over the rest of
the segment, and the row before the segment counts with beta_{begin} e^{G_begin} under ``checkpoint``. Segments are
independent tasks; ``checkpoint`` adds a pass that carries each state into the next one of the same sequence.
"""

from tvm.script import tirx as T

from .tiles import LANES, exp, multiply


def build(problem, config, target):
    """The PrimFunc ``segment_states`` for the widths of ``problem``; B, T, H and the segments are run-time values.

    ``None`` with ``parallel="head"``: there ``read_forward`` computes the states as it goes.

    Arguments of the kernel: k ``[B*T*H, Dk]``, v ``[B*T*H, Dv]``, g, beta, lam ``[B*T*H]``; begin, end, first ``[N]``
    int32; T and H; then the outputs states ``[B*H*N*Dk, Dv]`` and means ``[B*H*N, Dk]``.
    """
    if "parallel" in config and config["parallel"] == "head":
        return None
    Dk, Dv = problem.Dk, problem.Dv
    BT, MR, NR = config["state_chunk"], config["state_rows"], config["state_cols"]
    swla = problem.recurrence == "swla"
    checkpoint = problem.state_init == "checkpoint"
    tile = multiply(MR, NR, 1)

    @T.prim_func(s_tir=True)
    def segment_states(
        k_: T.handle, v_: T.handle, g_: T.handle, beta_: T.handle, lam_: T.handle,
        begin_: T.handle, end_: T.handle, first_: T.handle, tokens: T.int32, heads: T.int32,
        states_: T.handle, means_: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "segment_states", "tirx.noalias": True})
        R, N, S, G = T.int32(), T.int32(), T.int32(), T.int32()
        k = T.match_buffer(k_, (R, Dk), "float32")
        v = T.match_buffer(v_, (R, Dv), "float32")
        g = T.match_buffer(g_, (G,), "float32")
        beta = T.match_buffer(beta_, (G,), "float32")
        lam = T.match_buffer(lam_, (G,), "float32")
        begin = T.match_buffer(begin_, (N,), "int32")
        end = T.match_buffer(end_, (N,), "int32")
        first = T.match_buffer(first_, (N,), "int32")
        states = T.match_buffer(states_, (S * Dk, Dv), "float32")
        means = T.match_buffer(means_, (S, Dk), "float32")
        for task in T.parallel(S):
            bh: T.let = task // N
            s: T.let = task % N
            row0: T.let = bh // heads * tokens * heads + bh % heads
            C = T.alloc_buffer((Dk, Dv), "float32")
            Kp = T.alloc_buffer((BT + 1, Dk), "float32")
            Vp = T.alloc_buffer((BT + 1, Dv), "float32")
            total = T.alloc_buffer((Dk,), "float32")
            weight = T.alloc_buffer((BT + 1,), "float32")
            decay = T.alloc_buffer((1,), "float32")
            for d in range(Dk):
                for n in T.vectorized(Dv):
                    C[d, n] = T.float32(0)
            for d in T.vectorized(Dk):
                total[d] = T.float32(0)
            for c in range((end[s] - begin[s] + BT - 1) // BT):
                t0: T.let = begin[s] + c * BT
                rows: T.let = T.min(BT, end[s] - t0)
                if swla:
                    decay[0] = T.float32(1)
                    for i in range(rows):
                        j: T.let = rows - 1 - i
                        weight[j + 1] = lam[row0 + (t0 + j) * heads] * decay[0]
                        if i > 0:
                            weight[j + 1] = weight[j + 1] + beta[row0 + (t0 + j + 1) * heads] * weight[0]
                        weight[0] = decay[0]
                        decay[0] = decay[0] * exp(g[row0 + (t0 + j) * heads])
                    for d in T.vectorized(Dk):
                        Kp[0, d] = T.float32(0)
                    for n in T.vectorized(Dv):
                        Vp[0, n] = T.float32(0)
                    if T.Or(c > 0, T.And(checkpoint, s != first[s])):
                        for d in T.vectorized(Dk):
                            Kp[0, d] = weight[0] * beta[row0 + t0 * heads] * k[row0 + (t0 - 1) * heads, d]
                        for n in T.vectorized(Dv):
                            Vp[0, n] = v[row0 + (t0 - 1) * heads, n]
                    for d in range(Dk):
                        for n in T.vectorized(Dv):
                            C[d, n] = decay[0] * C[d, n]
                for j in range(rows):
                    for d in T.vectorized(Dk):
                        total[d] = total[d] + k[row0 + (t0 + j) * heads, d]
                    if swla:
                        for d in T.vectorized(Dk):
                            Kp[j + 1, d] = weight[j + 1] * k[row0 + (t0 + j) * heads, d]
                    else:
                        for d in T.vectorized(Dk):
                            Kp[j, d] = k[row0 + (t0 + j) * heads, d]
                    if swla:
                        for n in T.vectorized(Dv):
                            Vp[j + 1, n] = v[row0 + (t0 + j) * heads, n]
                    else:
                        for n in T.vectorized(Dv):
                            Vp[j, n] = v[row0 + (t0 + j) * heads, n]
                for nn in range(Dv // NR):
                    for dd in range(Dk // MR):
                        if swla:
                            tile(Kp, 0, Vp, 0, rows + 1, C, dd * MR, nn * NR, C, 0, False, False)
                        else:
                            tile(Kp, 0, Vp, 0, rows, C, dd * MR, nn * NR, C, 0, False, False)
            for d in range(Dk):
                for n in T.vectorized(Dv):
                    states[task * Dk + d, n] = C[d, n]
            for d in T.vectorized(Dk):
                means[task, d] = total[d] / T.cast(end[s] - begin[s], "float32")
        if checkpoint:
            for line in T.parallel(S // N * (Dk // LANES)):
                bh: T.let = line // (Dk // LANES)
                d0: T.let = line % (Dk // LANES) * LANES
                carry = T.alloc_buffer((1,), "float32")
                row0: T.let = bh // heads * tokens * heads + bh % heads
                for s in range(N):
                    if s != first[s]:
                        carry[0] = T.float32(1)
                        if swla:
                            for j in range(end[s] - begin[s]):
                                carry[0] = carry[0] * exp(g[row0 + (begin[s] + j) * heads])
                        for d in range(LANES):
                            for n in T.vectorized(Dv):
                                states[((bh * N + s) * Dk + d0 + d), n] = (
                                    states[(bh * N + s) * Dk + d0 + d, n]
                                    + carry[0] * states[(bh * N + s - 1) * Dk + d0 + d, n]
                                )

    return segment_states
