"""How large the arrays of a call of a deep memory are, and its arguments as the kernels take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ....segments import Segments
from ....traits import AGGREGATIONS, RECURRENCES
from ...results import padded
from ..matrix.forward import flat_rows

Tensor = torch.Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a call; widths are padded.

    ``gates``: those that the recurrence takes; ``carried``: states are carried from segment to segment; ``mixed``:
    parameters are mixed.
    """

    B: int
    T: int
    H: int
    Dk: int
    Dv: int
    E: int
    segments: Segments
    gates: tuple[str, ...]
    momentum: bool
    carried: bool
    mixed: bool

    @classmethod
    def of(cls, problem: Mapping[str, Any], q: Tensor, v: Tensor, W_up: Tensor, segments: Segments) -> Shape:
        """Of a call of the kernels that were tuned for ``problem``."""
        (B, T, H, Dk), Dv, E = q.shape, v.shape[3], W_up.shape[2]
        writes = RECURRENCES[problem["recurrence"]]
        carried = problem["state_init"] == "checkpoint"
        mixed = AGGREGATIONS[problem["aggregation"]].mixes_parameters
        return cls(B, T, H, padded(Dk), padded(Dv), padded(E), segments, writes.gates, writes.momentum, carried, mixed)

    @property
    def rows(self) -> int:
        """Tokens of all heads."""
        return self.B * self.T * self.H

    @property
    def states(self) -> int:
        """Segments of all heads."""
        return self.B * self.H * self.segments.count

    @property
    def lanes(self) -> int:
        """Chains of segments that follow each other: segments, or heads."""
        return self.B * self.H if self.carried else self.states

    @property
    def enters(self) -> bool:
        """Whether momentum enters segments."""
        return self.momentum and self.carried

    def left_by_writes(self, new: Callable[..., Tensor], kept: Mapping[str, Tensor], keeps: bool) -> dict[str, Any]:
        """The outputs of ``deep_write``: ``kept``, or uninitialised; one row where a kernel has no use for an array.

        ``keeps``: with all that a backward reads.
        """
        S, entered = self.states, self.states if self.enters else 1
        hidden, raw = self.rows if self.mixed or keeps else 1, self.rows if keeps else 1
        shapes = {
            "up": (S * self.Dk, self.E), "down": (S * self.E, self.Dv), "means": (S, self.Dk),
            "enter_up": (entered * self.Dk, self.E), "enter_down": (entered * self.E, self.Dv),
            "online": (1 if self.mixed else self.rows, self.Dv), "hidden": (hidden, self.E),
            "rows_h": (hidden, self.E), "rows_err": (hidden, self.Dv), "rows_raw": (raw, self.E),
        }  # fmt: skip
        left = {name: kept[name].view(shape) if name in kept else new(*shape) for name, shape in shapes.items()}
        return {**left, "keeps": int(keeps)}


def flat_arguments(
    s: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    g: Tensor | None,
    eta: Tensor | None,
    mu: Tensor | None,
    W_up: Tensor,
    W_down: Tensor,
    memory_residual: bool,
    inner_chunk: int,
    scale: float,
    top_k: int,
) -> dict[str, Any]:
    """The inputs of the kernels by name: rows of tokens, layers one below the other, widths padded with zeros."""
    segments = s.segments
    return {
        "q": flat_rows(q, s.Dk), "k": flat_rows(k, s.Dk), "v": flat_rows(v, s.Dv), "u": flat_rows(u, s.Dk),
        "g": _gate(s, q, "g", g, 0.0), "eta": _gate(s, q, "eta", eta, 1.0), "mu": _gate(s, q, "mu", mu, 0.0),
        "W_up": _layer(W_up, s.Dk, s.E), "W_down": _layer(W_down, s.E, s.Dv),
        "begin": segments.begin, "end": segments.end, "first": segments.first, "tokens": s.T, "heads": s.H,
        "longest": segments.longest, "inner": min(inner_chunk, segments.longest), "scale": float(scale),
        "adds_input": int(memory_residual), "carries": int(mu is not None),
        # It sizes scratch memory and is a 32-bit argument; more than all segments cannot be chosen.
        "top_k": min(max(top_k, 1), segments.count),
    }  # fmt: skip


def _gate(s: Shape, like: Tensor, name: str, gate: Tensor | None, absent: float) -> Tensor:
    """``[B * T * H]``, ``absent`` where it was not given; one element for a recurrence that does not take it."""
    if name not in s.gates:
        return like.new_zeros(1)
    return like.new_full((s.rows,), absent) if gate is None else gate.reshape(s.rows).contiguous()


def _layer(W: Tensor, rows: int, cols: int) -> Tensor:
    """``[H, m, n]`` as ``[H * rows, cols]``."""
    return flat_rows(torch.nn.functional.pad(W, (0, 0, 0, rows - W.shape[1])), cols)
