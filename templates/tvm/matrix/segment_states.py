"""End state and descriptor of every segment of a linear or SWLA memory (Eq. 2, 4, 10, 26-27), float32, on a CPU.

    M_s = sum_t w_t k_t^T v_t,   p_s = mean of k over the segment

``linear`` has w_t = 1; for ``swla`` w_t = lam_t e^{G_t} + beta_{t+1} e^{G_{t+1}} with G_t the sum of g over the rest of
the segment, and the row before the segment counts with beta_{begin} e^{G_begin} under ``checkpoint``. Segments are
independent tasks; ``checkpoint`` adds a pass that carries each state into the next one of the same sequence.
"""

from tvm.script import tirx as T

from ..flags import flags_of
from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import LANES, clear, exp, multiply, stain


class Plan:
    """Sizes and flags of one ``segment_states``."""

    def __init__(self, problem, config) -> None:
        self.Dk, self.Dv = problem.Dk, problem.Dv
        self.BT, self.MR, self.NR = config["state_chunk"], config["state_rows"], config["state_cols"]
        self.flags = flags_of(problem)
        self.lead = 1 if self.flags.gated else 0  # a chunk of gated writes starts with the row before it


def build(problem, config, target):
    """The PrimFunc ``segment_states`` for the widths of ``problem``; B, T, H and the segments are run-time values.

    ``None`` with ``parallel="head"``: there ``read_forward`` computes the states as it goes. Rows are tokens,
    ``[B*T*H, D]``; states ``[B*H*N*Dk, Dv]`` and means ``[B*H*N, Dk]`` are outputs.
    """
    if "parallel" in config and config["parallel"] == "head":
        return None
    plan, n = Plan(problem, config), sizes("R", "N", "S", "G", "tokens", "heads")
    Dk, Dv = plan.Dk, plan.Dv
    arguments = dict(
        k=f32(n.R, Dk), v=f32(n.R, Dv), g=f32(n.G), beta=f32(n.G), lam=f32(n.G),
        begin=i32(n.N), end=i32(n.N), first=i32(n.N), tokens=n.tokens, heads=n.heads,
        states=f32(n.S * Dk, Dv), means=f32(n.S, Dk),
    )  # fmt: skip

    def body(c: Values) -> None:
        every_segment(plan, c)
        if plan.flags.checkpoint:
            carry_states(plan, c)

    return prim_func("segment_states", arguments, n, body)


