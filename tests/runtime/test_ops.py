"""The operators: registrations, values and gradients against the oracle, layouts, memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import with_states
from tables import DLA, LINEAR, PACKED, SWLA, TITANS, TUNED, checked, draw, problem_id
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mctune import reference
from mctune.core.problem import Problem
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.errors import BackendError
from mctune.runtime.kernels.dispatch import Route
from mctune.runtime.kernels.table import Table
from mctune.runtime.ops import operators as ops
from mctune.verify.judge import poisoned_memory

SAVED = (LINEAR, SWLA, PACKED)
"""Problems whose states can be saved."""
BOUND, GRAD_BOUND = 2e-5, 1e-4
FLOAT64 = (LINEAR.replace(T=11, B=2, H=1, Dk=3, Dv=4, segment_length=4), SWLA.replace(T=7, B=1, H=1, Dk=3, Dv=2,
           segment_length=3), DLA.replace(T=5, H=1, Dk=3, Dv=3), TITANS.replace(T=5, B=1, H=1, Dk=3, Dv=3))  # fmt: skip


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Falling back to the eager path would warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the eager path runs")
        yield


def leaves_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}


def oracle(tensors: dict[str, Tensor], options: dict[str, Any], dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    y = reference.memory_caching(**leaves, **options)
    found = torch.autograd.grad(y, list(leaves.values()), dy.double(), materialize_grads=True)
    return y.detach(), dict(zip(leaves, found, strict=True))


def assert_close(found: Tensor | None, expected: Tensor, bound: float, name: str = "y") -> None:
    assert found is not None, name
    if float(expected.abs().max()) < 1e-9:
        assert float(found.abs().max()) < 1e-5, name
    else:
        assert reference.error_ratio(found, expected) <= bound, name


def cases() -> list[Any]:
    """Every problem on every backend that serves it."""
    return [
        pytest.param(problem, backend, id=f"{problem_id(problem)}-{backend}")
        for problem in TUNED
        for backend in ("tvm", "eager")
    ]


@pytest.mark.parametrize(("problem", "backend"), cases())
def test_registrations_of_the_forward(problem: Problem, backend: str, tuned_table: Table) -> None:
    tensors, options = draw(problem)
    for connector in (True, False):
        if not connector:
            del tensors["u"]
        inputs = ops.flatten(checked(leaves_of(tensors), options))
        for keeps in ("", "states means") if problem in SAVED else ("",):
            torch.library.opcheck(ops.forward_op, (*inputs, backend, keeps), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("problem", "backend"), cases())
@pytest.mark.parametrize("connector", (True, False), ids=("u", "no-u"))
def test_registrations_of_the_backward(problem: Problem, backend: str, connector: bool, tuned_table: Table) -> None:
    tensors, options = draw(problem)
    if not connector:
        del tensors["u"]
    inputs = ops.flatten(checked(tensors, options))
    keeps = "states means" if problem in SAVED else ""
    y, kept = ops.forward_op(*inputs, backend, keeps)
    arguments = (torch.randn(y.shape), *inputs[:12], kept, *inputs[12:], backend, keeps)
    torch.library.opcheck(
        ops.backward_op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


@pytest.mark.parametrize("problem", TUNED, ids=problem_id)
def test_kernels_train_like_the_oracle(problem: Problem, tuned_table: Table) -> None:
    """Fresh, odd shapes that share only widths with what was tuned; uninitialised memory is NaN."""
    for seed, (B, T, H, C) in enumerate(((1, 1, 1, 16), (2, 37, 3, 5), (1, 90, 2, 16))):
        shape = problem.replace(B=min(B, problem.B), T=T, H=H, segment_length=problem.segment_length and C)
        tensors, options = draw(shape, seed)
        dy = torch.randn(*tensors["v"].shape)
        expected, gradients = oracle(tensors, options, dy)
        leaves = leaves_of(tensors)
        with poisoned_memory():
            y = memory_caching(**leaves, **options, backend="tvm")
            y.backward(dy)
        assert_close(y, expected, BOUND)
        for name, x in gradients.items():
            assert_close(leaves[name].grad, x, GRAD_BOUND, name)


@pytest.mark.parametrize("problem", (*SAVED, DLA, TITANS), ids=problem_id)
def test_absent_connector_and_gates(problem: Problem, tuned_table: Table) -> None:
    tensors, options = draw(problem)
    kept = {name: tensors[name] for name in ("q", "k", "v", "lam", "eta", "W_up", "W_down") if name in tensors}
    dy = torch.randn(*tensors["v"].shape)
    expected, gradients = oracle(kept, options, dy)
    leaves = leaves_of(kept)
    y = memory_caching(**leaves, **options, backend="tvm")
    y.backward(dy)
    assert_close(y, expected, BOUND)
    for name, x in gradients.items():
        assert_close(leaves[name].grad, x, GRAD_BOUND, name)


@pytest.mark.parametrize("problem", SAVED, ids=problem_id)
def test_saved_states_are_those_of_the_oracle(problem: Problem, tuned_table: Table) -> None:
    """The kernel's, and those that the eager path leaves where a kernel cannot run."""
    tensors, options = draw(problem)
    inputs = ops.flatten(checked(tensors, options))
    kept = ("k", "v", "g", "beta", "lam")
    cache = reference.segment_states(
        **{name: x for name, x in tensors.items() if name in kept},
        **{name: x for name, x in options.items() if name not in ("aggregation", "top_k")},
    )
    (expected,), means = cache.states, cache.descriptors
    for backend in ("tvm", "eager"):
        _, (states, found_means) = ops.forward_op(*inputs, backend, "states means")
        count = expected.shape[1]
        used = problem.B * problem.H * count
        found = states[:used].view(problem.B, problem.H, count, *states.shape[1:]).transpose(1, 2)
        assert_close(found[..., : problem.Dk, : problem.Dv], expected, BOUND)
        found_means = found_means[:used].view(problem.B, problem.H, count, -1).transpose(1, 2)
        assert_close(found_means[..., : problem.Dk], means, BOUND)
        assert states.shape[1:] == (16, 32) and bool((states[:, problem.Dk :] == 0).all())
    y, given, given_means = with_states(**tensors, **options, backend="tvm")
    assert given is not None and given_means is not None
    assert_close(given.transpose(1, 2), expected, BOUND)
    assert_close(given_means.transpose(1, 2), means, BOUND)
    torch.testing.assert_close(y, memory_caching(**tensors, **options, backend="eager"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("problem", FLOAT64, ids=problem_id)
@pytest.mark.parametrize("path", ("plain", "operator"))
def test_gradients_by_finite_differences(problem: Problem, path: str) -> None:
    tensors, options = draw(problem, dtype=torch.float64)
    names, inputs = list(tensors), [x.requires_grad_() for x in tensors.values()]

    def function(*inputs: Tensor) -> Tensor:
        leaves = dict(zip(names, inputs, strict=True))
        if path == "plain":
            return memory_caching(**leaves, **options, backend="eager")
        return ops.forward(checked(leaves, options), Route("eager"))[0]

    assert torch.autograd.gradcheck(function, inputs)
    if path == "plain":
        assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivative_of_an_operator_is_refused(tuned_table: Table) -> None:
    tensors, options = draw(LINEAR)
    tensors["q"].requires_grad_()
    y = memory_caching(**tensors, **options, backend="tvm")
    (dq,) = torch.autograd.grad(y.sum(), tensors["q"], create_graph=True)
    with pytest.raises(BackendError, match='no second derivative by this path; backend="eager" has'):
        dq.sum().backward()


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values otherwise strided, and all of them those of the first row, by stride 0."""
    order = [*range(1, x.dim()), 0]
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)[..., 1::2].copy_(x)
    return {
        "permuted": x.permute(order).contiguous().permute([x.dim() - 1, *range(x.dim() - 1)]),
        "strided": wide,
        "expanded": x[:, :1].expand(x.shape),
    }


@pytest.mark.parametrize("layout", ("permuted", "strided", "expanded"))
@pytest.mark.parametrize("problem", (LINEAR, SWLA, TITANS), ids=problem_id)
@pytest.mark.parametrize("backend", ("tvm", "eager"))
def test_any_layout(layout: str, problem: Problem, backend: str, tuned_table: Table) -> None:
    """The arguments and dy have any layout; results are contiguous and stand by themselves."""
    tensors, options = draw(problem)
    moved = {name: layouts(x)[layout].requires_grad_() for name, x in tensors.items()}
    assert not any(x.is_contiguous() for x in moved.values())
    plain = {name: x.detach().contiguous().requires_grad_() for name, x in moved.items()}
    dy = layouts(torch.randn(*tensors["v"].shape))[layout]
    y = ops.forward(checked(moved, options), Route(backend))[0]
    expected = ops.forward(checked(plain, options), Route(backend))[0]
    assert y.is_contiguous() and torch.equal(y, expected)
    found = torch.autograd.grad(y, list(moved.values()), dy)
    wanted = torch.autograd.grad(expected, list(plain.values()), dy.contiguous())
    for name, one, other in zip(moved, found, wanted, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
        assert one.is_contiguous(), name
    storages = [x.untyped_storage().data_ptr() for x in (y, *found, *moved.values(), dy)]
    assert len(set(storages)) == len(storages)


def test_scalar_loss_gives_a_gradient_of_stride_zero(tuned_table: Table) -> None:
    """What sum().backward() hands over."""
    tensors, options = draw(LINEAR)
    leaves = leaves_of(tensors)
    memory_caching(**leaves, **options, backend="tvm").sum().backward()
    _, gradients = oracle(tensors, options, torch.ones(*tensors["v"].shape))
    for name, x in gradients.items():
        assert_close(leaves[name].grad, x, GRAD_BOUND, name)


@pytest.mark.parametrize(("problem", "backend"), cases())
def test_autocast_leaves_the_operators_in_float32(problem: Problem, backend: str, tuned_table: Table) -> None:
    tensors, options = draw(problem)
    found = []
    for enabled in (False, True):
        leaves = leaves_of(tensors)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = ops.forward(checked(leaves, options), Route(backend))[0]
            y.square().sum().backward()
        found.append([y.detach(), *(x.grad for x in leaves.values())])
    for one, other in zip(*found, strict=True):
        assert one is not None and one.dtype == torch.float32 and torch.equal(one, other)


@pytest.mark.parametrize("problem", TUNED, ids=problem_id)
def test_meta_tensors(problem: Problem) -> None:
    tensors, options = draw(problem)
    leaves = {name: x.to("meta").requires_grad_() for name, x in tensors.items()}
    y = memory_caching(**leaves, **options)
    assert y.is_meta and y.shape == tensors["v"].shape
    y.sum().backward()
    assert all(x.grad is not None and x.grad.is_meta and x.grad.shape == x.shape for x in leaves.values())


@pytest.mark.parametrize("problem", (LINEAR, SWLA, DLA, TITANS), ids=problem_id)
def test_no_more_memory_than_the_eager_path(problem: Problem, tuned_table: Table) -> None:
    tensors, options = draw(problem.replace(B=1, T=2048, H=2, segment_length=128))
    leaves = leaves_of(tensors)

    def step(backend: str) -> None:
        memory_caching(**leaves, **options, backend=backend).sum().backward()
        for x in leaves.values():
            x.grad = None

    assert peak(lambda: step("tvm")) <= peak(lambda: step("eager"))


def peak(run: Callable[[], None]) -> int:
    """Bytes of torch's CPU allocator in use at most, over those in use before."""
    run()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    used = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            most = max(most, used)
    assert most > 0
    return most


@pytest.mark.parametrize("backend", ("tvm", "eager"))
def test_repeated_calls_leave_nothing_behind(backend: str, tuned_table: Table) -> None:
    tensors, options = draw(LINEAR.replace(B=1, T=2048, H=4))
    leaves = leaves_of(tensors)

    def step() -> None:
        ops.forward(checked(leaves, options), Route(backend, ("states", "means")))[0].sum().backward()
        for x in leaves.values():
            x.grad = None

    for _ in range(5):
        step()
    before = resident()
    for _ in range(50):
        step()
    # One call's states are 1 MiB, so are its other arrays.
    assert resident() - before < 16 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
