"""Every bad combination is refused with the offender's name and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import arguments

from mctune.runtime.api.functional import memory_caching
from mctune.runtime.errors import ArgumentError
from mctune.runtime.segments import make_segments

X = torch.zeros(1, 6, 2, 4)
GATE = torch.zeros(1, 6, 2)
BOUNDS = torch.tensor([0, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"recurrence": "delta"}, "recurrence='delta' is not one of linear, swla, dla, titans"),
        ({"aggregation": "sum"}, "aggregation='sum' is not one of residual, grm"),
        ({"segmentation": "fixed"}, "segmentation='fixed' is not one of constant"),
        ({"state_init": "zero"}, "state_init='zero' is not one of independent, checkpoint"),
        ({"backend": "cuda"}, "backend='cuda' is not one of auto, eager, tvm, triton"),
        ({"segment_length": 0}, "segment_length=0: must be an integer of at least 1"),
        ({"aggregation": "ssc", "top_k": 0}, "top_k=0: must be an integer of at least 1"),
        ({"scale": float("nan")}, "scale=nan: must be finite"),
        ({"q": X[0]}, r"q is \[6, 2, 4\]; it must be \[B, T, H, Dk\]"),
        ({"q": X[:, :0]}, r"q is \[1, 0, 2, 4\]; it must be .* no axis of length 0"),
        ({"k": X[..., :3]}, r"k is \[1, 6, 2, 3\]; it must be like q, \[1, 6, 2, 4\]"),
        ({"u": X[:, :5]}, r"u is \[1, 5, 2, 4\]; it must be like q"),
        ({"v": X[:, :5]}, r"v is \[1, 5, 2, 4\]; it must be \[B, T, H, Dv\]"),
        ({"q": X.long()}, "q is torch.int64; it must be one of float32"),
        ({"v": X.bfloat16()}, "v is torch.bfloat16 and q is torch.float32; q, k, v and u share one dtype"),
        ({"v": X.to("meta")}, "v is on meta and q on cpu; move them to one device"),
        ({"g": GATE}, "g with recurrence='linear', which takes no gate; g belongs to 'swla', 'titans'"),
        ({"recurrence": "swla", "eta": GATE}, "eta with recurrence='swla', which takes only g, beta, lam"),
        ({"recurrence": "swla", "g": GATE + 0.5}, "g reaches 0.5; it is the logarithm of a decay, at most 0"),
        ({"recurrence": "swla", "lam": GATE[:, :3]}, r"lam is \[1, 3, 2\]; it must be \[B, T, H\] = \[1, 6, 2\]"),
        ({"recurrence": "swla", "lam": GATE.long()}, "lam is torch.int64; it must be float32"),
        ({"W_up": torch.zeros(2, 4, 8)}, "W_up with recurrence='linear', which has no layers; use 'dla' or 'titans'"),
        ({"segmentation": "packed"}, "segmentation='packed' needs cu_seqlens"),
        ({"cu_seqlens": BOUNDS}, "cu_seqlens with segmentation='constant': use segmentation='packed'"),
        ({"segmentation": "packed", "cu_seqlens": BOUNDS + 1}, "cu_seqlens runs from 1 to 7; .* from 0 to T=6"),
        (
            {"segmentation": "packed", "cu_seqlens": BOUNDS.float()},
            r"cu_seqlens is torch.float32 \[2\]; it must be int32",
        ),
        (
            {"segmentation": "packed", "cu_seqlens": torch.tensor([0, 5, 3, 6])},
            "cu_seqlens falls from 5 to 3 at sequence 1",
        ),
    ),
    ids=str,
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        memory_caching(**({"q": X, "k": X, "v": X} | change))


def test_packed_rows_have_one_batch() -> None:
    x = X.expand(2, -1, -1, -1)
    with pytest.raises(ArgumentError, match=r"q has B=2 with segmentation='packed'.*put the batch into cu_seqlens"):
        memory_caching(x, x, x, segmentation="packed", cu_seqlens=BOUNDS)


@pytest.mark.parametrize("recurrence", ("dla", "titans"))
@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"W_up": None}, "needs W_up: W_up is"),
        ({"W_down": None}, "needs W_down: W_up is"),
        ({"W_up": torch.zeros(4, 6)}, r"W_up is \[4, 6\]; it must be \[H, Dk, E\] with H=2, Dk=4"),
        ({"W_down": torch.zeros(2, 5, 4)}, r"W_down is \[2, 5, 4\]; it must be \[H, E, Dv\] = \[2, 6, 4\]"),
        ({"W_down": torch.zeros(2, 6, 4).long()}, "W_down is torch.int64; it must be floating point"),
        ({"inner_chunk": 0}, "inner_chunk=0: must be an integer of at least 1"),
    ),
    ids=str,
)
def test_refused_of_deep_memories(recurrence: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        memory_caching(**(arguments(recurrence) | change), recurrence=recurrence)


def test_residual_needs_equal_widths() -> None:
    with pytest.raises(ArgumentError, match=r"memory_residual=True with Dk=4, Dv=5.*pass memory_residual=False"):
        memory_caching(**arguments("dla", Dv=5), recurrence="dla")


def test_segments() -> None:
    assert make_segments(10, "constant", 4).spans == ((0, 4, 0), (4, 8, 0), (8, 10, 0))
    assert make_segments(37, "logarithmic").spans == ((0, 32, 0), (32, 36, 0), (36, 37, 0))
    packed = make_segments(10, "packed", 4, torch.tensor([0, 0, 3, 3, 9, 10, 10], dtype=torch.int32))
    assert packed.spans == ((0, 3, 0), (3, 7, 1), (7, 9, 1), (9, 10, 3))
    assert (packed.count, packed.longest) == (4, 4)
    for row, column in enumerate((packed.begin, packed.end, packed.first)):
        assert column.dtype == torch.int32 and column.is_contiguous()
        assert column.tolist() == [span[row] for span in packed.spans]
    assert make_segments(10, "constant", 4) is make_segments(10, "constant", 4)
    with pytest.raises(ArgumentError, match="T=0: there must be at least 1 token"):
        make_segments(0)
