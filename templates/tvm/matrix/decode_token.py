"""What ``decode_step`` does for one token at a time: its row of a tile, sums of keys, logits, gates."""

from tvm.script import tirx as T

from ..decode_tiles import LOW, choose, dots, softmax
from ..flags import flags_of
from ..kernel import Values, emit, f32, i32, scratch
from ..tiles import LANES, exp, stain

_DOTS = 8
"""Descriptors whose inner products with u are in flight together."""
_TOKENS = 4
"""Tokens of a tile."""


class Plan:
    """Sizes and flags of one ``decode_step``."""

    def __init__(self, problem, config, target) -> None:
        self.Dk, self.Dv = problem.Dk, problem.Dv
        self.split, self.cols, self.rows = config["split"], config["cols"], config["rows"]
        self.streams = config["streams"]
        self.ahead = -(-config["prefetch"] // (4 * self.Dv))
        self.flags = flags_of(problem)
        self.W = self.Dv // self.split
        self.tile = 1 if self.flags.sparse else _TOKENS
        # Columns of a tile of tokens: so narrow that its sums stay in 32 registers of 16 floats, or in 16 of 8.
        self.few = min(self.cols, 64 if target.vector_floats == 16 else 16)


def prepare(plan: Plan, x: Values, *, b, h) -> None:
    """What does not depend on the states: sums and means of keys, and the logits of the tokens' own segments."""
    Dk, k, u, key_sum, length = plan.Dk, x.k, x.u, x.key_sum, x.length

    @emit
    def tokens():
        place = T.meta_var(scratch(place=i32(2, scope="local")).place)
        place[0] = x.filled[b]
        place[1] = x.cached[b]
        for t in range(x.n):
            for d in T.vectorized(Dk):
                key_sum[b, h, d] = key_sum[b, h, d] + k[b, t, h, d]
            place[0] = place[0] + 1
            if plan.flags.routed:
                sums = T.meta_var(scratch(sums=f32(1, LANES, scope="local")).sums)
                dots(
                    sums, count=1, width=Dk, row=lambda r, d: key_sum[b, h, d], vector=lambda d: u[b, t, h, d]
                )  # fmt: skip
                x.own[b, h, t] = sums[0, 0] / T.cast(place[0], "float32")
            if place[0] == length:
                for d in T.vectorized(Dk):
                    x.descriptors[b, h, place[1], d] = key_sum[b, h, d] / T.cast(length, "float32")
                    key_sum[b, h, d] = T.float32(0)
                place[0] = 0
                place[1] = place[1] + 1


def remember(plan: Plan, x: Values, *, b, h) -> None:
    """The newest token, for the next call; nobody's previous one at an independent segment's start."""
    Dk, Dv, n, last_key, last_value = plan.Dk, plan.Dv, x.n, x.last_key, x.last_value

    @emit
    def rows():
        for d in T.vectorized(Dk):
            last_key[b, h, d] = x.k[b, n - 1, h, d]
        for e in T.vectorized(Dv):
            last_value[b, h, e] = x.v[b, n - 1, h, e]
        if not plan.flags.checkpoint:
            if (x.filled[b] + n) % x.length == 0:
                for d in T.vectorized(Dk):
                    last_key[b, h, d] = T.float32(0)
                for e in T.vectorized(Dv):
                    last_value[b, h, e] = T.float32(0)


def take(plan: Plan, at: Values, *, t, token, linked) -> None:
    """Row ``t`` of the tile: ``token`` of the call."""
    Dk, W, Q, K, P, V, b, h, k = plan.Dk, plan.W, at.Q, at.K, at.P, at.V, at.b, at.h, at.k

    @emit
    def row():
        for d in T.vectorized(Dk):
            Q[t, d] = at.scale * at.q[b, token, h, d]
        for x in T.vectorized(W):
            V[t + 1, x] = at.v[b, token, h, at.c0 + x]
        if plan.flags.gated:
            at.decay[t] = exp(at.g[b, token, h])
            for d in T.vectorized(Dk):
                K[t, d] = at.lam[b, token, h] * k[b, token, h, d]
                P[t, d] = stain(at.beta[b, token, h])
            if linked:
                if token > 0:
                    for d in T.vectorized(Dk):
                        P[t, d] = at.beta[b, token, h] * k[b, token - 1, h, d]
                else:
                    for d in T.vectorized(Dk):
                        P[t, d] = at.beta[b, token, h] * at.last_key[b, h, d]
        else:
            for d in T.vectorized(Dk):
                K[t, d] = k[b, token, h, d]


def leave_empty(plan: Plan, at: Values, *, t, past) -> None:
    """Row ``t`` of the tile: a token that writes nothing and reads nothing."""
    Dk, W, Q, K, P, V = plan.Dk, plan.W, at.Q, at.K, at.P, at.V

    @emit
    def row():
        at.decay[t] = T.float32(1)
        at.share[t] = T.float32(0)
        if plan.flags.routed:
            for i in range(past):
                at.gamma[t, i] = T.float32(0)
        for d in T.vectorized(Dk):
            Q[t, d] = T.float32(0)
            K[t, d] = T.float32(0)
        if plan.flags.gated:
            for d in T.vectorized(Dk):
                P[t, d] = T.float32(0)
        for x in T.vectorized(W):
            V[t + 1, x] = T.float32(0)


def gates(plan: Plan, at: Values, *, t, token, past) -> None:
    """Row ``t`` of the gates: the own segment's into share, those of the cached into gamma, or into value if sparse."""
    flags, share, lanes, index = plan.flags, at.share, at.lanes, at.index

    @emit
    def row():
        if flags.routed:
            logits(plan, at, t=t, token=token, past=past)
            share[t] = at.own[at.b, at.h, token]
            if flags.sparse:
                picks = T.meta_var(T.min(at.top_k, past))
                choose(at.gamma, past, picks, lanes, index, at.chosen, at.value)
                softmax(logits=at.value, t=0, count=picks, own=share, at=t, lanes=lanes)
            else:
                softmax(logits=at.gamma, t=t, count=past, own=share, at=t, lanes=lanes)
        else:
            share[t] = T.float32(1) / T.cast(past + 1, "float32") if flags.averages else T.float32(1)


def logits(plan: Plan, at: Values, *, t, token, past) -> None:
    """Row ``t`` of gamma: u times the descriptors, _DOTS of them together, and LOW after the last."""
    descriptors, u, gamma, b, h = at.descriptors, at.u, at.gamma, at.b, at.h

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
                gamma[t, i * _DOTS + r] = sums[r, 0]
        for x in T.vectorized(LANES):
            gamma[t, past + x] = T.float32(LOW)