def every_segment(plan: Plan, c: Values) -> None:
    """The state and the descriptor of each segment by itself."""
    Dk, Dv, BT = plan.Dk, plan.Dv, plan.BT
    begin, end, states, means = c.begin, c.end, c.states, c.means

    @emit
    def tasks():
        for task in T.parallel(c.S):
            bh: T.let = task // c.N
            s: T.let = task % c.N
            row0: T.let = bh // c.heads * c.tokens * c.heads + bh % c.heads
            w = T.meta_var(
                scratch(
                    C=f32(Dk, Dv), K=f32(BT + 1, Dk), V=f32(BT + 1, Dv), total=f32(Dk), weight=f32(BT + 1), decay=f32(1)
                )
            )
            clear(w.C, 0, Dk, Dv)
            for d in T.vectorized(Dk):
                w.total[d] = T.float32(0)
            for chunk in range((end[s] - begin[s] + BT - 1) // BT):
                t0: T.let = begin[s] + chunk * BT
                rows: T.let = T.min(BT, end[s] - t0)
                at = T.meta_var(c.plus(w, s=s, row0=row0, t0=t0, rows=rows))
                if plan.flags.gated:
                    forget(plan, at, T.Or(chunk > 0, T.And(plan.flags.checkpoint, s != c.first[s])))
                write(plan, at)
            for d in range(Dk):
                for n in T.vectorized(Dv):
                    states[task * Dk + d, n] = w.C[d, n]
            for d in T.vectorized(Dk):
                means[task, d] = w.total[d] / T.cast(end[s] - begin[s], "float32")


def forget(plan: Plan, at: Values, linked) -> None:
    """What a chunk's gates do to the state so far; weights of its rows, and the row before where it is ``linked``."""
    Dk, Dv = plan.Dk, plan.Dv
    g, beta, lam, k, v, heads = at.g, at.beta, at.lam, at.k, at.v, at.heads
    C, K, V, weight, decay, row0, t0, rows = at.C, at.K, at.V, at.weight, at.decay, at.row0, at.t0, at.rows

    @emit
    def gates():
        decay[0] = T.float32(1)
        for i in range(rows):
            j: T.let = rows - 1 - i
            weight[j + 1] = lam[row0 + (t0 + j) * heads] * decay[0]
            if i > 0:
                weight[j + 1] = weight[j + 1] + beta[row0 + (t0 + j + 1) * heads] * weight[0]
            weight[0] = decay[0]
            decay[0] = decay[0] * exp(g[row0 + (t0 + j) * heads])
        for d in T.vectorized(Dk):
            K[0, d] = T.float32(0)
        for n in T.vectorized(Dv):
            V[0, n] = T.float32(0)
        if linked:
            for d in T.vectorized(Dk):
                K[0, d] = weight[0] * beta[row0 + t0 * heads] * k[row0 + (t0 - 1) * heads, d]
            for n in T.vectorized(Dv):
                V[0, n] = v[row0 + (t0 - 1) * heads, n]
        else:
            decay[0] = decay[0] + stain(beta[row0 + t0 * heads])
        for d in range(Dk):
            for n in T.vectorized(Dv):
                C[d, n] = decay[0] * C[d, n]


def write(plan: Plan, at: Values) -> None:
    """Add a chunk's rows to the state and to the sum of keys."""
    Dk, Dv, MR, NR, lead, gated = plan.Dk, plan.Dv, plan.MR, plan.NR, plan.lead, plan.flags.gated
    k, v, heads, C, K, V, total, weight = at.k, at.v, at.heads, at.C, at.K, at.V, at.total, at.weight
    row0, t0, rows = at.row0, at.t0, at.rows
    tile = multiply(MR, NR, 1)

    @emit
    def rows_and_tiles():
        for j in range(rows):
            for d in T.vectorized(Dk):
                total[d] = total[d] + k[row0 + (t0 + j) * heads, d]
            for d in T.vectorized(Dk):
                if gated:
                    K[j + 1, d] = weight[j + 1] * k[row0 + (t0 + j) * heads, d]
                else:
                    K[j, d] = k[row0 + (t0 + j) * heads, d]
            for n in T.vectorized(Dv):
                V[j + lead, n] = v[row0 + (t0 + j) * heads, n]
        for nn in range(Dv // NR):
            for dd in range(Dk // MR):
                tile(
                    A=K, a0=0, B=V, b0=0, steps=rows + lead, C=C, r0=dd * MR, n0=nn * NR, G=C, g0=0, gated=False,
                    fresh=False,
                )  # fmt: skip


def carry_states(plan: Plan, c: Values) -> None:
    """Add what is left of each state at the end of the next segment, LANES rows of a head's states a task."""
    Dk, Dv = plan.Dk, plan.Dv
    states = c.states

    @emit
    def lines():
        for line in T.parallel(c.S // c.N * (Dk // LANES)):
            bh: T.let = line // (Dk // LANES)
            d0: T.let = line % (Dk // LANES) * LANES
            w = T.meta_var(scratch(carry=f32(1)))
            row0: T.let = bh // c.heads * c.tokens * c.heads + bh % c.heads
            for s in range(c.N):
                if s != c.first[s]:
                    w.carry[0] = T.float32(1)
                    if plan.flags.gated:
                        for j in range(c.end[s] - c.begin[s]):
                            w.carry[0] = w.carry[0] * exp(c.g[row0 + (c.begin[s] + j) * c.heads])
                    for d in range(LANES):
                        for n in T.vectorized(Dv):
                            states[((bh * c.N + s) * Dk + d0 + d), n] = (
                                states[(bh * c.N + s) * Dk + d0 + d, n]
                                + w.carry[0] * states[(bh * c.N + s - 1) * Dk + d0 + d, n]
                            )
