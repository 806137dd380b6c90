"""Gradients of the cached states and descriptors of a linear or SWLA memory, float32, on a CPU.

    dM^(i) = sum_t gamma_t^(i) q_t^T dy_t,   dp_i = sum_t dr_t^(i) u_t     over the tokens of later segments

Formulations: ``per_segment`` and ``gather``, which passes over the tokens whose gate is zero (ssc); ``summed``, where
gates do not depend on i (residual, mean): one product a segment, then sums over the later segments. Under
``checkpoint`` a state also starts the next segment; a last pass carries that gradient backwards.
"""

from tvm.script import tirx as T

from ..flags import flags_of
from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import LANES, add_up, clear, exp, finite, read_at_all, weighed
from .backward_tiles import fetch, outer


class Plan:
    """Sizes and flags of one ``state_backward``."""

    def __init__(self, problem, config) -> None:
        self.Dk, self.Dv = problem.Dk, problem.Dv
        self.ST, self.SR, self.SC = config["chunk"], config["rows"], config["cols"]
        self.formulation, self.panel = config["formulation"], config["panel"]
        self.flags = flags_of(problem)


def build(problem, config, target):
    """The PrimFunc ``state_backward`` for the widths of ``problem``; B, T, H and the segments are run-time values.

    Rows are tokens, ``[B*T*H, D]``; gamma, dr and own are those of ``read_backward``; parts ``[P, Dv]`` is scratch with
    B*H*N*Dk rows for ``summed`` and as many for checkpoint. The outputs are the gradients of the states
    ``[B*H*N*Dk, Dv]``, all that follows a segment's end included, and of the descriptors ``[B*H*N, Dk]`` (left alone
    where there are no logits).
    """
    plan, n = Plan(problem, config), sizes("R", "N", "S", "G", "X", "J", "P", "tokens", "heads")
    Dk, Dv = plan.Dk, plan.Dv
    arguments = dict(
        dy=f32(n.R, Dv), q=f32(n.R, Dk), u=f32(n.R, Dk), g=f32(n.G), gamma=f32(n.X), dr=f32(n.X),
        own=f32(n.J, n.tokens), begin=i32(n.N), end=i32(n.N), first=i32(n.N), tokens=n.tokens, heads=n.heads,
        scale=T.float32, parts=f32(n.P, Dv), dstates=f32(n.S * Dk, Dv), dmeans=f32(n.S, Dk),
    )  # fmt: skip

    def body(x: Values) -> None:
        if plan.formulation == "summed":
            sums_of_segments(plan, x)
            sums_of_later(plan, x)
        else:
            every_panel(plan, x)
        if plan.flags.checkpoint:
            carry_back(plan, x)

    return prim_func("state_backward", arguments, n, body)


