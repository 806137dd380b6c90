"""Fences around every array of a kernel, and inputs that it must leave alone."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mctune.runtime.kernels.results import Forward
from mctune.runtime.memory import LayerMemory
from mctune.runtime.segments import make_segments
from mctune.verify.fences import FENCE, FencedAllocations, Fences, map_tensors, named_tensors
from mctune.verify.guard import Fault, Guarded
from mctune.verify.passes import empty_memory
from tests.verify.problems import SMALL


def poke(x: torch.Tensor, offset: int) -> None:
    """Write a byte that many bytes from the begin of an array."""
    ctypes.c_uint8.from_address(x.data_ptr() + offset).value = 7


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_written_beside_an_array_is_seen(seed: int) -> None:
    seed += random.SystemRandom().randrange(1 << 30)
    rng = random.Random(seed)
    for _ in range(40):
        dtype = rng.choice((torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool))
        x = torch.zeros([rng.randint(0, 5) for _ in range(rng.randint(0, 4))], dtype=dtype)
        fences = Fences()
        copy = fences.around("x", x)
        assert torch.equal(copy, x) and copy.dtype == dtype and copy.stride() == x.stride()
        assert copy.data_ptr() % 64 == 0 or not x.numel()
        copy.fill_(1)
        assert fences.broken() is None, seed
        size = copy.numel() * copy.itemsize
        offset = rng.choice((-rng.randint(1, FENCE), size + rng.randrange(FENCE)))
        poke(copy if copy.numel() else fences._rooms[0][1][FENCE:], offset)
        assert fences.broken() == f"it wrote {'before' if offset < 0 else 'after'} the memory of x", (seed, offset)


def test_what_stands_beside_an_array_is_nan_to_those_who_read_it() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = Fences().around("x", torch.ones(3, dtype=dtype))
        assert x.as_strided((1,), (1,), x.storage_offset() - 1).isnan()
        assert x.as_strided((1,), (1,), x.storage_offset() + 3).isnan()


def test_views_keep_their_strides() -> None:
    x = torch.arange(24.0).view(4, 6).T[1:, :2]
    assert torch.equal(Fences().around("x", x), x)
    begin, end, _ = torch.arange(6, dtype=torch.int32).view(3, 2).unbind(0)
    fences = Fences()
    copy = fences.around("begin", begin)
    poke(copy, copy.numel() * 4)
    assert fences.broken() and torch.equal(end, torch.tensor([2, 3], dtype=torch.int32))


def test_what_torch_allocates_stands_between_fences() -> None:
    fences = Fences()
    given = torch.ones(2, 3)
    with FencedAllocations(fences):
        made = {
            "new": given.new_empty(4), "empty": torch.empty_like(given), "cloned": given.T.contiguous(),
            "padded": torch.nn.functional.pad(given, (0, 2)), "to": given.to(torch.float64), "zeros": torch.zeros(2),
        }  # fmt: skip
        assert given.view(-1).data_ptr() == given.data_ptr()
        made["padded"] += 1
    assert all(fences.holds(x) for x in made.values()) and not fences.holds(given)
    assert fences.broken() is None
    poke(made["padded"], -1)
    assert fences.broken() == "it wrote before the memory of an array made by constant_pad_nd [2, 5]"


def forward(do: Callable[[dict[str, Any]], None]) -> Any:
    """A kernel that does something to its arguments."""

    class Kernel:
        device = "cpu"

        def __call__(self, q: Any, k: Any, v: Any, u: Any, **rest: Any) -> Forward:
            y = torch.zeros_like(v)
            do({"q": q, "k": k, "v": v, "u": u, "y": y, **rest})
            return Forward(y, {})

    return Guarded(Kernel())


def call(kernel: Any) -> Any:
    q, k, v, u = torch.randn(4, 1, 8, 2, 4).unbind()
    return kernel(q, k, v, u, g=None, scale=1.0, segments=make_segments(8, segment_length=4), keep=())


def test_a_kernel_that_keeps_to_its_arrays_passes() -> None:
    assert call(forward(lambda x: x["y"].fill_(1))).y.sum() == 64
    assert forward(lambda x: None).device == "cpu"


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda x: x["q"][0, 3].add_(1), "it wrote to its input q"),
        (lambda x: x["u"].mul_(float("nan")), "it wrote to its input u"),
        (lambda x: x["segments"].first.add_(1), "it wrote to its input segments.first"),
        (lambda x: poke(x["segments"].end, 8), "it wrote after the memory of segments.end"),
        (lambda x: poke(x["v"], -1), "it wrote before the memory of v"),
        (lambda x: poke(x["y"], 8 * 2 * 4 * 4), r"it wrote after the memory of an array made by zeros_like \[1, 8"),
    ],
)
def test_one_that_does_not_is_refused(do: Callable[[dict[str, Any]], None], message: str) -> None:
    shared = make_segments(8, segment_length=4)
    before = shared.first.clone()
    with pytest.raises(Fault, match=message):
        call(forward(do))
    assert torch.equal(shared.first, before)


def test_a_memory_is_written_in_place_and_its_counts_are_not() -> None:
    memory = empty_memory(SMALL, 1, 3)
    q, k, v, u = torch.randn(4, 1, 1, 2, 4).unbind()

    def step(*_: Any, memory: LayerMemory, name: str) -> torch.Tensor:
        x = getattr(memory, name)
        (x[0] if isinstance(x, tuple) else x).add_(1)
        return torch.zeros(1)

    Guarded(step)(q, k, v, u, memory=memory, name="online")
    assert float(memory.online[0].min()) == 1.0
    with pytest.raises(Fault, match=r"memory\.cached"):
        Guarded(step)(q, k, v, u, memory=memory, name="cached")
    assert int(memory.cached[0]) == 0


def test_tensors_are_found_wherever_they_are() -> None:
    segments = make_segments(8, segment_length=4)
    value = {
        "a": (torch.ones(1), [torch.ones(2)]),
        "s": segments,
        "n": None,
        "f": Forward(torch.ones(3), {"x": segments.end}),
    }
    assert set(named_tensors(value)) == {"a.0", "a.1.0", "s.begin", "s.end", "s.first", "f.y", "f.kept.x"}
    twice = map_tensors(lambda _, x: 2 * x, value)
    assert torch.equal(twice["s"].end, 2 * segments.end) and twice["s"].spans == segments.spans
    assert replace(segments, longest=1).longest == 1
