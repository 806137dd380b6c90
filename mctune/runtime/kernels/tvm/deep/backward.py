"""Launch the backward kernels of a deep memory from one exported library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ....segments import Segments
from ....traits import AGGREGATIONS
from ...kept import left_by, wanted
from ...results import Gradients
from ..arguments import launch
from ..loader import load_library, runnable
from ..matrix.forward import check_reach, flat_rows
from .sizes import Shape, flat_arguments

_OPERATIONS = (
    *("deep_write", "deep_gates", "deep_mix_backward", "deep_read_backward", "deep_write_backward"),
    "deep_gates_backward",
)


class TvmDeepBackward:
    """The gradients of y = memory_caching(q, k, v, u) of a deep memory on the CPU, by the kernels of one library.

    Args:
        library: the exported ``.so``.
        record: its entry in the tuned table; ``record["problem"]`` names the recurrence, the aggregation and the
            widths, ``record["config"]`` the configuration, ``cpu_flags`` what the library needs of the CPU.

    Attributes:
        wants: names of what the forward should keep (:func:`kept.wanted`).

    Raises:
        KernelError: if the library cannot be run on this machine.
    """

    device, dtype = "cpu", torch.float32
    """What the tensors that it reads are on and in."""

    def __init__(self, library: Path, record: Mapping[str, Any]) -> None:
        module = load_library(runnable(library, record))
        for name in _OPERATIONS:  # gates, and what mixes parameters, are in some libraries only
            setattr(self, name, module[name] if module.implements_function(name) else None)
        self.problem = record["problem"]
        self.wants = wanted("cpu", self.problem, record["config"])
        self.groups: int = record["config"]["groups"]
        self.routed = AGGREGATIONS[self.problem["aggregation"]].routed

    def __call__(
        self,
        dy: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        u: torch.Tensor,
        *,
        g: torch.Tensor | None,
        eta: torch.Tensor | None,
        mu: torch.Tensor | None,
        W_up: torch.Tensor,
        W_down: torch.Tensor,
        memory_residual: bool,
        inner_chunk: int,
        scale: float,
        top_k: int,
        segments: Segments,
        kept: Mapping[str, torch.Tensor] | None = None,
    ) -> Gradients:
        """Gradients from float32 dy, v ``[B, T, H, Dv]``, q, k, u ``[B, T, H, Dk]``, gates ``[B, T, H]`` and layers.

        ``kept``: what ``wants`` names, of the forward of the same arguments (:mod:`kept`); without it that is computed
        again.

        Raises:
            KernelError: if an array has more elements than the kernels' 32-bit indices reach.
        """
        s = Shape.of(self.problem, q, v, W_up, segments)
        groups, width = 1 if s.mixed else self.groups, max(s.Dk, s.Dv)
        # A task keeps the states at the starts of its segment's inner chunks, and rows of each in whole vectors.
        inner = min(inner_chunk, segments.longest)
        chunks = -(-segments.longest // inner)
        check_reach(
            s.rows * max(groups * s.Dk, s.Dv, s.E),
            max(s.states, chunks) * s.E * width,
            s.states * s.T,
        )
        x = flat_arguments(s, q, k, v, u, g, eta, mu, W_up, W_down, memory_residual, inner_chunk, scale, top_k)
        x["dy"] = flat_rows(dy, s.Dv)
        # What was made without the rest is of no use: the writes leave all of it, but for the momentum that enters.
        whole = kept and not s.enters and set(left_by(self.problem)).issubset(kept)
        kept = kept if kept and whole else {}
        self._again(s, x, kept)
        self._reads(s, x, groups, kept)
        self._writes(s, x)
        return self._gradients(s, x, q, v, W_up, groups)

    def _launch(self, kernel: str, x: Mapping[str, Any]) -> None:
        launch(kernel, getattr(self, kernel), x)

    def _again(self, s: Shape, x: dict[str, Any], kept: Mapping[str, torch.Tensor]) -> None:
        """What the forward has left: what it kept, and the rest computed again where it is needed."""
        x |= s.left_by_writes(x["q"].new_empty, kept, True)
        if not kept:
            self._launch("deep_write", x)

    def _reads(self, s: Shape, x: dict[str, Any], groups: int, kept: Mapping[str, torch.Tensor]) -> None:
        """Gates; gradients of the cached states, of the gates and, in parts, of q."""
        new = x["q"].new_empty
        hidden = s.rows if s.mixed else 1
        x["gamma"], x["dgamma"], x["own"] = new(s.states, s.T), new(s.states, s.T), new(s.rows)
        x["down_own"] = new(s.rows)
        x["mixed"], x["dhidden"] = new(hidden, s.E), new(hidden, s.E)
        x["parts"] = new(groups * s.rows, s.Dk)
        self._launch("deep_gates", x)
        if s.mixed:
            # One that is not given is not read.
            x["given"], x["mixture"] = int("mixture" in kept), kept.get("mixture", x["mixed"])
            self._launch("deep_mix_backward", x)
        x["dup"], x["ddown"] = torch.empty_like(x["up"]), torch.empty_like(x["down"])
        self._launch("deep_read_backward", x)

    def _writes(self, s: Shape, x: dict[str, Any]) -> None:
        """Gradients of the writes and of what is read of the online memory; then of the gates that u has made."""
        for name in ("q", "k", "v", "g", "eta", "mu"):
            x[f"d{name}"] = torch.empty_like(x[name])
        new, lanes = x["q"].new_empty, s.lanes
        x["dstart_up"], x["dstart_down"] = new(lanes * s.Dk, s.E), new(lanes * s.E, s.Dv)
        self._launch("deep_write_backward", x)
        if self.routed:
            x["du"] = torch.empty_like(x["q"])
            self._launch("deep_gates_backward", x)

    def _gradients(
        self, s: Shape, x: Mapping[str, Any], q: torch.Tensor, v: torch.Tensor, W_up: torch.Tensor, groups: int
    ) -> Gradients:
        """In the shapes of the inputs; sums over parts, and over all that started from one head's layers, in order."""

        def rows(name: str, width: int) -> torch.Tensor:
            found: torch.Tensor = x[name].view(s.B, s.T, s.H, -1)[..., :width].contiguous()
            return found

        def layers(name: str, height: int, m: int, n: int) -> torch.Tensor:
            parts: torch.Tensor = x[name].view(s.B, s.H, -1, height, x[name].shape[1])
            return parts.sum((0, 2))[:, :m, :n].contiguous()

        Dk, Dv, E = q.shape[3], v.shape[3], W_up.shape[2]
        for part in x["parts"].view(groups, *x["dq"].shape):
            x["dq"].add_(part)
        x["dq"].mul_(x["scale"])
        gates = {name: x[f"d{name}"].view(s.B, s.T, s.H) for name in s.gates}
        return Gradients(
            rows("dq", Dk),
            rows("dk", Dk),
            rows("dv", Dv),
            rows("du", Dk) if self.routed else None,
            **gates,
            W_up=layers("dstart_up", s.Dk, Dk, E),
            W_down=layers("dstart_down", s.E, E, Dv),
        )


LAUNCHER = TvmDeepBackward
