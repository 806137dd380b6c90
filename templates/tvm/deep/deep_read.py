"""What tokens read of the cached states of a deep memory (arXiv:2602.24281, Eq. 6-17), float32, on a CPU.

    y_t = gamma_t^(s) M_t(q_t) + sum_{i < s} gamma_t^(i) gelu(q_t U^(i)) W^(i)

One task is one segment of one head. Its tokens go in blocks of BT through every cached state, hidden units in blocks of
``block``: two products with a gelu between, and no more of the hidden units in memory than one block of them. Where
few states are read (ssc), each state meets just the tokens that chose it. Where parameters are mixed (Eq. 14-15), see
:mod:`deep_mix`.
"""

from functools import partial

from tvm.script import tirx as T

from ..gates import sort_by_segment
from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import LANES, columns
from .deep_mix import mix_block, second_of_online
from .gates import gates, pack
from .plan import Plan
from .tiles import activated, add, add_row, product
from .walk import chunk_rows, tiles


def build(problem, config, target):
    """The PrimFunc ``deep_read``; what it takes is as ``deep_write`` leaves it, the output is y ``[B*T*H, Dv]``.

    ``longest`` is the length of the longest segment; ``mixture`` ``[R, E]`` is an output too: the mixed hidden units
    before gelu, one row where parameters are not mixed.
    """
    plan = Plan(problem, config)
    Dk, Dv, E = plan.Dk, plan.Dv, plan.E
    n = sizes(
        "R", "N", "S", "G", "M", "LD", "XD", "online_rows", "hidden_rows", "mixed_rows", "tokens", "heads", "inner",
        "adds_input", "carries", "longest", "top_k",
    )  # fmt: skip
    arguments = dict(
        q=f32(n.R, Dk), u=f32(n.R, Dk), k=f32(n.R, Dk), g=f32(n.G), eta=f32(n.R), mu=f32(n.M), W_down=f32(n.LD, Dv),
        up=f32(n.S * Dk, E), down=f32(n.S * E, Dv), means=f32(n.S, Dk), enter_down=f32(n.XD, Dv),
        online=f32(n.online_rows, Dv), hidden=f32(n.hidden_rows, E), rows_h=f32(n.hidden_rows, E),
        rows_err=f32(n.hidden_rows, Dv), begin=i32(n.N), end=i32(n.N), first=i32(n.N), tokens=n.tokens, heads=n.heads,
        longest=n.longest, top_k=n.top_k, inner=n.inner, scale=T.float32, adds_input=n.adds_input, carries=n.carries,
        mixture=f32(n.mixed_rows, E), y=f32(n.R, Dv),
    )  # fmt: skip
    return prim_func("deep_read", arguments, n, lambda x: every_segment(plan, x))


def scratch_of(plan: Plan, x: Values) -> Values:
    """What one task keeps to itself."""
    Dk, Dv, BT, JR = plan.Dk, plan.Dv, plan.chunk, plan.score_rows
    w = scratch(
        C=f32(BT, Dv), QT=f32(Dk, BT), UT=f32(Dk, BT), total=f32(Dk), own=f32(1, BT), gamma=f32(x.N + JR, BT),
        lanes=f32(2, LANES), best=i32(LANES), share=f32(BT),
    )  # fmt: skip
    if plan.flags.mixes:
        w = w.plus(scratch(H=f32(BT, plan.E), HT=f32(plan.E, BT), own_of=f32(x.longest + BT)))
    else:
        w = w.plus(scratch(HT=f32(plan.block, BT)))
    if plan.flags.sparse:
        kept = BT if plan.flags.mixes else x.longest + BT
        w = w.plus(scratch(chosen=i32(x.top_k + 1, kept), value=f32(x.top_k + 1, kept)))
    return w


