"""What a forward keeps for its backward: arrays by name, who gives and who wants them, and how eager makes them.

Rows are those of B * H heads, or tokens of heads. A graph is traced without values: shapes follow from the sizes of
the call alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..call import Call
from ..segments import Segments
from ..traits import AGGREGATIONS, RECURRENCES
from .results import padded

Tensor = torch.Tensor
Names = tuple[str, ...]
OF_SEGMENTS = ("states", "operand", "past", "up", "down", "means")
"""Arrays with a row a head and segment; of a packed row those that its segments leave unused follow, zeros."""
ENDS: Mapping[str, Names] = {"matrix": ("states", "means"), "deep": ("up", "down", "means")}
"""What a segment leaves, by family: its end state, and its mean key."""
ROWS: Names = ("hidden", "rows_h", "rows_err", "rows_raw", "online", "mixture")
"""Of a deep memory, by token: what :func:`mctune.runtime.eager.rows.rows_of` says of them."""
LOGITS: Names = ("logits", "lse")
CHOICE: Names = ("lse", "own", "chosen", "picked", "order", "starts")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call: ``heads`` is B * H, Dk, Dv and E (0 of a matrix memory) as kernels pad them, N the segments,
    ``top_k`` at most N."""

    heads: int
    T: int
    Dk: int
    Dv: int
    N: int
    top_k: int
    dtype: torch.dtype
    E: int = 0

    @classmethod
    def of(cls, call: Call) -> Sizes:
        """The sizes of ``call``; a packed row counts with the most segments that a row of its length can have."""
        (B, T, H, Dk), Dv = call.q.shape, call.v.shape[3]
        N = segments_at_most(T, call.segmentation, call.segment_length, call.cu_seqlens)
        top_k: int = torch.sym_min(torch.sym_max(call.top_k, 1), N)  # type: ignore[no-untyped-call]
        E = 0 if call.W_up is None else padded(call.W_up.shape[2])
        return cls(B * H, T, padded(Dk), padded(Dv), N, top_k, call.q.dtype, E)


def segments_at_most(T: int, segmentation: str, segment_length: int, cu_seqlens: Tensor | None) -> int:
    """Segments of a row, or as many as a packed row can have at most."""
    if segmentation == "packed":
        return T // segment_length + (1 if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    return (T + segment_length - 1) // segment_length