def add(plan: Plan, x: Values, *, A, Y, rows, C, state) -> None:
    """Add A^T Y of ``rows`` packed tokens to a state's gradient in C."""
    Dk, Dv, SR, SC = plan.Dk, plan.Dv, plan.SR, plan.SC
    tile = outer(SR, SC)

    @emit
    def tiles():
        for nn in range(Dv // SC):
            for dd in range(Dk // SR):
                tile(A=A, B=Y, steps=rows, C=C, c0=state * Dk, d0=dd * SR, n0=nn * SC)


def segment_sum(plan: Plan, x: Values, *, bh, s, to, through) -> None:
    """parts[to] = sum over the tokens of segment s of weight * q^T dy.

    With ``through``, the weight is that of the state which the segment started from, in its own tokens.
    """
    Dk, Dv, ST, gated, averages = plan.Dk, plan.Dv, plan.ST, plan.flags.gated, plan.flags.averages
    heads, tokens, scale = x.heads, x.tokens, x.scale

    @emit
    def chunks():
        w = T.meta_var(scratch(A=f32(ST, Dk), Y=f32(ST, Dv), weight=f32(2)))
        weight = T.meta_var(w.weight)
        row0: T.let = bh // heads * tokens * heads + bh % heads
        clear(x.parts, to * Dk, Dk, Dv)
        weight[1] = T.float32(1)
        for c in range((x.end[s] - x.begin[s] + ST - 1) // ST):
            t0: T.let = x.begin[s] + c * ST
            rows: T.let = T.min(ST, x.end[s] - t0)
            for t in range(rows):
                row: T.let = row0 + (t0 + t) * heads
                weight[0] = scale
                if through:
                    if gated:
                        weight[1] = weight[1] * exp(x.g[row])
                    weight[0] = scale * weight[1] * x.own[bh * 3, t0 + t]
                elif averages:
                    weight[0] = scale / T.cast(s - x.first[s] + 1, "float32")
                for d in T.vectorized(Dk):
                    w.A[t, d] = weight[0] * x.q[row, d]
                for n in T.vectorized(Dv):
                    w.Y[t, n] = x.dy[row, n]
            add(plan, x, A=w.A, Y=w.Y, rows=rows, C=x.parts, state=to)


def sums_of_segments(plan: Plan, x: Values) -> None:
    """parts of every segment, by itself."""

    @emit
    def tasks():
        for task in T.parallel(x.S):
            segment_sum(plan, x, bh=task // x.N, s=task % x.N, to=task, through=False)


def sums_of_later(plan: Plan, x: Values) -> None:
    """dstates: the parts of all later segments of the same sequence, LANES rows of a head's states a task."""
    Dk, Dv, N, first, dstates, parts = plan.Dk, plan.Dv, x.N, x.first, x.dstates, x.parts

    @emit
    def lines():
        for line in T.parallel(x.S // N * (Dk // LANES)):
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


def every_panel(plan: Plan, x: Values) -> None:
    """One task a panel of segments of a head, whose states' and descriptors' gradients it adds up over later tokens."""
    Dk, Dv, ST, N, panel, heads, tokens = plan.Dk, plan.Dv, plan.ST, x.N, plan.panel, x.heads, x.tokens

    @emit
    def tasks():
        for task in T.parallel(x.S // N * ((N + panel - 1) // panel)):
            groups: T.let = (N + panel - 1) // panel
            bh: T.let = task // groups
            turn: T.let = task % groups
            # Early states are read more: pairing them with late ones balances contiguous shares of the tasks.
            i0: T.let = T.if_then_else(turn % 2 == 0, turn // 2, groups - 1 - turn // 2) * panel
            row0: T.let = bh // heads * tokens * heads + bh % heads
            members: T.let = T.min(panel, N - i0)
            w = T.meta_var(scratch(A=f32(ST, Dk), Y=f32(ST, Dv), packed=i32(1), sum_of_dy=f32(1)))
            for p in range(members):
                clear(x.dstates, (bh * N + i0 + p) * Dk, Dk, Dv)
                for d in T.vectorized(Dk):
                    x.dmeans[bh * N + i0 + p, d] = T.float32(0)
            at = T.meta_var(x.plus(w, bh=bh, i0=i0, row0=row0, members=members))
            if plan.formulation == "gather":
                for p in range(members):
                    i: T.let = i0 + p
                    gathered(plan, at, i=i)
            else:
                later_segments(plan, at)


def gathered(plan: Plan, at: Values, *, i) -> None:
    """The gradients of state and descriptor ``i``, from the tokens that chose it, ST at a time."""
    Dk, Dv, ST, N, bh = plan.Dk, plan.Dv, plan.ST, at.N, at.bh
    A, Y, packed, begin, end, gamma, dr = at.A, at.Y, at.packed, at.begin, at.end, at.gamma, at.dr

    @emit
    def tokens():
        packed[0] = 0
        for later in range(N - 1 - i):
            s: T.let = i + 1 + later
            if at.first[s] <= i:
                saved: T.let = (bh * at.tokens + begin[s]) * N + i * (end[s] - begin[s])
                for t in range(end[s] - begin[s]):
                    if read_at_all(gamma[saved + t]):
                        row: T.let = at.row0 + (begin[s] + t) * at.heads
                        for d in T.vectorized(Dk):
                            A[packed[0], d] = at.scale * gamma[saved + t] * at.q[row, d]
                            at.dmeans[bh * N + i, d] = at.dmeans[bh * N + i, d] + dr[saved + t] * at.u[row, d]
                        for n in T.vectorized(Dv):
                            Y[packed[0], n] = at.dy[row, n]
                        packed[0] = packed[0] + 1
                        if packed[0] == ST:
                            add(plan, at, A=A, Y=Y, rows=ST, C=at.dstates, state=bh * N + i)
                            packed[0] = 0
        add(plan, at, A=A, Y=Y, rows=packed[0], C=at.dstates, state=bh * N + i)


def later_segments(plan: Plan, at: Values) -> None:
    """The gradients of a panel's states and descriptors, from every later segment, a chunk at a time."""
    ST, N, bh, i0, row0, members = plan.ST, at.N, at.bh, at.i0, at.row0, at.members
    begin, end, first = at.begin, at.end, at.first

    @emit
    def chunks():
        for later in range(N - 1 - i0):
            s: T.let = i0 + 1 + later
            length: T.let = end[s] - begin[s]
            if first[s] < i0 + members:
                for c in range((length + ST - 1) // ST):
                    t0: T.let = begin[s] + c * ST
                    rows: T.let = T.min(ST, end[s] - t0)
                    for t in range(rows):
                        for n in T.vectorized(plan.Dv):
                            at.Y[t, n] = at.dy[row0 + (t0 + t) * at.heads, n]
                    if plan.flags.sparse:
                        add_up(at.Y, rows, plan.Dv, at.sum_of_dy)
                    for p in range(members):
                        i: T.let = i0 + p
                        saved: T.let = (bh * at.tokens + begin[s]) * N + i * length + c * ST
                        if T.And(first[s] <= i, i < s):
                            one_member(plan, at, i=i, fetching=p == 0, saved=saved, t0=t0, rows=rows)


def one_member(plan: Plan, at: Values, *, i, fetching, saved, t0, rows) -> None:
    """What a chunk of a later segment adds to state and descriptor ``i``."""
    Dk, Dv, ST, SR, SC = plan.Dk, plan.Dv, plan.ST, plan.SR, plan.SC
    A, row0, heads, dmeans, gamma, state = at.A, at.row0, at.heads, at.dmeans, at.gamma, at.bh * at.N + i
    share = -(-ST * SR // Dk)  # of a chunk's rows, fetched while a row of tiles is computed
    tile, sparse = outer(SR, SC), plan.flags.sparse

    def all_tokens(d0):
        @emit
        def tiles():
            for nn in range(Dv // SC):
                tile(A=A, B=at.Y, steps=rows, C=at.dstates, c0=state * Dk, d0=d0, n0=nn * SC)

    @emit
    def products():
        for t in range(rows):
            for d in T.vectorized(Dk):
                A[t, d] = weighed(
                    gamma[saved + t], at.scale * gamma[saved + t] * at.q[row0 + (t0 + t) * heads, d], sparse
                )
        for dd in range(Dk // SR):
            if fetching:
                fetch(at, at.q, Dk, t=t0 + ST + dd * share, count=share)
                fetch(at, at.u, Dk, t=t0 + ST + dd * share, count=share)
                fetch(at, at.dy, Dv, t=t0 + ST + dd * share, count=share)
            if not sparse:
                all_tokens(dd * SR)
            elif finite(at.sum_of_dy[0]):
                all_tokens(dd * SR)
            else:
                chosen_ones(plan, at, state=state, saved=saved, rows=rows, d0=dd * SR)
        w = T.meta_var(scratch(total=f32(1, Dk, scope="local")))
        for d in T.vectorized(Dk):
            w.total[0, d] = T.float32(0)
        for t in range(rows):
            for d in T.vectorized(Dk):
                w.total[0, d] = w.total[0, d] + weighed(
                    gamma[saved + t], at.dr[saved + t] * at.u[row0 + (t0 + t) * heads, d], sparse
                )
        for d in T.vectorized(Dk):
            dmeans[state, d] = dmeans[state, d] + w.total[0, d]


def chosen_ones(plan: Plan, at: Values, *, state, saved, rows, d0) -> None:
    """The same without tiles: the weight of a token that did not choose the state is 0, but its dy may be NaN."""

    @emit
    def by_token():
        for t in range(rows):
            if read_at_all(at.gamma[saved + t]):
                for d in range(plan.SR):
                    for n in T.vectorized(plan.Dv):
                        at.dstates[state * plan.Dk + d0 + d, n] = (
                            at.dstates[state * plan.Dk + d0 + d, n] + at.A[t, d0 + d] * at.Y[t, n]
                        )


def carry_back(plan: Plan, x: Values) -> None:
    """Add to each state's gradient what comes through the next segment, which starts from it."""

    @emit
    def tasks():
        after: T.let = x.P // plan.Dk - x.S  # where the gradients of the states that segments start from are in parts
        for task in T.parallel(x.S):
            if task % x.N != x.first[task % x.N]:
                segment_sum(plan, x, bh=task // x.N, s=task % x.N, to=after + task, through=True)
        lines_back(plan, x, after=after)


def lines_back(plan: Plan, x: Values, *, after) -> None:
    """From the last segment to the first, LANES rows of a head's states a task."""
    Dk, Dv, N, dstates, parts, begin, heads = plan.Dk, plan.Dv, x.N, x.dstates, x.parts, x.begin, x.heads

    @emit
    def lines():
        for line in T.parallel(x.S // N * (Dk // LANES)):
            bh: T.let = line // (Dk // LANES)
            d0: T.let = line % (Dk // LANES) * LANES
            carry = T.alloc_buffer((1,), "float32")
            row0: T.let = bh // heads * x.tokens * heads + bh % heads
            for turn in range(N - 1):
                s: T.let = N - 1 - turn
                if s != x.first[s]:
                    carry[0] = T.float32(1)
                    if plan.flags.gated:
                        for j in range(x.end[s] - begin[s]):
                            carry[0] = carry[0] * exp(x.g[row0 + (begin[s] + j) * heads])
                    for d in range(LANES):
                        for n in T.vectorized(Dv):
                            dstates[(bh * N + s - 1) * Dk + d0 + d, n] = (
                                dstates[(bh * N + s - 1) * Dk + d0 + d, n]
                                + parts[(after + bh * N + s) * Dk + d0 + d, n]
                                + carry[0] * dstates[(bh * N + s) * Dk + d0 + d, n]
                            )
