"""Launch the backward kernels of a Triton package for deep memories: the writes again, reads, gates, states, writes.

Coefficients of inner chunks, c_t, d_t and c_tj, are small: torch makes them, and their gradients are turned into the
gates' by its autograd.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ....modes import ordinary
from ....segments import Segments
from ....traits import AGGREGATIONS
from ...kept import wanted
from ...results import Gradients, padded
from ..loader import load_parts
from ..tables import DEVICE, Tables, make_tables
from .groups import Gates, Keys, Layers, Made, ReadGradients, Rows, Saved, Shares, Weights
from .weights import gate_gradients, make_weights

Tensor = torch.Tensor
LIMIT = 4 << 30
"""Bytes of scratch of the heads that are dealt with at once, as far as one head takes less."""


@dataclass(frozen=True, eq=False)
class _Call:
    """One launch: rows ``[B, T, H, ..]`` of some heads, and what the forward has kept of them."""

    rows: Rows
    gates: dict[str, Tensor | None]
    W_up: Tensor
    W_down: Tensor
    residual: bool
    inner_chunk: int
    scale: float
    top_k: int
    segments: Segments
    kept: Mapping[str, Tensor]


class _Written(NamedTuple):
    """What the writes have left: the states that enter inner chunks and those at the ends of segments."""

    tables: Tables
    lanes: Tensor
    weights: Weights
    states: Layers
    errors: Tensor | None
    ends: Layers


class _Read(NamedTuple):
    """What the reads' gradients have left for those of the writes."""

    saved: Saved
    shares: Shares
    dends: Layers
    du: Tensor | None
    keys: Keys | None


