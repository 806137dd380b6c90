"""The reference of a Definition: self-contained Python over plain torch, one text a trait.

Tokens write one by one; cached memories are read by a segment's tokens together, which makes it usable at size.
"""

from __future__ import annotations

from string import Template

from mctune.core.errors import UsageError
from mctune.core.problem import Problem

_HEAD = Template('''\
"""$title: Memory Caching (arXiv:2602.24281) in plain torch."""

import torch

$constants

def wide(x):
    """At least float32: what is computed in, whatever the arrays are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def outer(k, v):
    """k^T v of every head: [B, H, Dk] and [B, H, Dv] make [B, H, Dk, Dv]."""
    return k.unsqueeze(-1) * v.unsqueeze(-2)
''')

_SPANS = {
    "constant": '''\
def spans(T):
    """Begin and end of every segment: SEGMENT_LENGTH tokens each, the last may have fewer."""
    return [(begin, min(begin + SEGMENT_LENGTH, T)) for begin in range(0, T, SEGMENT_LENGTH)]
''',
    "logarithmic": '''\
def spans(T):
    """Begin and end of every segment: the powers of two that add up to T, the longest first."""
    found, begin = [], 0
    for bit in reversed(range(T.bit_length())):
        if T >> bit & 1:
            found.append((begin, begin + (1 << bit)))
            begin += 1 << bit
    return found
''',
}
"""By segmentation. Packed rows are cut by an array of their own."""

_SIMPLE_WRITE = '''\
def write(M, k, v, last_k, last_v):
    """The memory [B, H, Dk, Dv] after a token: M + k^T v (Eq. 2). The token before it does not matter."""
    return M + outer(k, v)
'''
_CONVOLVING_WRITE = '''\
def write(M, k, v, last_k, last_v, g, beta, lam):
    """The memory after a token: e^g M + beta last_k^T last_v + lam k^T v (Eq. 26-27); gates are [B, H]."""
    g, beta, lam = (gate[..., None, None] for gate in (g, beta, lam))
    return torch.exp(g) * M + beta * outer(last_k, last_v) + lam * outer(k, v)
'''
_WRITES = {((), False): _SIMPLE_WRITE, (("g", "beta", "lam"), True): _CONVOLVING_WRITE}
"""By the gates of a recurrence, and whether it mixes a token with the one before."""

_SOFTMAX = '''\
def weigh(logits):
    """A weight for each memory, from its logit (Eq. 8-10); both are [B, L, N + 1, H]."""
    return torch.softmax(logits, dim=2)
'''
_SOFTMAX_OF_A_FEW = '''\
def weigh(logits):
    """A softmax over the online memory, the last, and the TOP_K cached ones of the largest logits (Eq. 16-17).

    Both are [B, L, N + 1, H].
    """
    ranked = logits[:, :, :-1].sort(dim=2, descending=True, stable=True).indices
    read = torch.zeros_like(logits, dtype=torch.bool).scatter(2, ranked[:, :, :TOP_K], True)
    read[:, :, -1] = True
    return torch.softmax(logits.masked_fill(~read, float("-inf")), dim=2)
'''
_ONE_EACH = '''\
def weigh(logits):
    """A weight for each memory: 1 (Eq. 6-7); both are [B, L, N + 1, H]."""
    return torch.ones_like(logits)
'''
_EQUAL_SHARES = '''\
def weigh(logits):
    """A weight for each memory: one over their number (section 4.3); both are [B, L, N + 1, H]."""
    return torch.full_like(logits, 1 / logits.shape[2])
'''
_WEIGHTS = {
    (True, False, False): _SOFTMAX,
    (True, True, False): _SOFTMAX_OF_A_FEW,
    (False, False, False): _ONE_EACH,
    (False, False, True): _EQUAL_SHARES,
}
"""By what an aggregation reads: routed, sparse, averages."""

_READ = '''\
def answer(q, M):
    """What a memory answers a query: [B, H, Dk] and [B, H, Dk, Dv] make [B, H, Dv]."""
    return torch.einsum("bhd,bhde->bhe", SCALE * q, M)


def read(q, u, states, means, own, own_means):
    """y [B, L, H, Dv] of L tokens of a segment, from N cached memories and the online one.

    states [B, N, H, Dk, Dv] and means [B, N, H, Dk] are the cached memories and the mean keys of their segments; own
    [B, L, H, Dv] is what the online memory answers each token, own_means [B, L, H, Dk] the mean key up to it.
    """
    cached, online = torch.einsum("blhd,bnhd->blnh", u, means), (u * own_means).sum(-1)
    weights = weigh(torch.cat([cached, online.unsqueeze(2)], 2))
    answers = torch.einsum("blhd,bnhde->blnhe", SCALE * q, states)
    return (weights[:, :, :-1, :, None] * answers).sum(2) + weights[:, :, -1, :, None] * own
'''

