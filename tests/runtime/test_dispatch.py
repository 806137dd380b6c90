"""Which implementation serves a call, and what it is given."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import arguments, with_states
from tables import PROBLEM, entry
from torch import Tensor

from mctune.runtime.api.functional import memory_caching
from mctune.runtime.errors import BackendError, KernelError
from mctune.runtime.kernels import dispatch
from mctune.runtime.kernels.results import Forward
from mctune.runtime.kernels.table import Entry, Table
from mctune.verify.judge import poisoned_memory


@dataclass
class Launcher:
    """What the runtime calls, and the dtype that it wants to be given."""

    run: Callable[..., Any]
    dtype: torch.dtype | None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.run(*arguments, **options)


@dataclass
class Kernels:
    """A table whose launches are recorded; y is ones, the gradient of each of q, k, v, u its place among them."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def launch(self, entry: Entry) -> Any:
        run = self.backward if entry.problem["pass"] == "backward" else self.forward
        return Launcher(run, torch.float32 if entry.backend == "tvm" else None)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, **rest: Any) -> Forward:
        self.calls.append({"pass": "forward", "q": q, "k": k, "v": v, "u": u, **rest})
        rows = q.shape[0] * q.shape[2] * rest["segments"].count
        kept = {"states": torch.full((rows, 16, 16), 2.0), "means": torch.full((rows, 16), 3.0)}
        return Forward(torch.ones_like(v), {name: kept[name] for name in rest["keep"]})

    def backward(self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, u: Tensor, **rest: Any) -> Any:
        self.calls.append({"pass": "backward", "dy": dy, "q": q, "k": k, "v": v, "u": u, **rest})
        parts = {
            name: place * torch.ones_like(x)
            for place, (name, x) in enumerate(zip("qkvu", (q, k, v, u), strict=True), 1)
        }
        return Gradients(**parts, g=None, beta=None, lam=None)

    @property
    def passes(self) -> list[str]:
        return [call["pass"] for call in self.calls]


Gradients = namedtuple("Gradients", ("q", "k", "v", "u", "g", "beta", "lam"))


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """A table of one forward kernel."""
    kernels = Kernels()
    monkeypatch.setattr(dispatch, "TABLE", Table((entry(),)))
    monkeypatch.setattr(dispatch, "launcher", kernels.launch)
    monkeypatch.setattr(dispatch, "_warned", set())
    return kernels


