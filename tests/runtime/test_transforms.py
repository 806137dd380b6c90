"""What torch does to a model that calls memory_caching: compile, export, vmap, checkpoint, autocast, data-parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import parallel
import pytest
import torch
from calls import with_states
from tables import DLA, LINEAR, LOGARITHMIC, PACKED, SWLA, TITANS, TUNED, draw, problem_id
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from mctune.core.problem import Problem
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.errors import ArgumentError
from mctune.runtime.kernels import dispatch
from mctune.runtime.kernels.table import Table
from mctune.runtime.ops import run as ops_run

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:the eager path runs"),
]
UNMAPPED = ("W_up", "W_down")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=("untuned", "tuned"))
def launched(request: pytest.FixtureRequest, table: Table, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes for which a kernel is launched, with kernels and without."""
    passes: list[str] = []
    real = dispatch.kernel_for

    def note(call: Any, pass_: str, route: str) -> Any:
        passes.append(pass_)
        return real(call, pass_, route)

    monkeypatch.setattr(dispatch, "TABLE", table if request.param == "tuned" else Table())
    monkeypatch.setattr(ops_run, "kernel_for", note)
    return passes


def expected_passes(problem: Problem, passes: tuple[str, ...]) -> set[str]:
    return set(passes) if dispatch.TABLE.entries and problem in TUNED else set()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-4)