_FORWARD = '''\
def forward(q, k, v, u, *gates):
    """y [B, T, H, Dv]: each token writes, then reads; where a segment ends, its memory and its mean key are kept."""
    nothing, nobody = torch.zeros_like(outer(k[:, 0], v[:, 0])), (0 * k[:, 0], 0 * v[:, 0])
    M, last, states, means, y = nothing, nobody, nothing[:, None][:, :0], k[:, :0], []
    for begin, end in spans(q.shape[1]):
        if not CARRIED:
            M, last = nothing, nobody
        keys, own, own_means = torch.zeros_like(k[:, 0]), [], []
        for t in range(begin, end):
            M = write(M, k[:, t], v[:, t], *last, *(gate[:, t] for gate in gates))
            last = k[:, t], v[:, t]
            keys = keys + k[:, t]
            own.append(answer(q[:, t], M))
            own_means.append(keys / (t - begin + 1))
        tokens = slice(begin, end)
        y.append(read(q[:, tokens], u[:, tokens], states, means, torch.stack(own, 1), torch.stack(own_means, 1)))
        states, means = torch.cat([states, M[:, None]], 1), torch.cat([means, own_means[-1][:, None]], 1)
    return torch.cat(y, 1)
'''

_RUNS = {
    "forward": Template('''\
def run($inputs):
    """y [B, T, H, Dv]."""
    dtype = v.dtype
    $inputs = (wide(x) for x in ($inputs))
    return forward($call).to(dtype)
'''),
    "backward": Template('''\
def run($inputs, dy):
    """The gradients of the other inputs, from dy [B, T, H, Dv], the gradient of y."""
    dtypes = [x.dtype for x in ($inputs)]
    $inputs = leaves = [wide(x).detach().requires_grad_() for x in ($inputs)]
    with torch.enable_grad():
        found = torch.autograd.grad(forward($call), leaves, wide(dy))
    return tuple(dx.to(dtype) for dx, dtype in zip(found, dtypes))
'''),
    "decode": Template('''\
def run($inputs, $memory, filled):
    """One token, before which its segment had ``filled``: y [B, H, Dv], and the online memory after it."""
    dtype = v.dtype
    $inputs = (wide(x) for x in ($inputs))
    $memory = (wide(x) for x in ($memory))
    last = $last
    if filled == 0 and not CARRIED:
        online, last = torch.zeros_like(online), (0 * k, 0 * v)
    M = write(online, k, v, *last$gates)
$means
    own, own_mean = answer(q, M)[:, None], mean[:, None]
    return read(q[:, None], $u[:, None], states.transpose(1, 2), means, own, own_mean)[:, 0].to(dtype), M
'''),
}
_MEANS = """\
    mean = (key_sum + k) / (filled + 1) if filled else k
    means = descriptors.transpose(1, 2)"""
_NO_MEANS = """\
    mean, means = k, states.transpose(1, 2)[..., 0]  # any: no weight depends on them"""


def check_written(problem: Problem) -> None:
    """See that there is a reference for the problem.

    Raises:
        UsageError: naming what none is written for.
    """
    if problem.deep:
        raise UsageError(f"{problem}: no reference is written for deep memories")
    if problem.segmentation not in _SPANS:
        raise UsageError(f"{problem}: no reference is written for segmentation={problem.segmentation!r}")
    if problem.reads.reads not in _WEIGHTS or _writes(problem) not in _WRITES:
        raise UsageError(f"{problem}: no reference is written for its traits")


def _writes(problem: Problem) -> tuple[tuple[str, ...], bool]:
    return problem.writes.gates, problem.writes.convolves


def reference(problem: Problem) -> str:
    """The text of a module whose ``run`` computes the problem, with the inputs of its Definition.

    Raises:
        UsageError: if none is written for it.
    """
    check_written(problem)
    parts = [_head(problem)]
    if problem.pass_ != "decode":
        parts.append(_SPANS[problem.segmentation])
    parts += [_WRITES[_writes(problem)], _WEIGHTS[problem.reads.reads], _READ]
    if problem.pass_ != "decode":
        parts.append(_FORWARD)
    return "\n\n".join((*parts, _run(problem)))


def _head(problem: Problem) -> str:
    constants = [f"SCALE = {problem.Dk} ** -0.5"]
    if problem.segment_length is not None and problem.pass_ != "decode":
        constants.append(f"SEGMENT_LENGTH = {problem.segment_length}")
    if problem.reads.sparse:
        constants.append(f"TOP_K = {problem.top_k}")
    carried = problem.state_init == "checkpoint"
    constants.append(f"CARRIED = {carried}  # whether a segment starts where the one before ended")
    title = f"The {problem.pass_} pass of {problem.recurrence} with {problem.aggregation}"
    return _HEAD.substitute(title=title, constants="\n".join(constants) + "\n")


def _run(problem: Problem) -> str:
    gates, u = problem.writes.gates, "u" if problem.routed else "q"
    memory = memory_inputs(problem)
    return _RUNS[problem.pass_].substitute(
        inputs=", ".join(token_inputs(problem)),
        call=", ".join(("q", "k", "v", u, *gates)),
        memory=", ".join(memory),
        last="last_key, last_value" if problem.writes.convolves else "0 * k, 0 * v",
        gates="".join(f", {name}" for name in gates),
        means=_MEANS if problem.routed else _NO_MEANS,
        u=u,
    )


def token_inputs(problem: Problem) -> tuple[str, ...]:
    """What tokens bring, by name: q, k and v, the connectors where gates are compared with them, the write's gates."""
    return ("q", "k", "v", *(("u",) if problem.routed else ()), *problem.writes.gates)


def memory_inputs(problem: Problem) -> tuple[str, ...]:
    """What a decode step is given of the tokens before it, by name."""
    means = ("descriptors", "key_sum") if problem.routed else ()
    return ("states", "online", *means, *(("last_key", "last_value") if problem.writes.convolves else ()))
