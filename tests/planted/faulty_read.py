"""A naive read of ``residual`` over an independent linear memory (Eq. 6-7), and the same with a fault on purpose.

That read is linear attention over the whole row, so a loop over the tokens computes it; with ``fault="none"`` it is
right.
"""

from tvm.script import tirx as T

FAULTS = ("none", "build", "abort", "wild", "hang", "hang_late", "off", "forgets", "unwritten", "raise")


def build(problem, fault):
    """The PrimFunc ``read_forward``, with the arguments of the real template."""
    assert fault in FAULTS
    Dk, Dv = problem.Dk, problem.Dv
    factor = 1.0001 if fault == "off" else 1.0

    @T.prim_func(s_tir=True)
    def read_forward(
        q_: T.handle, u_: T.handle, k_: T.handle, v_: T.handle, g_: T.handle, beta_: T.handle, lam_: T.handle,
        states_: T.handle, means_: T.handle, begin_: T.handle, end_: T.handle, first_: T.handle,
        tokens: T.int32, heads: T.int32, longest: T.int32, top_k: T.int32, scale: T.float32, y_: T.handle,
    ):  # fmt: skip
        T.func_attr({"global_symbol": "read_forward", "tirx.noalias": True})
        R, N = T.int32(), T.int32()
        q = T.match_buffer(q_, (R, Dk), "float32")
        k = T.match_buffer(k_, (R, Dk), "float32")
        v = T.match_buffer(v_, (R, Dv), "float32")
        begin = T.match_buffer(begin_, (N,), "int32")
        end = T.match_buffer(end_, (N,), "int32")
        y = T.match_buffer(y_, (R, Dv), "float32")
        if fault == "raise":
            assert tokens < 0, "planted: refused by the kernel"
        if fault == "abort":
            T.evaluate(T.call_extern("int32", "abort"))
        if fault == "build":
            for n in T.vectorized(tokens):
                y[0, n] = T.call_extern("float32", "no_such_function", q[0, n])
        if fault == "wild":
            for far in range(1 << 24):
                y[R + (1 << 26) + far * 2, 0] = T.float32(1)
        for bh in T.parallel(R // tokens):
            row0: T.let = bh // heads * tokens * heads + bh % heads
            M = T.alloc_buffer((Dk, Dv), "float32")
            line = T.alloc_buffer((Dv,), "float32")
            turns = T.alloc_buffer((1,), "int32")
            for d in range(Dk):
                for n in T.vectorized(Dv):
                    M[d, n] = T.float32(0)
            for s in range(N):
                for i in range(end[s] - begin[s]):
                    row: T.let = row0 + (begin[s] + i) * heads
                    if fault == "forgets":
                        if s > 0 and i == 0:
                            for d in range(Dk):
                                for n in T.vectorized(Dv):
                                    M[d, n] = T.float32(0)
                    for n in T.vectorized(Dv):
                        line[n] = T.float32(0)
                    for d in range(Dk):
                        for n in T.vectorized(Dv):
                            M[d, n] = M[d, n] + k[row, d] * v[row, n]
                            line[n] = line[n] + q[row, d] * M[d, n] * scale * T.float32(factor)
                    if fault == "unwritten":
                        if T.Or(begin[s] + i + 1 < tokens, tokens == 1):
                            for n in T.vectorized(Dv):
                                y[row, n] = line[n]
                    else:
                        for n in T.vectorized(Dv):
                            y[row, n] = line[n]
            if fault == "hang" or fault == "hang_late":
                if fault == "hang" or tokens >= 1024:
                    turns[0] = 0
                    while turns[0] >= 0:
                        turns[0] = T.bitwise_and(turns[0] + 1, 1023)
                        y[row0, 0] = y[row0, 0] + T.cast(turns[0], "float32")

    return read_forward