class TritonDeepBackward:
    """The gradients of y = memory_caching(q, k, v, u) of a deep memory, by the rendered modules of one configuration.

    Args:
        kernel: a file beside the rendered modules.
        record: its entry in the tuned table; ``record["problem"]`` names the operation, ``record["config"]`` the
            configuration, ``record["parts"]`` the modules.
        parts: the modules by operation, instead of those that ``record`` names.

    Attributes:
        wants: names of what the forward should keep (:func:`kept.wanted`).
    """

    device, dtype = DEVICE, None
    """What the tensors that it reads are on and in; the dtype is the call's own, one for dy, q, k, v and u."""

    def __init__(self, kernel: Path, record: Mapping[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        parts = load_parts(kernel.parent, record["parts"]) if parts is None else parts
        problem, self.config = record["problem"], record["config"]
        self.wants = wanted("cuda", problem, self.config)
        self.checkpoint = problem["state_init"] == "checkpoint"
        self.reads = AGGREGATIONS[problem["aggregation"]]
        self.replay = parts["deep_replay"]
        self.online = parts["deep_online_backward"]
        self.gates = parts["gates"].gates if "gates" in parts else None
        self.read = parts["deep_read_backward"]
        self.state_backward = parts["deep_state_backward"].deep_state_backward
        self.gates_backward = parts["gates_backward"].gates_backward if "gates_backward" in parts else None
        self.write_backward = parts["deep_write_backward"].deep_write_backward

    def __call__(
        self,
        dy: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        u: Tensor,
        *,
        g: Tensor | None,
        eta: Tensor | None,
        mu: Tensor | None,
        W_up: Tensor,
        W_down: Tensor,
        memory_residual: bool,
        inner_chunk: int,
        scale: float,
        top_k: int,
        segments: Segments,
        kept: Mapping[str, Tensor] | None = None,
    ) -> Gradients:
        """Gradients, float32, from dy, v ``[B, T, H, Dv]``, q, k, u ``[B, T, H, Dk]``, gates ``[B, T, H]`` and layers.

        ``kept``: end states and mean keys as the forward of the same arguments has kept them (:mod:`kept`), which are
        only read. What it has not is computed again.
        """
        (B, T, H, Dk), (Dv, E), N = q.shape, W_down.shape[1:][::-1], segments.count
        chunks = sum(-(-(end - begin) // inner_chunk) for begin, end, _ in segments.spans)
        state = padded(E) * (padded(Dk) + padded(Dv)) * 4
        size = (chunks * (1 if mu is None else 2) + 2 * N) * state + 8 * T * padded(E)
        at_once = max(1, min(H, LIMIT // (B * size)))
        parts = []
        for low in range(0, H, at_once):
            heads = slice(low, min(low + at_once, H))
            rows = Rows(*(x[:, :, heads].contiguous() for x in (q, k, v, dy, u)))
            gates = {n: None if x is None else x[:, :, heads] for n, x in {"g": g, "eta": eta, "mu": mu}.items()}
            own = {n: x.view(B, H, N, *x.shape[1:])[:, heads].flatten(0, 2) for n, x in (kept or {}).items()}
            layers = (W_up[heads], W_down[heads])
            call = _Call(rows, gates, *layers, memory_residual, inner_chunk, float(scale), top_k, segments, own)
            parts.append(self._heads(call))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _heads(self, call: _Call) -> Gradients:
        rows, scale, adds = call.rows, call.scale, call.residual
        tables = make_tables(call.segments, call.inner_chunk, self.checkpoint, rows.k.device)
        by_segment = torch.stack((tables.seg_piece, tables.seg_last + 1), 1)
        lane = torch.stack((tables.seq_begin, tables.seq_end), 1) if self.checkpoint else by_segment
        places, weights = make_weights(tables, call.inner_chunk, **call.gates, like=rows.k)
        initial = Layers(_widened(call.W_up), _widened(call.W_down))
        known = Layers(call.kept["up"], call.kept["down"]) if "up" in call.kept else None
        # Momentum goes on from segment to segment, and only states are known.
        alone = known is not None and weights.momentum is None
        states, errors, made = self.replay.deep_replay(
            k=rows.k, v=rows.v, initial=initial, known=known if alone else None, weights=weights,
            lanes=by_segment if alone else lane, tables=tables, adds=adds, ended=known is None,
        )  # fmt: skip
        ends = Layers(*made) if known is None else known
        written = _Written(tables, lane, weights, states, errors, ends)
        made = Made(*(torch.empty_like(x, dtype=torch.float32) for x in (rows.q, rows.k, rows.v)))
        read = self._reads(call, written, made)
        shared = {
            "rows": rows, "saved": read.saved, "shares": read.shares, "weights": weights, "states": states,
            "tables": tables, "scale": scale,
        }  # fmt: skip
        dweights, made = self.online.online_sums(**shared, made=made)
        dweights = self.write_backward(
            **shared, keys=read.keys, dweights=dweights, dends=read.dends, made=made, lanes=lane, adds=adds
        )
        firsts = tables.segment.index_select(0, tables.seq_begin) if self.checkpoint else None
        Dk, E, Dv = call.W_up.shape[1], *call.W_down.shape[1:]
        dW_up, dW_down = (_start(x, firsts, len(rows.k), rows.k.shape[2]) for x in (read.dends.up, read.dends.down))
        found = gate_gradients(places, dweights, **call.gates)
        return Gradients(
            made.dq, made.dk, made.dv, None if read.du is None else read.du.float(), g=found.get("g"),
            eta=found.get("eta"), mu=found.get("mu"), W_up=dW_up[:, :Dk, :E].contiguous(),
            W_down=dW_down[:, :E, :Dv].contiguous(),
        )  # fmt: skip

    def _reads(self, call: _Call, written: _Written, made: Made) -> _Read:
        """The gradients of end states, of connectors, and those of queries as far as they come of cached states."""
        rows, scale = call.rows, call.scale
        # Every segment is one piece.
        whole = make_tables(call.segments, call.segments.longest, self.checkpoint, rows.k.device)
        shares = Shares(even=_even(call.segments, rows.k.device) if self.reads.averages else None)
        means = gates = dgamma = delta = du = keys = None
        if self.gates is not None:
            means = call.kept["means"] if "means" in call.kept else self.replay.key_means(k=rows.k, tables=whole)
            gates = self._gates(call, whole, means)
            dgamma, delta, shares = torch.empty_like(gates.logits), torch.empty_like(gates.lse), gates.shares
        saved, own = self.online.deep_online_backward(
            q=rows.q, k=rows.k, v=rows.v, dy=rows.dy, states=written.states, errors=written.errors,
            weights=written.weights, tables=written.tables, scale=scale,
        )  # fmt: skip
        ends = written.ends.to(rows.k.dtype)
        read = {"q": rows.q, "dy": rows.dy, "ends": ends, "shares": shares, "saved": saved, "tables": whole}
        if self.reads.mixes_parameters:
            own = self.read.mix_backward(**read, scale=scale)
        own = own.sum(0)
        self.read.deep_read_backward(
            **read, own=own, dgamma=dgamma, delta=delta, dq=made.dq, scale=scale, adds=call.residual
        )
        dends = self.state_backward(**read, scale=scale)
        if self.gates_backward is not None and dgamma is not None and delta is not None:
            reads = ReadGradients(None, dgamma[None], own[None], delta[None])
            dgates = self.gates_backward(
                k=rows.k, u=rows.u, means=means, sums=None, gates=gates, dpicked=None, reads=reads, tables=whole
            )
            du, keys = dgates.du, Keys(dgates.pull, dgates.dmeans)
        return _Read(saved, shares, dends, du, keys)

    def _gates(self, call: _Call, whole: Tables, means: Tensor) -> Gates:
        assert self.gates is not None
        # More than all segments cannot be chosen.
        top_k = min(max(call.top_k, 1), call.segments.count)
        found = self.gates(
            u=call.rows.u, k=call.rows.k, means=means, sums=None, tables=whole,
            tiles=whole.tiles(self.config["gates_BT"]), top_k=top_k,
        )  # fmt: skip
        return Gates(found.logits, found.logits, found.lse)


def _widened(W: Tensor) -> Tensor:
    """Zeros up to the widths that kernels are compiled for."""
    rows, columns = (padded(width) - width for width in W.shape[1:])
    return pad(W.to(torch.float32), (0, columns, 0, rows)).contiguous()


def _start(dends: Tensor | None, firsts: Tensor | None, B: int, H: int) -> Tensor:
    """[H, ..]: the sum over lanes, whose first segments are ``firsts`` (``None``: all), of dends [B*H * N, ..]."""
    assert dends is not None
    dends = dends.view(B, H, -1, *dends.shape[1:])
    return (dends if firsts is None else dends.index_select(2, firsts)).sum((0, 2))


def _even(segments: Segments, device: torch.device) -> Tensor:
    """[T]: 1 over the states that each token reads."""
    return _ranks(segments.spans).to(device, non_blocking=True)


@lru_cache(maxsize=64)
def _ranks(spans: tuple[tuple[int, int, int], ...]) -> Tensor:
    with ordinary():
        count = [1.0 / (number - first + 1) for number, (_, _, first) in enumerate(spans)]
        sizes = torch.tensor([end - begin for begin, end, _ in spans])
        return torch.tensor(count, dtype=torch.float32).repeat_interleave(sizes)


def _joined(parts: list[Gradients]) -> Gradients:
    """The gradients of all heads; of layers heads come first."""
    found: dict[str, Any] = {}
    for name, x in zip(Gradients._fields, zip(*parts, strict=True), strict=True):
        found[name] = None if x[0] is None else torch.cat(x, 0 if name.startswith("W_") else 2)
    return Gradients(**found)


LAUNCHER = TritonDeepBackward
