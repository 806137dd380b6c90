"""What `benchmarks/gpu.py` compares: mctune's Triton kernels, torch's attention, flash-linear-attention, torch.compile.

A contender takes the tensors of a shape and returns the call that is timed. One that cannot run here raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mctune.backends import get_backend
from mctune.core.config import Config
from mctune.core.errors import MctuneError
from mctune.core.problem import Problem
from mctune.core.target import Target
from mctune.runtime.functional import memory_caching
from mctune.runtime.memory import LayerMemory
from mctune.runtime.segments import make_segments
from mctune.runtime.triton_tables import DEVICE
from mctune.search.package import load_package

Tensor = torch.Tensor
Results = Mapping[str, Tensor]
Call = Callable[[], Results]
NARROW = "16-bit states"
KINDS = ("forward", "training", "decode")
"""y; y and the gradients of all inputs; one token after T of context."""


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
        """What mctune computes at this shape: ``base`` is the recurrence alone, one segment without a cache."""
        pass_ = "backward" if self.kind == "training" else self.kind
        ssc = {"top_k": 8 if self.kind == "decode" else 4} if aggregation == "ssc" else {}
        cached = {"aggregation": aggregation, "segment_length": self.C, **ssc}
        chosen = {"aggregation": "residual", "segment_length": self.T} if aggregation == "base" else cached
        sizes = {"B": self.B, "T": self.T, "H": self.H, "Dk": self.D, "Dv": self.D, "dtype": self.dtype}
        return Problem(pass_=pass_, **sizes, **chosen)


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


@dataclass(frozen=True)
class Contender:
    """One way to compute a shape.

    Attributes:
        name: in tables.
        computes: the aggregation whose results it must have (``base`` for the recurrence alone); "" for something else.
        make: the call for a shape and its tensors.
        config: the configurations of its kernels, where it has any.
        exact: whether it compiles for the very shape, not for its widths and segments.
        built: whether there is nothing to compile.
        late: whether it takes so long to compile that it is compared when everything else has been.
    """

    name: str
    computes: str
    make: Callable[[Shape, Data], Call]
    config: Callable[[Shape], Config] | None = None
    built: bool = False
    exact: bool = False
    late: bool = False


def contenders(shape: Shape, target: Target, package: Path | None, folder: Path) -> list[Contender]:
    """Everything that is compared at a shape; the first is what the others are set against."""
    ours = []
    for aggregation in ("grm", "ssc") if shape.kind == "decode" else ("grm", "ssc", "base"):
        kernels = Kernels(aggregation, target, package, folder)
        if package is not None:
            ours.append(Contender(f"mctune {aggregation}", aggregation, kernels.make, kernels.config))
        plain = Kernels(aggregation, target, None, folder)
        ours.append(Contender(f"mctune {aggregation}, defaults", aggregation, plain.make, plain.config))
        if shape.kind == "decode":
            narrow = Kernels(aggregation, target, package, folder, narrow=True)
            ours.append(Contender(f"mctune {aggregation}, {NARROW}", aggregation, narrow.make, narrow.config))
    others = [
        Contender("sdpa, flash", "", _attention(SDPBackend.FLASH_ATTENTION), built=True),
        Contender("sdpa, cudnn", "", _attention(SDPBackend.CUDNN_ATTENTION), built=True),
    ]
    if shape.kind != "decode":
        others.append(Contender("fla chunk_linear_attn", "base", _fla_linear))
        others.append(Contender("fla chunk_simple_gla", "", _fla_gla))
        # Its kernels know how many levels there are.
        others.append(Contender("fla chunk_log_linear_attn", "", _fla_log_linear, exact=True))
        # A compiled graph is for one shape, minutes each: at the shape that the comparison is about, no longer rows.
        if shape.T <= 16384 and shape.C == 256 and shape.B == 1:
            name = "torch.compile of mctune's eager grm"
            others.append(Contender(name, "grm", _compiled("grm"), exact=True, late=True))
    return [*ours, *others]


# --- mctune


@dataclass(frozen=True)
class Kernels:
    """mctune's kernels for an aggregation: those of a package that serve a shape, else the spaces' defaults."""

    aggregation: str
    target: Target
    package: Path | None
    folder: Path
    narrow: bool = False
    """Whether cached states are kept in the dtype of the shape, as ``MemoryCache(state_dtype=...)`` does."""

    def config(self, shape: Shape) -> Config:
        """Of the pass that takes longest."""
        return self._launcher(shape.problem(self.aggregation))[1]

    def make(self, shape: Shape, data: Data) -> Call:
        """The call of a forward, of a forward and a backward, or of a step."""
        problem = shape.problem(self.aggregation)
        options: dict[str, Any] = {
            "g": None, "beta": None, "lam": None, "scale": shape.D**-0.5, "top_k": problem.top_k or 1,
        }  # fmt: skip
        if shape.kind == "decode":
            return self._step(shape, data, options)
        options["segments"] = make_segments(shape.T, "constant", problem.segment_length or 1, None)
        forward, _ = self._launcher(problem.replace(pass_="forward"))
        if shape.kind == "forward":
            return lambda: {"y": forward(data.q, data.k, data.v, data.u, **options).y}
        backward, _ = self._launcher(problem)
        # As a model's autograd does.
        keep = [name for group in backward.wants if forward.gives.issuperset(group) for name in group]

        def step() -> Results:
            found = forward(data.q, data.k, data.v, data.u, **options, keep=keep)
            grads = backward(data.dy, data.q, data.k, data.v, data.u, **options, kept=found.kept)
            du = {"du": grads.u} if problem.routed else {}
            return {"y": found.y, "dq": grads.q, "dk": grads.k, "dv": grads.v, **du}

        return step

    def _step(self, shape: Shape, data: Data, options: dict[str, Any]) -> Call:
        launcher, _ = self._launcher(shape.problem(self.aggregation))
        memory = memory_after(shape, data)
        if self.narrow:
            memory.states = (memory.states[0].to(data.k.dtype),)
        q, k, v, u = (x[:, -1:].contiguous() for x in (data.q, data.k, data.v, data.u))
        return lambda: {"y": launcher(q, k, v, u, **options, segment_length=shape.C, memory=memory)}

    def _launcher(self, problem: Problem) -> tuple[Any, Config]:
        if self.package is not None:
            found = _tuned(self.package, problem)
            if found is not None:
                return found
            if not self.narrow:
                raise MctuneError(f"{self.package} has no kernel for {problem}")
        return _default(problem.replace(B=1, T=min(problem.T, 4 * (problem.segment_length or 1))), self.target,
                        self.folder)  # fmt: skip


def memory_after(shape: Shape, data: Data) -> LayerMemory:
    """What a layer remembers of all but the last token."""
    B, H, D, C, N = shape.B, shape.H, shape.D, shape.C, (shape.T - 1) // shape.C
    rows = data.k[:, : N * C].float().unflatten(1, (N, C))
    values = data.v[:, : N * C].float().unflatten(1, (N, C))
    rest, rest_values = data.k[:, N * C : -1].float(), data.v[:, N * C : -1].float()
    states = torch.zeros(B, H, N + 1, D, D, device=data.k.device)
    states[:, :, :N] = torch.einsum("bnthk,bnthv->bhnkv", rows, values)
    descriptors = torch.zeros(B, H, N + 1, D, device=data.k.device)
    descriptors[:, :, :N] = rows.mean(2).transpose(1, 2)
    memory = LayerMemory(
        states=(states,), descriptors=descriptors, online=(torch.einsum("bthk,bthv->bhkv", rest, rest_values),),
        key_sum=rest.sum(1), last_key=torch.zeros(B, H, D, device=data.k.device),
        last_value=torch.zeros(B, H, D, device=data.k.device), start=(), momentum=(),
        cached=torch.zeros(B, dtype=torch.int32), filled=torch.zeros(B, dtype=torch.int32),
    )  # fmt: skip
    memory.advance(shape.T - 1, C)
    return memory


@lru_cache
def _default(problem: Problem, target: Target, folder: Path) -> tuple[Any, Config]:
    backend = get_backend("triton")
    space = backend.space(problem)
    config = space.first_valid(lambda candidate: space.valid(candidate, problem, target))
    assert config is not None
    return backend.load(problem, config, backend.build(problem, config, target, folder)), config


def _tuned(package: Path, problem: Problem) -> tuple[Any, Config] | None:
    runtime = load_package(package).runtime
    names = [name for name in runtime.table.Request.__dataclass_fields__ if name != "device"]
    request = runtime.table.Request(**{name: getattr(problem, name) for name in names}, device=DEVICE)
    entry = runtime.table.find(runtime.dispatch.TABLE, request, "triton")
    if entry is None:
        return None
    return runtime.dispatch.launcher(entry), Config.of(entry.record["config"])


# --- others


def eager(shape: Shape, data: Data, aggregation: str) -> Call:
    """mctune's PyTorch path in float32: what results are held to."""
    problem = shape.problem(aggregation)
    wide = Data(*(x.float() for x in (data.q, data.k, data.v, data.u, data.dy, data.g)))
    return _through_autograd(shape, wide, _path(memory_caching, problem), problem.routed)


