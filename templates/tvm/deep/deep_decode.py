"""New tokens of a deep memory over its cache (Eq. 4, 6-17, 30-31, 34-36), float32, on a CPU.

Token by token: write, read, and at a segment's end append the state and the mean key to the cache. The gradient of a
write is taken at the state that entered the inner chunk under way,

    S_t = mu_t S_{t-1} + eta_t dL(M_b(t); k_t, v_t),  M_t = e^{g_t} M_{t-1} - S_t

One task is a head, or one of ``split`` shares of a head's cached states, which are added up afterwards; the first share
writes. Where parameters are mixed, hidden units are added up between the two layers.
"""

from functools import partial

from tvm.script import tirx as T

from ..decode_tiles import LOW, choose, dots, over_columns, read, softmax
from ..kernel import Values, emit, f32, i32, prim_func, scratch, sizes
from ..tiles import LANES
from .decode_write import append, gradient, step_of, units, write_layer
from .plan import flags_of

_DOTS = 8
"""Descriptors whose inner products with u are in flight together."""


class Plan:
    """Sizes and flags of one ``deep_decode``."""

    def __init__(self, problem, config) -> None:
        self.Dk, self.Dv, self.E = problem.Dk, problem.Dv, problem.E
        self.split, self.cols, self.rows = config["split"], config["cols"], config["rows"]
        self.prefetch = config["prefetch"]
        self.both = min(self.Dk, self.Dv)
        self.flags = flags_of(problem)


def build(problem, config, target):
    """The PrimFunc ``deep_decode`` for the widths of ``problem``; B, n, H, the capacity, C and b are run-time values.

    Of the cache, all is written in place but ``cached`` and ``filled``. States are ``[B, H, capacity, m, n]`` a layer,
    what there is one of ``[B, H, 1, m, n]``; momentum has one element a side for a recurrence without. ``length`` is C,
    ``inner`` b; the output is y. Arrays need no alignment beyond that of a float.
    """
    plan, n = Plan(problem, config), sizes("B", "n", "H", "capacity", "length", "inner", "top_k", "adds_input")
    Dk, Dv, E, heads = plan.Dk, plan.Dv, plan.E, (n.B, n.H)
    tokens, gate = (n.B, n.n, n.H), (n.B, n.n, n.H)
    g, mu = (gate if plan.flags.decays else (1, 1, 1)), (gate if plan.flags.momentum else (1, 1, 1))
    up, down = (Dk, E), (E, Dv)

    def one(layer):
        return f32(*heads, 1, *layer, align=4)

    momentum = [one(layer) if plan.flags.momentum else f32(1, 1, 1, 1, 1, align=4) for layer in (up, down)]
    arguments = dict(
        q=f32(*tokens, Dk, align=4), u=f32(*tokens, Dk, align=4), k=f32(*tokens, Dk, align=4),
        v=f32(*tokens, Dv, align=4), g=f32(*g, align=4), eta=f32(*gate, align=4), mu=f32(*mu, align=4),
        W_up=f32(n.H, *up, align=4), W_down=f32(n.H, *down, align=4), up=f32(*heads, n.capacity, *up, align=4),
        down=f32(*heads, n.capacity, *down, align=4), descriptors=f32(*heads, n.capacity, Dk, align=4),
        online_up=one(up), online_down=one(down), start_up=one(up), start_down=one(down), momentum_up=momentum[0],
        momentum_down=momentum[1], key_sum=f32(*heads, Dk, align=4), cached=i32(n.B, align=4),
        filled=i32(n.B, align=4), length=n.length, inner=n.inner, top_k=n.top_k, adds_input=n.adds_input,
        scale=T.float32, y=f32(*tokens, Dv, align=4),
    )  # fmt: skip
    return prim_func("deep_decode", arguments, n, lambda x: every_token(plan, x))


