"""What `mctune bench` compares at a shape, mctune's Triton kernels first.

A contender takes the tensors of a shape and returns the call that is timed. One that cannot run here raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

import mctune.measure.gpu.others as other
from mctune.backends import get_backend
from mctune.core.config import Config
from mctune.core.errors import MctuneError
from mctune.core.problem import Problem
from mctune.core.target import Target
from mctune.measure.gpu.shapes import Call, Data, Results, Shape, through_autograd, through_options
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.kernels.triton.tables import DEVICE
from mctune.runtime.memory import LayerMemory
from mctune.runtime.segments import make_segments
from mctune.verify.package import find_entry, launcher_of, load_package

NARROW = "16-bit states"
TORCH_ATTENTION = ("sdpa", "products")
"""How the names of torch's own forms of attention begin."""


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
        tunes: whether its kernels choose among many configurations when they first run.
    """

    name: str
    computes: str
    make: Callable[[Shape, Data], Call]
    config: Callable[[Shape], Config] | None = None
    built: bool = False
    exact: bool = False
    late: bool = False
    tunes: bool = False


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
    return [*ours, *_attention(shape), *(_recurrences(shape) if shape.kind != "decode" else [])]


def _attention(shape: Shape) -> list[Contender]:
    """A decoded token's has more forms: which one is the fastest depends on the context and the release."""
    found = [
        Contender("sdpa, flash", "", other.attention(SDPBackend.FLASH_ATTENTION), built=True),
        Contender("sdpa, cudnn", "", other.attention(SDPBackend.CUDNN_ATTENTION), built=True),
    ]
    if shape.kind == "decode":
        found.append(Contender("sdpa, efficient", "", other.attention(SDPBackend.EFFICIENT_ATTENTION), built=True))
        found.append(Contender("products and softmax", "", other.products, built=True))
    if other.fa3_module() is not None:
        found.append(Contender("flash attention 3", "", other.fa3, built=True))
    return found


def _recurrences(shape: Shape) -> list[Contender]:
    found = [
        Contender("fla chunk_linear_attn", "base", other.fla_linear, tunes=True),
        Contender("fla chunk_simple_gla", "", other.fla_gla, tunes=True),
        # Its kernels are compiled for a number of levels.
        Contender("fla chunk_log_linear_attn", "", other.fla_log_linear, exact=True),
    ]
    # A graph is compiled for each shape and takes minutes: only where the comparison is decided, not for longer rows.
    if shape.T <= 16384 and shape.C == 256 and shape.B == 1:
        name = "torch.compile of mctune's eager grm"
        found.append(Contender(name, "grm", other.compiled("grm"), exact=True, late=True))
    return found


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
        """The configuration of the pass that takes longest."""
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
        # As autograd does in a model.
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
    rows = data.k[:, : N * C].float().view(B, N, C, H, D)
    values = data.v[:, : N * C].float().view(B, N, C, H, D)
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
    module = load_package(package)
    entry = find_entry(module, problem, DEVICE, "triton")
    return None if entry is None else (launcher_of(module, entry), Config.of(entry.record["config"]))


def eager(shape: Shape, data: Data, aggregation: str) -> Call:
    """mctune's PyTorch path in float32: what results are held to."""
    problem = shape.meaning(aggregation)
    wide = Data(*(x.float() for x in (data.q, data.k, data.v, data.u, data.dy, data.g)))
    return through_autograd(shape, wide, through_options(memory_caching, problem), problem.routed)