def shape(name: str, s: Sizes) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of an array.

    =================  ==========================  ==================================================================
    states             [heads * N, Dk, Dv]         end states of segments, float32
    operand            the same, q's dtype         the same, as operands of products
    past               the same, q's dtype         the sum of the states of the segments before
    up, down           [heads * N, Dk, E], E, Dv   the layers of a deep memory's end states, float32
    means              [heads * N, Dk]             mean keys, float32
    hidden, mixture    [B * T * H, E]              hidden units before gelu, float32: the own segment's, and mixed ones
    rows_h, rows_raw   [B * T * H, E]              of the writes, float32: hidden units before gelu, and their gradients
                                                   after it
    rows_err, online   [B * T * H, Dv]             errors of the writes, and what is read of the own segment, float32
    logits             [heads, N, T]               float32; not written where a token does not read
    lse, own           [heads, T]                  log-sum-exp of a token's logits; the online segment's logit
    chosen, picked     [heads, T, top_k]           int32: the cached segments of a token, N where there are fewer; and
                                                   their logits, float32, in descending order
    order              [heads, T * top_k]          int32: pairs (token, choice) in the order of their segments
    starts             [heads, N + 2]              int32: the first of a segment's pairs in ``order``
    =================  ==========================  ==================================================================
    """
    state, token, pair = (s.heads * s.N, s.Dk, s.Dv), (s.heads, s.T), (s.heads, s.T, s.top_k)
    float32, int32 = torch.float32, torch.int32
    return {
        "states": (state, float32),
        "operand": (state, s.dtype),
        "past": (state, s.dtype),
        "up": ((s.heads * s.N, s.Dk, s.E), float32),
        "down": ((s.heads * s.N, s.E, s.Dv), float32),
        "means": (state[:2], float32),
        **dict.fromkeys(("hidden", "mixture", "rows_h", "rows_raw"), ((s.heads * s.T, s.E), float32)),
        **dict.fromkeys(("rows_err", "online"), ((s.heads * s.T, s.Dv), float32)),
        "logits": ((s.heads, s.N, s.T), float32),
        "lse": (token, float32),
        "own": (token, float32),
        "chosen": (pair, int32),
        "picked": (pair, float32),
        "order": ((s.heads, s.T * s.top_k), int32),
        "starts": ((s.heads, s.N + 2), int32),
    }[name]


# --- who gives and who wants what


def given(device: str, problem: Mapping[str, Any], config: Mapping[str, Any]) -> frozenset[str]:
    """What a forward that was tuned for ``problem`` on a device kind can keep."""
    family = RECURRENCES[problem["recurrence"]].family
    names = set(ENDS[family])
    if device == "cpu" and family == "deep":
        names |= set(left_by(problem))
    if device == "cuda" and family == "matrix":
        routed = AGGREGATIONS[problem["aggregation"]].routed
        names |= {"operand"} if routed else {"operand", "past"}
        if config.get("formulation") == "grouped":
            names |= set(CHOICE)
        elif routed and config.get("gates", "precomputed") == "precomputed":
            names |= set(LOGITS)
    return frozenset(names)


def wanted(device: str, problem: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Names, ...]:
    """What a backward that was tuned for ``problem`` on a device kind reads if the forward keeps it.

    A group is of use only as a whole.
    """
    saved = config.get("saved", "nothing")
    if saved == "nothing":
        return ()
    family = RECURRENCES[problem["recurrence"]].family
    if device == "cpu" and family == "deep":
        return (left_by(problem),)
    if device != "cuda" or family != "matrix":
        return (ENDS[family],)
    routed, carried = AGGREGATIONS[problem["aggregation"]].routed, problem["state_init"] == "checkpoint"
    # What enters a piece is read like a cached state; swla's decays have a gradient through it in float32.
    states: Names = ("states",) if carried and RECURRENCES[problem["recurrence"]].gated else ()
    if not states and (routed or carried):
        states = ("operand",)
    states += ("means",) if routed else ("past",)
    if saved != "gates":
        return (states,)
    return (states, CHOICE if config.get("formulation") == "grouped" else LOGITS)


def left_by(problem: Mapping[str, Any]) -> Names:
    """All that a deep memory's writes, and its read where parameters are mixed, leave for a backward on a CPU."""
    reads = AGGREGATIONS[problem["aggregation"]]
    of_read = "mixture" if reads.mixes_parameters else "online"
    return (*ENDS["deep"], "hidden", "rows_h", "rows_err", "rows_raw", of_read)


def kept(
    gives: Iterable[frozenset[str]], wants: Iterable[tuple[Names, ...]], N: int | None, Dk: int, Dv: int, dtype: str
) -> Names:
    """What is kept where any of the forwards and of the backwards may run: no group that one forward cannot give.

    A logit a token and segment is kept while all of them take no more memory than q, k, v and u: N segments, ``None``
    where a traced graph does not know.
    """
    every = frozenset.intersection(*gives)
    inputs = (3 * Dk + Dv) * (4 if dtype == "float32" else 2)
    names: dict[str, None] = {}
    for group in (group for groups in wants for group in groups):
        if every.issuperset(group) and not ("logits" in group and (N is None or 4 * N > inputs)):
            names |= dict.fromkeys(group)
    return tuple(names)


# --- as the eager path makes them


