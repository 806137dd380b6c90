"""What a forward keeps for its backward, through the operators: the same gradients as the oracle's, however often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from holding import TARGET

from mctune import reference
from mctune.backends import get_backend
from mctune.core.problem import Problem
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.kernels import dispatch
from mctune.runtime.kernels.kept import CHOICE, LOGITS
from mctune.runtime.kernels.table import Entry, Table
from mctune.verify.inputs import make_inputs
from mctune.verify.judge import poisoned_memory

BASE = Problem(T=75, B=2, H=2, Dk=12, Dv=20, segment_length=16)
STATES = ("operand", "means")
CASES = {
    "grm": (BASE, {}, (*STATES, *LOGITS)),
    "grm, 16 bits": (BASE.replace(dtype="float16"), {}, (*STATES, *LOGITS)),
    "packed": (BASE.replace(B=1, segmentation="packed"), {}, (*STATES, *LOGITS)),
    "logarithmic": (BASE.replace(segmentation="logarithmic", segment_length=None), {}, ()),
    "fused": (BASE, {"gates": "fused"}, STATES),
    "ssc": (BASE.replace(aggregation="ssc", top_k=2), {"formulation": "grouped"}, (*STATES, *CHOICE)),
    "dense ssc": (BASE.replace(aggregation="ssc", top_k=2), {"formulation": "per_segment"}, (*STATES, *LOGITS)),
    "residual": (BASE.replace(aggregation="residual"), {}, ("past",)),
    "carried": (
        BASE.replace(aggregation="mean", state_init="checkpoint", dtype="float16"),
        {},
        ("operand", "past"),
    ),
    "swla": (BASE.replace(recurrence="swla", state_init="checkpoint"), {}, ("states", "means", *LOGITS)),
    "swla ssc": (
        BASE.replace(recurrence="swla", aggregation="ssc", top_k=2),
        {"formulation": "grouped"},
        (*STATES, *CHOICE),
    ),
    "swla mean": (BASE.replace(recurrence="swla", aggregation="mean"), {}, ("past",)),
}
"""A problem, what its configurations have in common, and what is kept."""


def table(problem: Problem, fixed: dict[str, Any], folder: Path) -> Table:
    """A forward and a backward kernel, the first defaults that can have what is ``fixed``."""
    backend, entries = get_backend("triton"), []
    for one in (problem, problem.replace(pass_="backward")):
        space = backend.space(one)
        names = {param.name for param in space.params}
        changes = {name: value for name, value in fixed.items() if name in names}
        config = space.first_valid(lambda c, s=space, p=one, f=changes: s.valid(c.replace(**f), p, TARGET))
        assert config is not None
        built = backend.build(one, config.replace(**changes), TARGET, folder)
        record = {"problem": one.to_dict(), "config": config.replace(**changes).to_dict(), "parts": dict(built.parts)}
        entries.append(Entry(one.to_dict(), "triton", built.library, record))
    return Table(tuple(entries))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_oracles_the_second_time_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, fixed, kept = CASES[name]
    monkeypatch.setattr(dispatch, "TABLE", table(problem, fixed, tmp_path))
    inputs = make_inputs(problem, 0)
    arguments = inputs.arguments(problem)
    leaves = {n: x.requires_grad_() for n, x in arguments.items() if isinstance(x, torch.Tensor) and n != "cu_seqlens"}
    with poisoned_memory():
        y = memory_caching(**arguments, backend="triton")
        # After q to W_down and cu_seqlens, what is kept.
        saved = y.grad_fn.saved_tensors[12:]  # type: ignore[union-attr]
        before = [x.clone() for x in saved]
        found = [torch.autograd.grad(y, list(leaves.values()), inputs.dy, retain_graph=True) for _ in range(2)]
    assert len(saved) == len(kept)
    assert all(torch.equal(x, was) or bool(x.isnan().any()) for x, was in zip(saved, before, strict=True))
    exact = {n: x.detach().double().requires_grad_() for n, x in leaves.items()}
    wanted = torch.autograd.grad(
        reference.memory_caching(**{**arguments, **exact}), list(exact.values()), inputs.dy.double(),
        materialize_grads=True,
    )  # fmt: skip
    largest = max(float(x.square().mean().sqrt()) for x in wanted)
    bound = 5e-3 if problem.dtype == "float16" else 1e-4
    for leaf, first, second, x in zip(leaves, *found, wanted, strict=True):
        assert torch.equal(first, second), leaf
        assert float((first - x).square().mean().sqrt()) <= bound * max(float(x.square().mean().sqrt()), largest / 1e3)


@pytest.mark.parametrize("name", ("grm", "ssc", "swla mean"))
def test_a_compiled_graph_keeps_what_every_kernel_agrees_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of no known number of segments are not among it."""
    problem, fixed, kept = CASES[name]
    monkeypatch.setattr(dispatch, "TABLE", table(problem, fixed, tmp_path))
    inputs = make_inputs(problem, 0)
    arguments = inputs.arguments(problem)
    leaves = {n: x.requires_grad_() for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    seen: list[tuple[str, ...]] = []
    forward = dispatch.launcher(dispatch.TABLE.entries[0])

    def launch(*args: Any, keep: tuple[str, ...], **options: Any) -> Any:
        seen.append(tuple(keep))
        return forward(*args, keep=keep, **options)

    launch.dtype = None  # type: ignore[attr-defined]
    plain = dispatch.kernel_for
    monkeypatch.setattr(
        "mctune.runtime.ops.run.kernel_for", lambda c, p, r: launch if p == "forward" else plain(c, p, r)
    )
    torch._dynamo.reset()
    compiled = torch.compile(memory_caching, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(**arguments, backend="triton"), list(leaves.values()), inputs.dy,
                                materialize_grads=True)  # fmt: skip
    wanted = torch.autograd.grad(memory_caching(**arguments, backend="triton"), list(leaves.values()), inputs.dy,
                                 materialize_grads=True)  # fmt: skip
    assert seen == [tuple(n for n in kept if "logits" not in kept or n not in LOGITS), kept]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