def _compiled(aggregation: str) -> Callable[[Shape, Data], Call]:
    def make(shape: Shape, data: Data) -> Call:
        problem = shape.problem(aggregation)
        # Left to itself it takes the second length that it sees for one of any, and compiles more slowly.
        compiled = torch.compile(memory_caching, dynamic=False)
        return _through_autograd(shape, data, _path(compiled, problem), problem.routed)

    return make


def _path(function: Callable[..., Tensor], problem: Problem) -> Callable[..., Tensor]:
    ssc = {"top_k": problem.top_k} if problem.top_k else {}

    def run(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return function(
            q, k, v, u, aggregation=problem.aggregation, segment_length=problem.segment_length, backend="eager", **ssc
        )

    return run


def _through_autograd(
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
        y = function(**inputs)
        grads = torch.autograd.grad(y, [inputs[name] for name in names], data.dy)
        return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(names, grads, strict=True)}}

    return step


def _attention(backend: SDPBackend) -> Callable[[Shape, Data], Call]:
    """Causal attention; a decoded token attends to the whole context."""

    def make(shape: Shape, data: Data) -> Call:
        if shape.kind == "decode":
            q = data.q[:, -1:].transpose(1, 2).contiguous()
            k, v = (x.transpose(1, 2).contiguous() for x in (data.k, data.v))

            def step() -> Results:
                with torch.no_grad(), sdpa_kernel(backend):
                    return {"y": F.scaled_dot_product_attention(q, k, v)}

            return step

        def attend(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                heads = (x.transpose(1, 2) for x in (q, k, v))
                return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

        return _through_autograd(shape, data, attend, routed=False)

    return make


def _fla_linear(shape: Shape, data: Data) -> Call:
    from fla.ops.linear_attn import chunk_linear_attn

    def run(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        y: Tensor = chunk_linear_attn(q, k, v, normalize=False)[0]
        return y

    return _through_autograd(shape, data, run, routed=False)


def _fla_gla(shape: Shape, data: Data) -> Call:
    from fla.ops.simple_gla import chunk_simple_gla

    def run(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        y: Tensor = chunk_simple_gla(q, k, v, data.g)[0]
        return y

    return _through_autograd(shape, data, run, routed=False)


def _fla_log_linear(shape: Shape, data: Data) -> Call:
    """Every level of the hierarchy with a weight of its own, in the dtype of q: its kernels multiply the two."""
    from fla.ops.log_linear_attn import chunk_log_linear_attn

    levels = math.ceil(math.log2(shape.T)) + 1
    scales = torch.rand(*data.g.shape, levels, device=data.g.device).to(data.q.dtype)

    def run(q: Tensor, k: Tensor, v: Tensor, u: Tensor) -> Tensor:
        y: Tensor = chunk_log_linear_attn(q, k, v, data.g, scales, scale=None)[0]
        return y

    return _through_autograd(shape, data, run, routed=False)