def make_kept(
    names: Sequence[str],
    states: tuple[Tensor, ...],
    means: Tensor,
    u: Tensor,
    k: Tensor,
    top_k: int | None,
    segments: Segments,
    dtype: torch.dtype,
    rows: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The named arrays from end states [heads, N, ...] and mean keys [heads, N, Dk]; u, k [heads, T, Dk].

    ``states`` is that of a matrix memory, or the two layers of a deep one. What has widths of states is padded here.
    Float arrays have the dtype of ``states`` but for operands of products, which have ``dtype``. ``top_k``: of ssc.
    ``rows``: those of :data:`ROWS`, [B, T, H, ...].
    """
    own = ("states",) if len(states) == 1 else ("up", "down")
    made = {name: _widened(x.flatten(0, 1), 2) for name, x in zip(own, states, strict=True)}
    made["means"] = _widened(means.flatten(0, 1), 1)
    made |= {name: _widened(x.flatten(0, 2), 1) for name, x in (rows or {}).items()}
    if len(states) == 1:
        made["operand"] = made["states"].to(dtype, copy=True)  # an operator's results share no memory
    if "past" in names:
        made["past"] = _past(_widened(states[0], 2), segments).flatten(0, 1).to(dtype)
    if "lse" in names:
        made |= _gates(means, u, k, top_k, segments)
    return {name: made[name].contiguous() for name in names}


def _widened(x: Tensor, axes: int) -> Tensor:
    """Zeros after the last ``axes`` axes, up to the widths that kernels are compiled for."""
    room = [side for width in reversed(x.shape[-axes:]) for side in (0, padded(width) - width)]
    return torch.nn.functional.pad(x, room)


def _past(states: Tensor, segments: Segments) -> Tensor:
    past = torch.zeros_like(states)
    for s, (_, _, first) in enumerate(segments.spans):
        if s > first:
            past[:, s] = past[:, s - 1] + states[:, s - 1]
    return past


def _gates(means: Tensor, u: Tensor, k: Tensor, top_k: int | None, segments: Segments) -> dict[str, Tensor]:
    heads, T, _ = u.shape
    N = segments.count
    logits = u.new_full((heads, N, T), float("-inf"))
    own = u.new_empty((heads, T))
    for s, (begin, end, first) in enumerate(segments.spans):
        rows = slice(begin, end)
        logits[:, first:s, rows] = means[:, first:s] @ u[:, rows].mT
        count = torch.arange(1, end - begin + 1, device=u.device)[:, None]
        own[:, rows] = (u[:, rows] * (k[:, rows].cumsum(1) / count)).sum(-1)
        logits[:, s, rows] = own[:, rows]
    if top_k is None:
        return {"logits": logits, "lse": logits.logsumexp(1)}
    cached = logits.clone()
    for s, (begin, end, _) in enumerate(segments.spans):
        cached[:, s, begin:end] = float("-inf")
    top_k = min(max(top_k, 1), N)
    picked, chosen = (x[:, :top_k] for x in cached.sort(dim=1, descending=True, stable=True))
    # What is not chosen is not read.
    left = torch.ones_like(cached, dtype=torch.bool).scatter_(1, chosen, False)
    for s, (begin, end, _) in enumerate(segments.spans):
        left[:, s, begin:end] = False
    logits.masked_fill_(left, float("-inf"))
    picked, chosen = picked.mT, chosen.mT
    chosen = torch.where(picked > float("-inf"), chosen, N).to(torch.int32).contiguous()
    lse = logits.logsumexp(1)
    return {"logits": logits, "lse": lse, "own": own, "chosen": chosen, "picked": picked, **make_pairs(chosen, N)}


def make_pairs(chosen: Tensor, N: int) -> dict[str, Tensor]:
    """``order`` and ``starts`` of ``chosen``."""
    pairs = chosen.flatten(1)
    ordered, order = pairs.sort(dim=1, stable=True)
    numbers = torch.arange(N + 2, dtype=torch.int32, device=chosen.device).expand(len(pairs), -1)
    starts = torch.searchsorted(ordered, numbers.contiguous(), out_int32=True)
    return {"order": order.to(torch.int32), "starts": starts}