def every_segment(plan: Plan, x: Values) -> None:
    """One task a segment of a head."""

    @emit
    def tasks():
        for task in T.parallel(x.S):
            bh: T.let = task // x.N
            place: T.let = task % x.N
            # Late segments read more: pairing early with late ones balances contiguous shares of the tasks.
            s: T.let = T.if_then_else(place % 2 == 0, place // 2, x.N - 1 - place // 2)
            row0: T.let = bh // x.heads * x.tokens * x.heads + bh % x.heads
            past: T.let = s - x.first[s]
            at = T.meta_var(
                x.plus(
                    scratch_of(plan, x),
                    bh=bh,
                    s=s,
                    row0=row0,
                    past=past,
                    base=bh * x.N + x.first[s],
                    length=x.end[s] - x.begin[s],
                    picks=T.min(x.top_k, past),
                    BP=chunk_rows(x.inner),
                )
            )
            one_segment(plan, at)


def one_segment(plan: Plan, at: Values) -> None:
    """y of a segment's tokens."""
    Dk, BT, total, s = plan.Dk, plan.chunk, at.total, at.s

    @emit
    def blocks():
        for d in range(Dk // LANES):
            for x in T.vectorized(LANES):
                total[d * LANES + x] = T.float32(0)
        for c in range((at.length + BT - 1) // BT):
            t0: T.let = at.begin[s] + c * BT
            rows: T.let = T.min(BT, at.end[s] - t0)
            pack(plan, at, t0=t0, rows=rows)
            gates(plan, at, t0=t0, rows=rows, seen=c * BT, spread=plan.flags.mixes)
            if plan.flags.mixes:
                mix_block(plan, at, t0=t0, rows=rows, seen=c * BT)
            else:
                read_block(plan, at, t0=t0, rows=rows)
        if plan.flags.mixes:
            second_of_online(plan, at)
        elif plan.flags.sparse:
            read_chosen(plan, at)


def read_block(plan: Plan, at: Values, *, t0, rows) -> None:
    """y of a block: what it reads of its own segment, and unless few are chosen, of the cached states."""
    Dv, C, own, share, gamma, row0, heads = plan.Dv, at.C, at.own, at.share, at.gamma, at.row0, at.heads
    dense = not plan.flags.sparse

    @emit
    def block():
        for t in range(rows):
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    C[t, n * LANES + x] = own[0, t] * at.online[row0 + (t0 + t) * heads, n * LANES + x]
        for t in range(plan.chunk - rows):
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    C[rows + t, n * LANES + x] = T.float32(0)
        if dense:
            for i in range(at.past):
                read_state(plan, at, i=at.base + i, gate=gamma, g=i, count=rows)
            if at.adds_input > 0:
                for t in range(rows):
                    share[t] = T.float32(0)
                    for i in range(at.past):
                        share[t] = share[t] + gamma[i, t]
                    add_row(C, t, share[t] * at.scale, at.q, row0 + (t0 + t) * heads, plan.both)
        for t in range(rows):
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    at.y[row0 + (t0 + t) * heads, n * LANES + x] = C[t, n * LANES + x]


def read_state(plan: Plan, at: Values, *, i, gate, g, count) -> None:
    """C[t] += gate[g, t] * gelu(q_t U^(i)) W^(i) for ``count`` tokens whose queries are the columns of QT."""
    Dk, Dv, E, EB, HT = plan.Dk, plan.Dv, plan.E, plan.block, at.HT
    HR, HL, MR, NR = plan.hid_rows, plan.hid_lanes, plan.rows, plan.cols
    activate = partial(activated, Z=HT, gate=gate, i=g)
    first = partial(product, HL, plan.unroll, activate, A=at.up, a0=i * Dk, B=at.QT, steps=Dk)
    second = partial(product, NR, plan.unroll, partial(add, C=at.C), A=HT, B=at.down, steps=EB)

    @emit
    def products():
        for eb in range(E // EB):
            tiles(EB, (count + HL - 1) // HL * HL, HR, HL, first(ac=eb * EB))
            tiles(count, Dv, MR, NR, second(b0=i * E + eb * EB), room=plan.chunk)


def read_chosen(plan: Plan, at: Values) -> None:
    """Each cached state for the tokens that chose it, in blocks of them."""
    BT, past = plan.chunk, at.past

    @emit
    def segments():
        w = T.meta_var(
            scratch(
                where=i32(at.N + 2),
                tokens_of=i32(at.top_k * at.longest + 1),
                gates_of=f32(at.top_k * at.longest + 1),
                QB=f32(BT, plan.Dk),
            )
        )
        where = T.meta_var(w.where)
        sort_by_segment(at.chosen, at.value, at.picks, at.length, past, where, w.tokens_of, w.gates_of)
        for i in range(past):
            for xx in range((where[i + 1] - where[i] + BT - 1) // BT):
                x0: T.let = where[i] + xx * BT
                count: T.let = T.min(BT, where[i + 1] - x0)
                chosen_block(plan, at.plus(w), i=i, x0=x0, count=count)


def chosen_block(plan: Plan, at: Values, *, i, x0, count) -> None:
    """y += gate * M^(i)(q) for ``count`` tokens from place ``x0`` of the sorted ones on."""
    Dk, Dv, C, QB, own, y = plan.Dk, plan.Dv, at.C, at.QB, at.own, at.y
    origin = at.row0 + at.begin[at.s] * at.heads

    @emit
    def block():
        for t in range(count):
            own[0, t] = at.gates_of[x0 + t]
            for d in range(Dk // LANES):
                for x in T.vectorized(LANES):
                    QB[t, d * LANES + x] = at.scale * at.q[origin + at.tokens_of[x0 + t] * at.heads, d * LANES + x]
        columns(QB, Dk, 0, 1, 0, count, at.QT)
        for t in range(T.min((count + 15) // 16 * 16, plan.chunk)):
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    C[t, n * LANES + x] = T.float32(0)
        read_state(plan, at, i=at.base + i, gate=own, g=0, count=count)
        for t in range(count):
            if at.adds_input > 0:
                for n in range(plan.both // LANES):
                    for x in T.vectorized(LANES):
                        C[t, n * LANES + x] = C[t, n * LANES + x] + own[0, t] * QB[t, n * LANES + x]
            for n in range(Dv // LANES):
                for x in T.vectorized(LANES):
                    y[origin + at.tokens_of[x0 + t] * at.heads, n * LANES + x] = (
                        y[origin + at.tokens_of[x0 + t] * at.heads, n * LANES + x] + C[t, n * LANES + x]
                    )  # fmt: skip