def every_token(plan: Plan, x: Values) -> None:
    """The call's tokens, one after another; of each, a task a share of a head."""
    heads, split, mixes = x.B * x.H, plan.split, plan.flags.mixes

    @emit
    def tokens():
        shared = T.meta_var(
            scratch(
                hidden=f32(heads * split, plan.E),
                sums=f32(heads * split, plan.Dv),
                zk=f32(heads, plan.E),
                err=f32(heads, plan.Dv),
            )
        )
        at = T.meta_var(x.plus(shared))
        for token in range(x.n):
            for task in T.parallel(heads * split):
                here = T.meta_var(place(plan, at, task=task, token=token))
                first_layer(plan, here)
            if mixes:
                for task in T.parallel(heads * split):
                    here = T.meta_var(place(plan, at, task=task, token=token))
                    second_layer(plan, here)
            for bh in range(heads):
                finish(plan, at, b=bh // x.H, h=bh % x.H, bh=bh, token=token)


def place(plan: Plan, at: Values, *, task, token) -> Values:
    """Where a task is at work: its head and share, the tokens of the segment before this one, the states before it."""
    bh = task // plan.split
    b = bh // at.H
    seen = at.filled[b] + token
    return at.plus(
        b=b, h=bh % at.H, bh=bh, share=task % plan.split, task=task, token=token, seen=seen % at.length,
        past=at.cached[b] + seen // at.length,
    )  # fmt: skip


def scratch_of(plan: Plan, at: Values) -> Values:
    """What one task keeps to itself."""
    Dk, Dv, E, room = plan.Dk, plan.Dv, plan.E, at.capacity + LANES
    return scratch(
        Q=f32(1, Dk), HID=f32(1, E), Y=f32(1, Dv), K=f32(1, Dk), ZK=f32(1, E), BACK=f32(1, E), ERR=f32(1, Dv),
        part=f32(1, max(E, Dv)), gate=f32(1), one=f32(1), gates=f32(1, room), value_of=f32(1, room),
        chosen_of=i32(room), lanes=f32(2, LANES, scope="local"), index=i32(LANES, scope="local"), sum_of=f32(Dk),
        step=f32(3),
    )  # fmt: skip


def begin(plan: Plan, at: Values) -> None:
    """The token's query and gates; nothing read yet."""
    Dk, Dv, E, b, h, token = plan.Dk, plan.Dv, plan.E, at.b, at.h, at.token

    @emit
    def rows():
        at.one[0] = T.float32(1)
        for d in range(Dk):
            at.Q[0, d] = at.scale * at.q[b, token, h, d]
        for e in range(E):
            at.HID[0, e] = T.float32(0)
        for n in range(Dv):
            at.Y[0, n] = T.float32(0)
        gates(plan, at)


def first_layer(plan: Plan, at: Values) -> None:
    """A share of a token's read: of all of it, or of the hidden units where parameters are mixed."""
    Dv, E, mixes = plan.Dv, plan.E, plan.flags.mixes

    @emit
    def steps():
        here = T.meta_var(at.plus(scratch_of(plan, at)))
        begin(plan, here)
        if at.share == 0:
            gradient(plan, here)
            write_layer(plan, here, up=True, key=here.K, error=here.BACK, query=here.Q, out=here.HID)
            if mixes:
                for e in range(E):
                    at.zk[at.bh, e] = here.ZK[0, e]
                for n in range(Dv):
                    at.err[at.bh, n] = here.ERR[0, n]
                for e in range(E):
                    here.HID[0, e] = here.gate[0] * here.HID[0, e]
            else:
                units(here.HID, E)
                write_layer(plan, here, up=False, key=here.ZK, error=here.ERR, query=here.HID, out=here.Y)
                if at.adds_input > 0:
                    for n in range(plan.both):
                        here.Y[0, n] = here.Y[0, n] + here.Q[0, n]
                for n in range(Dv):
                    here.Y[0, n] = here.gate[0] * here.Y[0, n]
        read_cached(plan, here)
        if mixes:
            for e in range(E):
                at.hidden[at.task, e] = here.HID[0, e]
        else:
            for n in range(Dv):
                at.sums[at.task, n] = here.Y[0, n]


def second_layer(plan: Plan, at: Values) -> None:
    """A share of what the mixed hidden units read of the second layers."""
    Dv, E, split = plan.Dv, plan.E, plan.split

    @emit
    def steps():
        here = T.meta_var(at.plus(scratch_of(plan, at)))
        begin(plan, here)
        for p in range(split):
            for e in range(E):
                here.HID[0, e] = here.HID[0, e] + at.hidden[at.bh * split + p, e]
        units(here.HID, E)
        if at.share == 0:
            for e in range(E):
                here.ZK[0, e] = at.zk[at.bh, e]
            for n in range(Dv):
                here.ERR[0, n] = at.err[at.bh, n]
            step_of(plan, here)
            write_layer(plan, here, up=False, key=here.ZK, error=here.ERR, query=here.HID, out=here.Y)
            for n in range(Dv):
                here.Y[0, n] = here.gate[0] * here.Y[0, n]
            if at.adds_input > 0:
                for n in range(plan.both):
                    here.Y[0, n] = here.Y[0, n] + here.Q[0, n]
        read_each(plan, here, states=at.down, width=E, cols=Dv, Q=here.HID, Y=here.Y)
        for n in range(Dv):
            at.sums[at.task, n] = here.Y[0, n]


def finish(plan: Plan, at: Values, *, b, h, bh, token) -> None:
    """y of the token, the sum of its segment's keys; at the segment's end what it leaves."""
    Dk, Dv, split, key_sum = plan.Dk, plan.Dv, plan.split, at.key_sum

    @emit
    def steps():
        for n in range(Dv):
            at.y[b, token, h, n] = at.sums[bh * split, n]
        for p in range(split - 1):
            for n in range(Dv):
                at.y[b, token, h, n] = at.y[b, token, h, n] + at.sums[bh * split + p + 1, n]
        for d in range(Dk):
            key_sum[b, h, d] = key_sum[b, h, d] + at.k[b, token, h, d]
        if (at.filled[b] + token + 1) % at.length == 0:
            append(plan, at, b=b, h=h, slot=at.cached[b] + (at.filled[b] + token) // at.length)


def gates(plan: Plan, at: Values) -> None:
    """gate[0], that of the token's own segment; gates of the cached, or of the chosen ones."""
    flags, past, b, h = plan.flags, at.past, at.b, at.h

    @emit
    def row():
        if flags.routed:
            for d in range(plan.Dk):
                at.sum_of[d] = at.key_sum[b, h, d] + at.k[b, at.token, h, d]
            sums = T.meta_var(scratch(sums=f32(1, LANES, scope="local")).sums)
            dots(
                sums, count=1, width=plan.Dk, row=lambda r, d: at.sum_of[d], vector=lambda d: at.u[b, at.token, h, d]
            )  # fmt: skip
            at.gate[0] = sums[0, 0] / T.cast(at.seen + 1, "float32")
            logits(plan, at)
            if flags.sparse:
                picks = T.meta_var(T.min(at.top_k, past))
                choose(at.gates, past, picks, at.lanes, at.index, at.chosen_of, at.value_of)
                softmax(logits=at.value_of, t=0, count=picks, own=at.gate, at=0, lanes=at.lanes)
            else:
                softmax(logits=at.gates, t=0, count=past, own=at.gate, at=0, lanes=at.lanes)
        else:
            at.gate[0] = T.float32(1) / T.cast(past + 1, "float32") if flags.averages else T.float32(1)
            for i in range(past):
                at.gates[0, i] = at.gate[0]


def logits(plan: Plan, at: Values) -> None:
    """u times the descriptors, _DOTS of them together, and LOW after the last."""
    descriptors, u, b, h, past, token = at.descriptors, at.u, at.b, at.h, at.past, at.token

    @emit
    def row():
        for i in range((past + _DOTS - 1) // _DOTS):
            sums = T.meta_var(scratch(sums=f32(_DOTS, LANES, scope="local")).sums)
            dots(
                sums,
                count=_DOTS,
                width=plan.Dk,
                row=lambda r, d: descriptors[b, h, T.min(i * _DOTS + r, past - 1), d],
                vector=lambda d: u[b, token, h, d],
            )
            for r in T.unroll(_DOTS):
                at.gates[0, i * _DOTS + r] = sums[r, 0]
        for x in T.vectorized(LANES):
            at.gates[0, past + x] = T.float32(LOW)


def read_cached(plan: Plan, at: Values) -> None:
    """What the token reads of its share of the cached states: Y, or the hidden units where parameters are mixed."""
    Dk, Dv, E, H, Y = plan.Dk, plan.Dv, plan.E, at.HID, at.Y
    weights = at.value_of if plan.flags.sparse else at.gates

    @emit
    def states():
        if plan.flags.mixes:
            read_each(plan, at, states=at.up, width=Dk, cols=E, Q=at.Q, Y=H)
        else:
            count: T.let = T.min(at.top_k, at.past) if plan.flags.sparse else at.past
            for j in range((count - at.share + plan.split - 1) // plan.split):
                i: T.let = j * plan.split + at.share
                for e in range(E):
                    H[0, e] = T.float32(0)
                read_layer(plan, at, states=at.up, width=Dk, cols=E, first=i, Q=at.Q, Y=H, gates=at.one, routed=False)
                units(H, E)
                read_layer(plan, at, states=at.down, width=E, cols=Dv, first=i, Q=H, Y=Y, gates=weights, routed=True)
                if at.adds_input > 0:
                    for n in range(plan.both):
                        Y[0, n] = Y[0, n] + weights[0, i] * at.Q[0, n]


def read_each(plan: Plan, at: Values, *, states, width, cols, Q, Y) -> None:
    """Y += gate (Q M) of this share's states."""
    weights = at.value_of if plan.flags.sparse else at.gates

    @emit
    def layers():
        count: T.let = T.min(at.top_k, at.past) if plan.flags.sparse else at.past
        for j in range((count - at.share + plan.split - 1) // plan.split):
            read_layer(
                plan, at, states=states, width=width, cols=cols, first=j * plan.split + at.share, Q=Q, Y=Y,
                gates=weights, routed=True,
            )  # fmt: skip


def read_layer(plan: Plan, at: Values, *, states, width, cols, first, Q, Y, gates, routed) -> None:
    """Y += gate (Q M) of one state: the ``first``, or the first of those that were chosen."""
    ahead = -(-plan.prefetch // (4 * cols))
    make = partial(read, 1, plan.rows, 1, Dk=width, ahead=ahead, routed=routed, sparse=plan.flags.sparse)

    def columns(tile, y0, n0):
        tile(states=states, b=at.b, h=at.h, first=first, chosen=at.chosen_of, Q=Q, gates=gates, Y=Y, y0=y0, n0=n0)

    over_columns(width=cols, cols=plan.cols, c0=0, make=make, body=columns)