@pytest.fixture
def trained(tuned: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """And one backward kernel."""
    record = {"config": {"saved": "states"}}
    backward = Entry(PROBLEM | {"pass": "backward"}, "tvm", Path("b.so"), record)
    monkeypatch.setattr(dispatch, "TABLE", Table((entry(), backward)))
    return tuned


def test_fitting_call_runs_the_kernel(tuned: Kernels) -> None:
    tensors = arguments("linear", dtype=torch.bfloat16)
    y = memory_caching(**tensors, segment_length=4, scale=0.5)
    assert y.dtype == torch.bfloat16 and bool((y == 1).all())
    (call,) = tuned.calls
    assert all(call[name].dtype == torch.float32 and call[name].is_contiguous() for name in ("q", "k", "v", "u"))
    assert torch.equal(call["u"], tensors["u"].float())
    assert (call["scale"], call["top_k"], call["segments"].count, call["g"]) == (0.5, 2, 3, None)


def test_kernels_for_a_gpu_read_the_dtype_of_the_call(tuned: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = (entry("wide", "triton"), entry("narrow", "triton", dtype="float16"))
    monkeypatch.setattr(dispatch, "TABLE", Table(kernels))
    tensors = arguments("linear", dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="none of the 2 tuned kernels fits"):
        memory_caching(**tensors, segment_length=4, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.find.cache_clear()
    y = memory_caching(**tensors, segment_length=4, backend="triton")
    dispatch.find.cache_clear()
    assert y.dtype == torch.bfloat16
    (call,) = tuned.calls
    assert all(call[name].dtype == torch.bfloat16 for name in ("q", "k", "v", "u"))


def test_kernels_are_given_contiguous_arrays(trained: Kernels) -> None:
    tensors = {name: x.mT.contiguous().mT.requires_grad_() for name, x in arguments("linear", B=2).items()}
    y = memory_caching(**tensors, segment_length=4)
    y.backward(torch.ones(()).expand(y.shape))
    for call in trained.calls:
        assert all(x.is_contiguous() and not x.requires_grad for x in call.values() if isinstance(x, Tensor))


def test_connector_defaults_to_the_query(tuned: Kernels) -> None:
    tensors = arguments("linear")
    memory_caching(tensors["q"], tensors["k"], tensors["v"], segment_length=4, backend="tvm")
    assert torch.equal(tuned.calls[0]["u"], tensors["q"])


@pytest.mark.parametrize("connector", (True, False))
def test_training_runs_both_kernels(trained: Kernels, connector: bool) -> None:
    tensors = arguments("linear", B=2, dtype=torch.bfloat16)
    if not connector:
        del tensors["u"]
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    y = memory_caching(**leaves, segment_length=4, backend="tvm")
    y.backward(torch.ones(1, dtype=y.dtype).expand(y.shape))
    assert trained.passes == ["forward", "backward"]
    call = trained.calls[1]
    assert call["dy"].dtype == torch.float32 and call["dy"].is_contiguous() and bool((call["dy"] == 1).all())
    states, means = call["kept"]["states"], call["kept"]["means"]
    assert states.shape == (12, 16, 16) and bool((states == 2).all())
    assert means.shape == (12, 16) and bool((means == 3).all())
    expected = {"q": 1, "k": 2, "v": 3, "u": 4} if connector else {"q": 5, "k": 2, "v": 3}
    for name, x in leaves.items():
        assert x.grad is not None and x.grad.dtype == torch.bfloat16 and bool((x.grad == expected[name]).all()), name


def test_states_of_a_packed_row_are_saved_and_trimmed(trained: Kernels) -> None:
    """Three sequences of 11 tokens can have 5 segments of 4, these have 4; zeros stand for the fifth."""
    tensors = arguments("linear")
    tensors["v"].requires_grad_()
    bounds = torch.tensor([0, 4, 8, 11], dtype=torch.int32)
    packed: dict[str, Any] = {"segmentation": "packed", "cu_seqlens": bounds, "segment_length": 4}
    with poisoned_memory():
        y = memory_caching(**tensors, **packed)
    saved = y.grad_fn.saved_tensors[-2:]  # type: ignore[union-attr]
    assert [list(x.shape) for x in saved] == [[10, 16, 16], [10, 16]]
    assert all(bool((x[6:] == 0).all()) and bool((x[:6] > 0).all()) for x in saved)
    y.sum().backward()
    kept = trained.calls[1]["kept"]
    assert kept["states"].shape == (6, 16, 16) and kept["means"].shape == (6, 16)


@pytest.mark.parametrize("saved", ("states", "nothing"))
@pytest.mark.parametrize("segmentation", ("constant", "logarithmic"))
def test_states_are_saved_where_the_backward_wants_them(
    trained: Kernels, saved: str, segmentation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, backward = dispatch.TABLE.entries
    backward = replace(backward, record={"config": {"saved": saved}})
    monkeypatch.setattr(dispatch, "TABLE", Table((forward, backward)))
    tensors = arguments("linear")
    tensors["k"].requires_grad_()
    y = memory_caching(**tensors, segmentation=segmentation, segment_length=4)
    y.sum().backward()
    kept = ["states", "means"] if saved == "states" and segmentation == "constant" else []
    assert list(trained.calls[1]["kept"]) == kept


def test_no_gradient_needs_no_backward_kernel(tuned: Kernels) -> None:
    tensors = arguments("linear")
    tensors["v"].requires_grad_()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        memory_caching(**tensors, segment_length=4)
    assert tuned.passes == ["forward"]


def test_missing_backward_kernel_runs_eagerly_and_names_the_command(tuned: Kernels) -> None:
    tensors = arguments("linear")
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    with pytest.warns(UserWarning, match=r"`mctune search --gpu cpu --problem '\{.*\"pass\":\"backward\"") as caught:
        for _ in range(2):
            memory_caching(**leaves, segment_length=4).sum().backward()
    assert len(caught) == 1 and caught[0].filename == __file__ and not tuned.calls
    with pytest.raises(BackendError, match=r'cannot serve this call: none of the 1 .*"pass":"backward"'):
        memory_caching(**leaves, segment_length=4, backend="tvm")


def test_gradient_of_a_batch_needs_a_backward_kernel(tuned: Kernels) -> None:
    """What vmap wraps does not say that a gradient is wanted of it."""
    tensors = arguments("linear")

    def loss(q: Tensor, backend: str) -> Tensor:
        return memory_caching(**(tensors | {"q": q}), segment_length=4, backend=backend).sum()

    def gradient(backend: str) -> Tensor:
        batch = torch.stack([tensors["q"]] * 2)
        return torch.func.grad(lambda x: torch.func.vmap(lambda q: loss(q, backend))(x).sum())(batch)

    with pytest.raises(BackendError, match='"pass":"backward"'):
        gradient("tvm")
    with pytest.warns(UserWarning, match='"pass":"backward"'):
        torch.testing.assert_close(gradient("auto"), gradient("eager"))
    assert not tuned.calls
    with torch.no_grad():
        torch.func.vmap(lambda q: loss(q, "tvm"))(torch.stack([tensors["q"]] * 2))
    assert tuned.passes == ["forward"]


def test_float64_runs_eagerly(trained: Kernels) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory_caching(**{name: x.double() for name, x in arguments("linear").items()}, segment_length=4)
    assert not trained.calls


def test_misfit_warns_once_a_kind_with_the_command(tuned: Kernels) -> None:
    tensors = arguments("linear", Dk=5)
    with pytest.warns(UserWarning, match=r"`mctune search --gpu cpu --problem '\{.*\"Dk\":5") as caught:
        for _ in range(2):
            memory_caching(**tensors, segment_length=5)
        memory_caching(**tensors, segment_length=6)
        memory_caching(**tensors, segment_length=5, aggregation="ssc")
    assert len(caught) == 2
    assert caught[0].filename == __file__
    assert not tuned.calls


def test_untuned_use_warns_once(tuned: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TABLE", Table())
    with pytest.warns(UserWarning, match="no tuned kernels here.*`mctune search --gpu cpu`") as caught:
        for length in (4, 5):
            memory_caching(**arguments("linear"), segment_length=length)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("backend", "options", "reason"),
    (
        ("tvm", {"aggregation": "mean"}, "none of the 1 tuned kernels fits"),
        ("triton", {}, "none of the 1 tuned kernels fits"),
        ("tvm", {"recurrence": "dla"}, "none of the 1 tuned kernels fits .*expansion.:2,.inner_chunk.:16"),
    ),
)
def test_forced_backend_that_cannot_serve(tuned: Kernels, backend: str, options: dict[str, Any], reason: str) -> None:
    for function in (memory_caching, with_states):
        with pytest.raises(BackendError, match=f'backend="{backend}" cannot serve this call: {reason}'):
            function(**arguments(options.get("recurrence", "linear")), **options, segment_length=4, backend=backend)


def test_unusable_kernel(tuned: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(entry: Entry) -> None:
        raise KernelError("the pair is wrong")

    monkeypatch.setattr(dispatch, "launcher", refuse)
    tensors = arguments("linear")
    with pytest.warns(UserWarning, match="the eager path runs: the pair is wrong"):
        y = memory_caching(**tensors, segment_length=4)
    torch.testing.assert_close(y, memory_caching(**tensors, segment_length=4, backend="eager"))
    with pytest.raises(BackendError, match="the pair is wrong"):
        memory_caching(**tensors, segment_length=4, backend="tvm")


@pytest.mark.parametrize("failing", ("forward", "backward"))
def test_kernel_that_cannot_take_the_call(trained: Kernels, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loads and then finds the arrays too large: the other pass must not mind."""

    def refuse(*_: Any, **__: Any) -> None:
        raise KernelError("the arrays are too large")

    monkeypatch.setattr(trained, failing, refuse)
    tensors = arguments("linear", B=2)
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    with pytest.warns(UserWarning, match="the eager path runs: the arrays are too large") as caught:
        for _ in range(2):
            y = memory_caching(**leaves, segment_length=4)
            y.backward(torch.ones_like(y))
    assert len(caught) == 1
    expected = memory_caching(**tensors, segment_length=4, backend="eager")
    if failing == "forward":
        torch.testing.assert_close(y, expected)
        real = reference_states(tensors)
        torch.testing.assert_close(trained.calls[0]["kept"]["states"].view_as(real[0]), real[0])
        torch.testing.assert_close(trained.calls[0]["kept"]["means"].view_as(real[1]), real[1])
    else:
        copies = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        for _ in range(2):
            y = memory_caching(**copies, segment_length=4, backend="eager")
            y.backward(torch.ones_like(y))
        for name, x in leaves.items():
            torch.testing.assert_close(x.grad, copies[name].grad)
    with pytest.raises(BackendError, match="the arrays are too large"):
        memory_caching(**leaves, segment_length=4, backend="tvm").sum().backward()


def reference_states(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """[B, H, N, 16, 16] and [B, H, N, 16] of linear segments of 4 tokens, token by token."""
    k, v = tensors["k"], tensors["v"]
    (B, T, H, Dk), Dv = k.shape, v.shape[3]
    states, means = torch.zeros(B, H, -(-T // 4), 16, 16), torch.zeros(B, H, -(-T // 4), 16)
    for n in range(states.shape[2]):
        part = slice(4 * n, 4 * n + 4)
        states[:, :, n, :Dk, :Dv] = torch.einsum("bthi,bthj->bhij", k[:, part], v[:, part])
        means[:, :, n, :Dk] = k[:, part].mean(1)
    return states, means


def test_states_for_a_cache(tuned: Kernels) -> None:
    tensors = arguments("linear", B=2)
    tensors["q"].requires_grad_()
    y, states, means = with_states(**tensors, segment_length=4)
    assert not y.requires_grad and tuned.passes == ["forward"] and states is not None and means is not None
    assert states.shape == (2, 2, 3, 4, 4) and bool((states == 2).all())
    assert means.shape == (2, 2, 3, 4) and bool((means == 3).all())
    bounds = torch.tensor([0, 4, 8, 11], dtype=torch.int32)
    packed: dict[str, Any] = {"segmentation": "packed", "cu_seqlens": bounds, "segment_length": 4}
    _, states, means = with_states(**arguments("linear"), **packed)
    assert states is not None and means is not None
    assert states.shape == (1, 2, 3, 4, 4) and means.shape == (1, 2, 3, 4)
    assert with_states(**tensors, segmentation="logarithmic")[1:] == (None, None)
    y, *rest = with_states(**tensors, segment_length=4, backend="eager")
    assert not y.requires_grad and rest == [None, None]
    torch.testing.assert_close(y, memory_caching(**tensors, segment_length=4, backend="eager"))


def test_operators_stand_in_the_namespace_of_their_copy() -> None:
    """An emitted package is another copy of the runtime with another table."""
    assert dispatch.NAMESPACE == "mctune"
    assert {"memory_caching_forward", "memory_caching_backward"} <= set(dir(torch.ops.mctune))
