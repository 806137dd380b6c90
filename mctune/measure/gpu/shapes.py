"""The shapes that `mctune bench` measures, their tensors, and how a function of q, k, v, u is called at one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from mctune.core.problem import Problem
from mctune.runtime.kernels.triton.tables import DEVICE

Tensor = torch.Tensor
Results = Mapping[str, Tensor]
Call = Callable[[], Results]
KINDS = ("forward", "training", "decode")
"""y; y and the gradients of all inputs; one token after T of context."""
BASE_SEGMENT = 256
"""Tokens of the segments in which ``base`` computes: its kernels hold so many whole."""


@dataclass(frozen=True)
class Shape:
    """What is computed: ``kind`` is one of :data:`KINDS`, ``C`` the segment length, q, k, v are [B, T, H, D]."""

    kind: str
    B: int
    T: int
    H: int
    D: int
    C: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.kind} B{self.B} T{self.T} H{self.H} D{self.D} C{self.C} {self.dtype}"

    def problem(self, aggregation: str) -> Problem:
        """What mctune computes at this shape.

        ``base``, plain linear attention, is ``residual``: the states of independent segments, added up, are those of
        one long segment. As segments of :data:`BASE_SEGMENT` it keeps them for its backward, which one long segment
        would compute again.
        """
        if aggregation == "base":
            own = BASE_SEGMENT if self.T > BASE_SEGMENT else self.C
            return self._problem(aggregation="residual", segment_length=own)
        ssc = {"top_k": 8 if self.kind == "decode" else 4} if aggregation == "ssc" else {}
        return self._problem(aggregation=aggregation, segment_length=self.C, **ssc)

    def meaning(self, aggregation: str) -> Problem:
        """The problem that its results are held to and its bound is counted for: ``base`` has no segments."""
        if aggregation == "base":
            return self._problem(aggregation="residual", segment_length=self.T)
        return self.problem(aggregation)

    def _problem(self, **chosen: str | int) -> Problem:
        pass_ = "backward" if self.kind == "training" else self.kind
        sizes = {"B": self.B, "T": self.T, "H": self.H, "Dk": self.D, "Dv": self.D, "dtype": self.dtype}
        return Problem(pass_=pass_, **sizes, **chosen)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Data:
    """Random tensors of a shape: q, k, v, u, dy [B, T, H, D] (one token of q and u for decode), g [B, T, H] float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    u: Tensor
    dy: Tensor
    g: Tensor

    @classmethod
    def of(cls, shape: Shape, seed: int = 0) -> Data:
        """Fresh ones, on the device that kernels run on."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        dtype: torch.dtype = getattr(torch, shape.dtype)

        def normal(size: float = 1.0) -> Tensor:
            sizes = (shape.B, shape.T, shape.H, shape.D)
            return (torch.randn(*sizes, generator=generator, device=DEVICE) * size).to(dtype)

        g = -0.1 * torch.rand(shape.B, shape.T, shape.H, generator=generator, device=DEVICE)
        # Logits of about unit size: gates that neither choose one segment nor are all the same.
        return cls(normal(), normal(), normal(), normal(math.sqrt(shape.C / shape.D)), normal(), g)

    def prefix(self, tokens: int) -> Data:
        """The first tokens of the first sequence."""
        return Data(*(x[:1, :tokens].contiguous() for x in (self.q, self.k, self.v, self.u, self.dy, self.g)))

    @cached_property
    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """The last token's q [B, H, 1, D], and k and v of all [B, H, T, D]: how attention keeps its cache. Made once,
        and by nobody's time."""
        q, k, v = (x.transpose(1, 2).contiguous() for x in (self.q[:, -1:], self.k, self.v))
        return q, k, v


def through_autograd(
    shape: Shape, data: Data, function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], routed: bool
) -> Call:
    """y, and for a training step what autograd has of q, k, v and, where u takes part, u."""
    if shape.kind == "forward":

        def forward() -> Results:
            with torch.no_grad():
                return {"y": function(data.q, data.k, data.v, data.u)}

        return forward
    names = ("q", "k", "v", "u") if routed else ("q", "k", "v")
    inputs = {name: getattr(data, name).detach().requires_grad_(name in names) for name in ("q", "k", "v", "u")}

    def step() -> Results:
        y = function(inputs["q"], inputs["k"], inputs["v"], inputs["u"])
        grads = torch.autograd.grad(y, [inputs[name] for name in names], data.dy)
        return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}

    return step


def through_options(function: Callable[..., Tensor], problem: Problem) -> Callable[..., Tensor]:
    """``memory_caching``, or what was made of it, as a function of q, k, v, u alone: mctune's PyTorch path."""
    ssc = {"top_k": problem.top_k} if problem.top_k else {}

    def run(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return function(
            q, k, v, u, aggregation=problem.aggregation, segment_length=problem.segment_length, backend="eager", **ssc
        )

    return run
