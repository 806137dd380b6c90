"""The eager path against the oracle: outputs and gradients, for every problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import arguments

from mctune import reference
from mctune.runtime.api.functional import memory_caching

RECURRENCES = ("linear", "swla", "dla", "titans")
AGGREGATIONS = ("residual", "grm", "soup", "ssc", "mean")


def run(function: Any, tensors: dict[str, torch.Tensor], grad: bool, **options: Any) -> Any:
    leaves = {name: x.detach().requires_grad_(grad) for name, x in tensors.items()}
    y = function(**leaves, **options)
    if not grad:
        return y, {}
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y.double() * weights).sum().backward()
    return y, {name: x.grad for name, x in leaves.items()}


def compare(tensors: dict[str, torch.Tensor], *, bound: float = 2e-5, grad_bound: float = 5e-5, **options: Any) -> None:
    grad = grad_bound > 0
    y, grads = run(lambda **x: memory_caching(**x, backend="eager"), tensors, grad, **options)
    expected, expected_grads = run(reference.memory_caching, tensors, grad, **options)
    assert y.dtype == tensors["q"].dtype
    assert reference.error_ratio(y, expected) <= bound
    for name, x in expected_grads.items():
        x = torch.zeros_like(tensors[name]) if x is None else x
        found = torch.zeros_like(tensors[name]) if grads[name] is None else grads[name]
        if float(x.abs().max()) < 1e-9:
            assert float(found.abs().max()) < 1e-5, name
        else:
            assert reference.error_ratio(found, x) <= grad_bound, name


@pytest.mark.parametrize("segmentation", ("constant", "logarithmic", "packed"))
@pytest.mark.parametrize("state_init", ("independent", "checkpoint"))
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_every_problem_with_gradients(recurrence: str, aggregation: str, state_init: str, segmentation: str) -> None:
    packed = segmentation == "packed"
    tensors = arguments(recurrence, B=1 if packed else 2, T=15, H=1 if packed else 2)
    compare(
        tensors,
        recurrence=recurrence,
        aggregation=aggregation,
        state_init=state_init,
        segmentation=segmentation,
        segment_length=4,
        inner_chunk=3,
        cu_seqlens=torch.tensor([0, 0, 5, 6, 6, 15, 15], dtype=torch.int32) if packed else None,
    )


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize(
    "shape",
    (
        {"B": 1, "T": 1, "H": 1},
        {"B": 2, "T": 3, "H": 1, "segment_length": 5},
        {"B": 1, "T": 13, "H": 3, "Dk": 3, "Dv": 5, "segment_length": 5},
        {"B": 1, "T": 9, "H": 1, "segment_length": 1, "inner_chunk": 1},
        {"B": 1, "T": 12, "H": 1, "segment_length": 6, "inner_chunk": 100},
    ),
    ids=str,
)
@pytest.mark.parametrize("aggregation", ("grm", "soup", "ssc"))
def test_odd_sizes(recurrence: str, shape: dict[str, int], aggregation: str) -> None:
    options = {"segment_length": 4, "inner_chunk": 4} | {name: n for name, n in shape.items() if "_" in name}
    tensors = arguments(recurrence, **{name: n for name, n in shape.items() if "_" not in name})
    residual = tensors["q"].shape[3] == tensors["v"].shape[3]
    compare(tensors, recurrence=recurrence, aggregation=aggregation, memory_residual=residual, **options)


@pytest.mark.parametrize("recurrence", ("linear", "swla"))
@pytest.mark.parametrize("segmentation", ("constant", "logarithmic", "packed"))
@pytest.mark.parametrize("aggregation", ("residual", "grm", "mean"))
def test_several_chunks_and_blocks(recurrence: str, segmentation: str, aggregation: str) -> None:
    """Segments longer than a chunk and rows longer than a block of the read."""
    tensors = arguments(recurrence, T=331, H=1)
    compare(
        tensors,
        grad_bound=0,
        recurrence=recurrence,
        aggregation=aggregation,
        state_init="checkpoint",
        segmentation=segmentation,
        segment_length=100,
        cu_seqlens=torch.tensor([0, 7, 331], dtype=torch.int32) if segmentation == "packed" else None,
    )


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("packed", (False, True))
def test_ssc_reads_sparsely(recurrence: str, packed: bool) -> None:
    """More cached states for each chosen one than the dense form takes."""
    tensors = arguments(recurrence, B=1 if packed else 2, T=29, H=2)
    options: dict[str, Any] = {"segment_length": 3, "top_k": 1, "aggregation": "ssc"}
    if packed:
        options |= {"segmentation": "packed", "cu_seqlens": torch.tensor([0, 2, 22, 29], dtype=torch.int32)}
    compare(tensors, recurrence=recurrence, **options)


@pytest.mark.parametrize("lengths", ([1536], [256] * 6), ids=str)
def test_ssc_reads_sparsely_where_blocks_have_no_past(lengths: list[int]) -> None:
    """The first block of the read lies in one segment; in the second case each is a sequence of one segment."""
    tensors = arguments("linear", T=sum(lengths), H=1)
    compare(
        tensors,
        grad_bound=0,
        aggregation="ssc",
        top_k=1,
        segmentation="packed",
        segment_length=256,
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
    )


@pytest.mark.parametrize("top_k", (1, 2, 9))
@pytest.mark.parametrize("segments", (4, 12, 40))
def test_ssc_ties_go_to_the_earlier_segment(top_k: int, segments: int) -> None:
    """Equal keys everywhere, so that every cached segment has the same logit, and values that tell segments apart."""
    T = 2 * segments
    q = k = torch.ones(1, T, 1, 2)
    v = torch.arange(T, dtype=torch.float32).view(1, T, 1, 1)
    compare({"q": q, "k": k, "v": v}, grad_bound=0, aggregation="ssc", segment_length=2, top_k=top_k)


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_absent_gates_have_their_defaults(recurrence: str) -> None:
    tensors = {
        name: x for name, x in arguments(recurrence).items() if name not in ("g", "beta", "lam", "eta", "mu", "u")
    }
    tensors["v"] = 0.1 * tensors["v"]
    compare(tensors, recurrence=recurrence, segment_length=4, inner_chunk=2, scale=0.7)


@pytest.mark.parametrize("recurrence", ("swla", "titans"))
@pytest.mark.parametrize("g", (-1e30, float("-inf")))
def test_decays_that_forget_everything(recurrence: str, g: float) -> None:
    """A very negative g forgets what came before and leaves later, mild decays exact."""
    tensors = arguments(recurrence, T=13)
    tensors["g"][:, 2::3] = g
    compare(tensors, recurrence=recurrence, segment_length=8, inner_chunk=8, state_init="checkpoint")


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_rounds_only_inputs_and_output(recurrence: str, dtype: torch.dtype) -> None:
    tensors = arguments(recurrence, dtype=dtype)
    compare(tensors, bound=torch.finfo(dtype).eps, grad_bound=0, recurrence=recurrence, segment_length=4)


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_float64_is_computed_in_float64(recurrence: str) -> None:
    tensors = {name: x.double() for name, x in arguments(recurrence).items()}
    compare(tensors, bound=1e-13, grad_bound=1e-12, recurrence=recurrence, segment_length=4)


def test_inputs_need_not_be_contiguous() -> None:
    tensors = arguments("swla", B=2)
    strided = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x.mT.contiguous().mT
        for name, x in tensors.items()
    }
    assert not strided["q"].is_contiguous()
    expected = memory_caching(**tensors, recurrence="swla", segment_length=4, backend="eager")
    torch.testing.assert_close(
        memory_caching(**strided, recurrence="swla", segment_length=4, backend="eager"), expected
    )


def test_autocast_leaves_states_in_float32() -> None:
    tensors = arguments("linear")
    expected = memory_caching(**tensors, segment_length=4, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(memory_caching(**tensors, segment_length=4, backend="eager"), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles() -> None:
    tensors = arguments("swla")
    torch._dynamo.reset()

    def function(**tensors: torch.Tensor) -> torch.Tensor:
        return memory_caching(**tensors, recurrence="swla", segment_length=4, backend="eager")

    torch.testing.assert_close(torch.compile(function, backend="aot_eager")(**tensors), function(**tensors))


def test_compiled_gradients_are_those_of_autograd() -> None:
    """Four blocks of tokens, each of which reads whole segments: where Inductor once got the gradient of q wrong."""
    compiled = torch.compile(memory_caching)
    found = []
    for function in (memory_caching, compiled):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(1, 1024, 1, 8, generator=generator, requires_grad=True) for _ in range(4)]
        function(*leaves, segment_length=256, backend="eager").square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for eager, other in zip(*found, strict=True):
        assert eager is not None and other is not None
        assert float((eager - other).norm() / eager.norm()) < 1e-5