def trained(function: Callable[..., Tensor], tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """y and the gradients of a scalar of it."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    y = function(**leaves)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), {name: x.grad for name, x in leaves.items() if x.grad is not None}


def grid(problems: Sequence[Problem], hows: Sequence[str], first: Sequence[tuple[Problem, str, str]]) -> list[Any]:
    """Every problem in every way, with kernels and without; all but ``first`` are for `make test-all`."""
    return [
        pytest.param(*one, marks=() if one in first else pytest.mark.slow, id="-".join((problem_id(one[0]), *one[1:])))
        for one in product(problems, hows, ("untuned", "tuned"))
    ]


# Inductor takes 10 s a case: once with kernels, once for each kind of memory without.
COMPILED = [(problem, "aot_eager", how) for problem in TUNED for how in ("untuned", "tuned")]
COMPILED += [(LINEAR, "inductor", "tuned"), (SWLA, "inductor", "untuned"), (TITANS, "inductor", "untuned")]


@pytest.mark.parametrize(
    ("problem", "backend", "launched"), grid(TUNED, ("aot_eager", "inductor"), COMPILED), indirect=["launched"]
)
def test_compile_gives_one_graph_that_trains(problem: Problem, backend: str, launched: list[str]) -> None:
    tensors, options = draw(problem)

    def function(**tensors: Tensor) -> Tensor:
        return 2 * memory_caching(**tensors, **options)

    expected = trained(lambda **tensors: 2 * memory_caching(**tensors, **options, backend="eager"), tensors)
    launched.clear()
    found = trained(torch.compile(function, backend=backend, fullgraph=True), tensors)
    close(found, expected)
    assert set(launched) == expected_passes(problem, ("forward", "backward"))


@pytest.mark.parametrize("problem", (LINEAR, SWLA, LOGARITHMIC, DLA), ids=problem_id)
def test_other_lengths_and_batches_do_not_compile_again(problem: Problem, launched: list[str]) -> None:
    options = draw(problem)[1]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda **tensors: memory_caching(**tensors, **options), backend=counter, fullgraph=True, dynamic=False
    )
    # Sizes that differ from each other: the compiler takes equal ones for one size.
    for T, B in ((43, 3), (51, 4), (7, 6), (160, 5)):
        tensors, _ = draw(problem.replace(T=T, B=B))
        for name, x in tensors.items():
            if name not in UNMAPPED:
                torch._dynamo.mark_dynamic(x, [0, 1])
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        y = compiled(**leaves)
        y.sum().backward()
        expected = memory_caching(**{name: x.detach() for name, x in leaves.items()}, **options, backend="eager")
        close(y, expected)
    assert counter.frame_count == 1


def test_other_widths_compile_again(launched: list[str]) -> None:
    """A kernel is for one width: the choice is made anew, even where the compiler takes widths for dynamic."""
    compiled = torch.compile(
        lambda q, k, v: memory_caching(q, k, v, segment_length=16), backend="eager", dynamic=True, fullgraph=True
    )
    for Dk in (12, 13, 12, 14):
        q, k, v = (torch.randn(1, 37, 2, D) for D in (Dk, Dk, 20))
        launched.clear()
        close(compiled(q, k, v), memory_caching(q, k, v, segment_length=16, backend="eager"))
        assert launched == (["forward"] if dispatch.TABLE.entries and Dk == 12 else [])


def test_eager_by_name_compiles_too() -> None:
    tensors, options = draw(LINEAR)
    compiled = torch.compile(lambda **x: memory_caching(**x, **options, backend="eager"), backend="aot_eager")
    close(trained(compiled, tensors), trained(lambda **x: memory_caching(**x, **options, backend="eager"), tensors))


def test_states_for_a_cache_compile(launched: list[str]) -> None:
    tensors, options = draw(LINEAR)
    compiled = torch.compile(lambda **x: with_states(**x, **options), backend="aot_eager", fullgraph=True)
    close(compiled(**tensors), with_states(**tensors, **options))
    tensors, options = draw(PACKED)
    compiled = torch.compile(lambda **x: with_states(**x, **options), backend="aot_eager", fullgraph=True)
    close(compiled(**tensors)[0], memory_caching(**tensors, **options, backend="eager"))


class Wrapped(nn.Module):
    """A module of fixed parameters that calls ``memory_caching``."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        tensors, self.options = draw(problem)
        self.names = [name for name in tensors if name not in UNMAPPED]
        self.shared = [name for name in UNMAPPED if name in tensors]
        self.weights = nn.ParameterDict({name: tensors[name] for name in self.shared})

    def forward(self, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        # One by one: torch 2.11 does not trace `**` of a ParameterDict.
        weights = {name: self.weights[name] for name in self.shared}
        return memory_caching(**named, **weights, **self.options)


@pytest.mark.parametrize("strict", (False, True), ids=("", "strict"))
@pytest.mark.parametrize("problem", (LINEAR, SWLA, LOGARITHMIC, DLA), ids=problem_id)
def test_export_with_any_length(problem: Problem, strict: bool, launched: list[str]) -> None:
    module = Wrapped(problem)
    tensors, _ = draw(problem)
    tokens, batch = torch.export.Dim("tokens", min=2, max=4096), torch.export.Dim("batch", max=64)
    shapes = ({0: batch, 1: tokens},) * len(module.names)
    inputs = tuple(tensors[name] for name in module.names)
    if problem.B == 1:
        inputs = tuple(x.repeat(3, *(1,) * (x.dim() - 1)) for x in inputs)
    exported = torch.export.export(module, inputs, dynamic_shapes=(shapes,), strict=strict)
    for T, B in ((101, 5), (16, 2)):
        others = draw(problem.replace(T=T, B=B))[0]
        launched.clear()
        y = exported.module()(*(others[name] for name in module.names))
        assert set(launched) == expected_passes(problem, ("forward",))
        named = {name: others[name] for name in module.names}
        close(y, memory_caching(**named, **module.weights, **module.options, backend="eager"))


TRANSFORMS = ("vmap", "vmap of grad", "grad of vmap")
BATCHED = (LINEAR, SWLA, LOGARITHMIC, DLA, TITANS)
# What is compiled goes through the same rules: each transform with kernels, and each kind of memory without.
MAPPED = [(problem, how, tuned) for problem in BATCHED for how in TRANSFORMS for tuned in ("untuned", "tuned")]
MAPPED += [
    (LOGARITHMIC, "compiled vmap", "tuned"),
    (LINEAR, "compiled vmap of grad", "tuned"),
    (SWLA, "compiled grad of vmap", "tuned"),
    (LINEAR, "compiled grad of vmap", "untuned"),
    (DLA, "compiled vmap of grad", "untuned"),
    (TITANS, "compiled grad of vmap", "untuned"),
]


@pytest.mark.parametrize(
    ("problem", "how", "launched"),
    grid(BATCHED, (*TRANSFORMS, *(f"compiled {how}" for how in TRANSFORMS)), MAPPED),
    indirect=["launched"],
)
def test_vmap_is_a_loop(problem: Problem, how: str, launched: list[str]) -> None:
    """Over the second axis of some arguments; the others, and a deep memory's weights, are shared."""
    transform = how.removeprefix("compiled ")
    tensors, options = draw(problem)
    shared = {name: x for name, x in tensors.items() if name in (*UNMAPPED, "u", "beta")}
    rows = [{n: x for n, x in draw(problem, seed)[0].items() if n not in shared} for seed in range(3)]
    mapped = {name: torch.stack([row[name] for row in rows], 1) for name in rows[0]}

    def loss(mapped: dict[str, Tensor], shared: dict[str, Tensor], **how: str) -> Tensor:
        return memory_caching(**mapped, **shared, **options, **how).square().sum()

    def run(mapped: dict[str, Tensor], shared: dict[str, Tensor]) -> Any:
        if transform == "vmap":
            return torch.func.vmap(loss, (1, None))(mapped, shared)
        if transform == "vmap of grad":
            return torch.func.vmap(torch.func.grad(loss, (0, 1)), (1, None))(mapped, shared)
        return torch.func.grad(lambda *both: torch.func.vmap(loss, (1, None))(*both).sum(), (0, 1))(mapped, shared)

    function = torch.compile(run, backend="aot_eager", fullgraph=True) if transform != how else run
    launched.clear()
    found = function(mapped, shared)
    passes = ("forward",) if transform == "vmap" else ("forward", "backward")
    assert set(launched) == expected_passes(problem, passes)
    if transform == "vmap":
        close(found, torch.stack([loss(row, shared, backend="eager") for row in rows]))
        return
    own, common = [], []
    for row in rows:
        leaves = [{name: x.clone().requires_grad_() for name, x in part.items()} for part in (row, shared)]
        loss(*leaves, backend="eager").backward()
        own.append({name: x.grad for name, x in leaves[0].items()})
        common.append({name: x.grad for name, x in leaves[1].items()})
    at = 0 if transform == "vmap of grad" else 1
    scale = {name: max(float(row[name].abs().max()) for row in own) for name in mapped}
    for name in mapped:
        expected = torch.stack([row[name] for row in own], at)
        torch.testing.assert_close(found[0][name], expected, atol=2e-5 * scale[name], rtol=1e-3)
    for name in shared:
        expected = torch.stack([row[name] for row in common])
        expected = expected if transform == "vmap of grad" else expected.sum(0)
        torch.testing.assert_close(found[1][name], expected, atol=5e-5 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("what", ("W_up", "packed"))
def test_vmap_that_cannot_join_the_batch(what: str) -> None:
    tensors, options = draw(DLA if what == "W_up" else PACKED)
    name = "W_up" if what == "W_up" else "q"

    def function(x: Tensor, backend: str = "auto") -> Tensor:
        return memory_caching(**(tensors | {name: x}), **options, backend=backend)

    x = torch.stack([tensors[name]] * 2)
    with pytest.raises(ArgumentError, match=r'(W_up, which all|packed.*, where B is 1).* pass backend="eager"'):
        torch.func.vmap(function)(x)
    close(torch.func.vmap(lambda x: function(x, "eager"))(x), torch.stack([function(tensors[name])] * 2))


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("problem", (LINEAR, SWLA, PACKED, TITANS), ids=problem_id)
def test_checkpoint(problem: Problem, reentrant: bool, launched: list[str]) -> None:
    tensors, options = draw(problem)
    names = list(tensors)

    def function(*values: Tensor) -> Tensor:
        return memory_caching(**dict(zip(names, values, strict=True)), **options)

    expected = trained(lambda **x: function(*x.values()), tensors)
    found = trained(lambda **x: checkpoint(function, *x.values(), use_reentrant=reentrant), tensors)
    close(found, expected)


@pytest.mark.parametrize("recurrence", ("linear", "swla", "dla", "titans"))
def test_autocast(recurrence: str, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # All segments are chosen: which are best depends on how q and k are rounded.
    options: dict[str, Any] = {"aggregation": "ssc", "state_init": "checkpoint", "top_k": 9}
    options = options if recurrence == "swla" else {}
    deep = {"dla": DLA, "titans": TITANS}.get(recurrence)
    layer = (
        MemoryCaching(24, 2, head_dim=12, expand_v=20 / 12, recurrence=recurrence, segment_length=16, **options)
        if deep is None
        else parallel.deep_layer(deep, "auto")
    )
    seen: dict[str, torch.dtype] = {}
    module = MemoryCaching.forward.__globals__
    real = module["memory_caching"]

    def spy(*arguments: Tensor, **options: Any) -> Tensor:
        gates = {name: options[name] for name in ("g", "beta", "lam", "eta", "mu")}
        seen.update({name: x.dtype for name, x in gates.items() if x is not None})
        seen["v"] = arguments[2].dtype
        y: Tensor = real(*arguments, **options)
        return y

    monkeypatch.setitem(module, "memory_caching", spy)
    x, weights = torch.randn(2, 43, 24), torch.randn(2, 43, 24)

    def run() -> tuple[Tensor, list[Tensor]]:
        y = layer(x)[0]
        return y.detach(), list(torch.autograd.grad((y.float() * weights).sum(), list(layer.parameters())))

    y, expected = run()
    launched.clear()
    with torch.autocast("cpu", torch.bfloat16):
        narrow, found = run()
    assert narrow.dtype == torch.bfloat16 and seen.pop("v") == torch.bfloat16
    assert set(seen.values()) <= {torch.float32} and (seen or recurrence == "linear")
    assert float((narrow - y).norm()) <= 0.02 * float(y.norm())
    assert all(bool(x.isfinite().all()) for x in found)
    one, other = (torch.cat([x.flatten() for x in gradients]) for gradients in (found, expected))
    assert float((one - other).norm()) <= 0.02 * float(other.norm())
    assert set(launched) == ({"forward", "backward"} if dispatch.TABLE.entries else set())


@pytest.mark.parametrize("recurrence", ("linear", "dla", "titans"))
def test_data_parallel_is_the_joint_batch(recurrence: str, table: Table, tuned_table: Table, tmp_path: Path) -> None:
    kernels = table.entries[0].kernel.parent
    torch.multiprocessing.spawn(parallel.train, (recurrence, tmp_path, kernels), nprocs=parallel.WORLD)
    expected = parallel.gradients(parallel.model(recurrence), slice(None))
    assert len(expected) > 5
    for rank in range(parallel.WORLD):
        found = torch.load(tmp_path / f"{rank}.pt")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)
