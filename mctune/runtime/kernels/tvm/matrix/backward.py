"""Launch the backward kernels of one exported library: states, gradients of the read, of the states, of the writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ....segments import Segments
from ....traits import AGGREGATIONS, RECURRENCES
from ...kept import wanted
from ...results import Gradients, padded
from ..arguments import launch
from ..loader import load_library, runnable
from .forward import check_reach, flat_gates, flat_rows


class TvmBackward:
    """The gradients of y = memory_caching(q, k, v, u) on the CPU, by the kernels of one library.

    Args:
        library: the exported ``.so``.
        record: its entry in the tuned table; ``record["problem"]`` names the recurrence, the aggregation, the state
            init and the widths, ``record["config"]`` the configuration, ``cpu_flags`` what the library needs of the
            CPU.

    Attributes:
        wants: names of what the forward should keep (:func:`kept.wanted`).

    Raises:
        KernelError: if the library cannot be run on this machine.
    """

    device, dtype = "cpu", torch.float32
    """What the tensors that it reads are on and in."""

    def __init__(self, library: Path, record: Mapping[str, Any]) -> None:
        module = load_library(runnable(library, record))
        self.segment_states = module["segment_states"]
        self.read_backward = module["read_backward"]
        self.state_backward = module["state_backward"]
        self.write_backward = module["write_backward"]
        problem = record["problem"]
        self.wants = wanted("cpu", problem, record["config"])
        self.gated = RECURRENCES[problem["recurrence"]].gated
        self.routed = AGGREGATIONS[problem["aggregation"]].routed
        self.chunk = record["config"]["chunk"]
        self.checkpoint = problem["state_init"] == "checkpoint"
        self.Dk, self.Dv = padded(problem["Dk"]), padded(problem["Dv"])

    def __call__(
        self,
        dy: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        u: torch.Tensor,
        *,
        g: torch.Tensor | None,
        beta: torch.Tensor | None,
        lam: torch.Tensor | None,
        scale: float,
        top_k: int,
        segments: Segments,
        kept: Mapping[str, torch.Tensor] | None = None,
    ) -> Gradients:
        """Gradients from float32 dy, v ``[B, T, H, Dv]``, q, k, u ``[B, T, H, Dk]`` and gates ``[B, T, H]``.

        ``kept``: ``states`` and ``means`` of the forward of the same arguments (:mod:`kept`); without them they are
        computed again.

        Raises:
            KernelError: if an array has more elements than the kernels' 32-bit indices reach.
        """
        B, T, H, Dv = v.shape
        Dk, N = q.shape[-1], segments.count
        room = self._room(B, T, H, N)
        q, k, u = (flat_rows(x, self.Dk) for x in (q, k, u))
        dy, v = (flat_rows(x, self.Dv) for x in (dy, v))
        x: dict[str, Any] = {
            "dy": dy, "q": q, "u": u, "k": k, "v": v, **flat_gates(q, room.rows if self.gated else None, g, beta, lam),
            "begin": segments.begin, "end": segments.end, "first": segments.first, "tokens": T, "heads": H,
            # It sizes scratch memory and is a 32-bit argument; more than all segments cannot be chosen.
            "longest": segments.longest, "top_k": min(max(top_k, 1), N), "scale": float(scale),
        }  # fmt: skip
        self._states(x, room, kept)
        self._read(x, room, B * H)
        self._writes(x, room)
        dq, dk, du = (x[name].view(B, T, H, self.Dk)[..., :Dk].contiguous() for name in ("dq", "dk", "du"))
        dv = x["dv"].view(B, T, H, self.Dv)[..., :Dv].contiguous()
        if not self.gated:
            return Gradients(dq, dk, dv, du, None, None, None)
        return Gradients(dq, dk, dv, du, *(x[name].view(B, T, H) for name in ("dg", "dbeta", "dlam")))

    def _room(self, B: int, T: int, H: int, N: int) -> _Room:
        """How large the arrays of a call are.

        Raises:
            KernelError: if one has more elements than the kernels' 32-bit indices reach.
        """
        rows, states = B * T * H, B * H * N
        parts = states * ((not self.routed) + self.checkpoint)
        # The memory that enters each chunk, for the gradient of g.
        entering = B * H * (T // self.chunk + N) * self.Dk if self.gated else 1
        check_reach(
            rows * max(self.Dk, self.Dv),
            max(parts, states) * self.Dk * self.Dv,
            rows * N if self.routed else 3 * rows,
            entering * self.Dv,
        )
        return _Room(rows, states, gates=rows * N if self.routed else 1, parts=max(parts, 1), entering=entering)

    def _states(self, x: dict[str, Any], room: _Room, kept: Mapping[str, torch.Tensor] | None) -> None:
        """The segments' states and descriptors, those of the forward where it kept them."""
        new = x["q"].new_empty
        if kept:
            states, x["means"] = kept["states"], kept["means"]
            x["states"] = states.view(room.states * self.Dk, self.Dv)
            return
        x["states"], x["means"] = new(room.states * self.Dk, self.Dv), new(room.states, self.Dk)
        launch("segment_states", self.segment_states, x)

    def _read(self, x: dict[str, Any], room: _Room, heads: int) -> None:
        """Gradients of the read: dq, du; of the cached states and descriptors; and what ``_writes`` needs."""
        q, new = x["q"], x["q"].new_empty
        x["gamma"], x["dr"] = new(room.gates), new(room.gates)
        x["own"], x["entering"] = new(heads * 3, x["tokens"]), new(room.entering, self.Dv)
        x["dq"], x["du"] = torch.empty_like(q), torch.empty_like(q) if self.routed else torch.zeros_like(q)
        launch("read_backward", self.read_backward, x)
        x["dstates"], x["dmeans"] = torch.empty_like(x["states"]), new(room.states, self.Dk)
        x["parts"] = new(room.parts * self.Dk, self.Dv)
        launch("state_backward", self.state_backward, x)
        for name in ("gamma", "dr", "parts"):  # nothing reads them any more
            del x[name]

    def _writes(self, x: dict[str, Any], room: _Room) -> None:
        """Gradients of the writes: dk, dv and those of the gates."""
        for name in ("k", "v", "g", "beta", "lam"):
            x[f"d{name}"] = torch.empty_like(x[name])
        new = x["q"].new_empty
        x["lead_key"], x["lead_value"] = new(room.states, self.Dk), new(room.states, self.Dv)
        launch("write_backward", self.write_backward, x)


class _Room(NamedTuple):
    """Sizes of a call's arrays: rows of tokens, states; gates of cached states; states of scratch; rows of entering."""

    rows: int
    states: int
    gates: int
    parts: int
    entering: int


LAUNCHER = TvmBackward
