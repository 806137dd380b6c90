"""What the oracle refuses: the message names the offender, the limit and the remedy. And the error ratio."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mctune.core.errors import UsageError
from mctune.reference import error_ratio, memory_caching, segment_states

ONES = torch.ones(2, 7, 2)


def bounds(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


REFUSED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("linear", {"recurrence": "gru"}, ("recurrence='gru'", "linear, swla, dla, titans")),
    ("linear", {"aggregation": "max"}, ("aggregation='max'", "residual, grm, soup, ssc, mean")),
    ("linear", {"segmentation": "random"}, ("segmentation='random'", "constant, logarithmic, packed")),
    ("linear", {"state_init": "warm"}, ("state_init='warm'", "independent, checkpoint")),
    ("linear", {"segment_length": 0}, ("segment_length=0", "at least 1")),
    ("linear", {"segment_length": 2.0}, ("segment_length=2.0", "integer")),
    ("linear", {"aggregation": "ssc", "top_k": 0}, ("top_k=0", "at least 1")),
    ("titans", {"inner_chunk": 0}, ("inner_chunk=0", "at least 1")),
    ("linear", {"q": torch.ones(2, 7, 2, 4)}, ("q has shape (2, 7, 2, 4)", "[B, T, H, Dk] = (2, 7, 2, 3)")),
    ("linear", {"k": torch.ones(7, 2, 3)}, ("k has shape (7, 2, 3)", "[B, T, H, Dk]")),
    ("linear", {"v": torch.ones(7, 2, 3)}, ("v has shape (7, 2, 3)", "[B, T, H, Dv]")),
    ("linear", {"v": torch.ones(2, 6, 2, 3)}, ("v has shape (2, 6, 2, 3)", "(2, 7, 2, any)")),
    ("linear", {"u": torch.ones(1, 7, 2, 3)}, ("u has shape (1, 7, 2, 3)", "(2, 7, 2, 3)")),
    ("linear", {"q": torch.ones(2, 7, 2, 3).int()}, ("q has dtype torch.int32", "floating point", "q.float()")),
    ("linear", {"v": [1.0]}, ("v is list", "torch.Tensor", "[B, T, H, Dv]")),
    ("linear", {"q": torch.ones(2, 7, 2, 3, device="meta")}, ("q is on meta", "k on cpu", "one device")),
    ("linear", {"k": torch.ones(2, 0, 2, 3), "v": torch.ones(2, 0, 2, 3)}, ("T=0", "at least 1")),
    ("linear", {"g": -ONES}, ("recurrence='linear' takes no g", "swla and titans", "leave it out")),
    ("dla", {"g": -ONES}, ("recurrence='dla' takes no g", "swla and titans")),
    ("linear", {"beta": ONES}, ("recurrence='linear' takes no beta", "swla")),
    ("titans", {"lam": ONES}, ("recurrence='titans' takes no lam", "swla")),
    ("swla", {"eta": ONES}, ("recurrence='swla' takes no eta", "dla and titans")),
    ("dla", {"mu": ONES}, ("recurrence='dla' takes no mu", "titans")),
    ("swla", {"g": ONES / 2}, ("g reaches 0.5", "at most 0", "logsigmoid")),
    ("titans", {"g": ONES * math.nan}, ("g reaches nan", "at most 0")),
    ("swla", {"lam": torch.ones(2, 7, 2, 1)}, ("lam has shape (2, 7, 2, 1)", "[B, T, H] = (2, 7, 2)")),
    ("dla", {"W_up": None}, ("recurrence='dla' needs W_up", "[H, Dk, E]")),
    ("titans", {"W_down": None}, ("recurrence='titans' needs W_down", "[H, E, Dv]")),
    ("titans", {"W_up": torch.ones(3, 6)}, ("W_up has shape (3, 6)", "[H, Dk, E] = (2, 3, any)")),
    ("titans", {"W_down": torch.ones(2, 5, 3)}, ("W_down has shape (2, 5, 3)", "[H, E, Dv] = (2, 6, 3)")),
    ("swla", {"W_up": torch.ones(2, 3, 6)}, ("recurrence='swla' takes no W_up", "'dla' or 'titans'")),
    ("dla", {"v": torch.ones(2, 7, 2, 5)}, ("memory_residual=True", "Dk=3", "Dv=5", "memory_residual=False")),
    ("linear", {"cu_seqlens": bounds(0, 7)}, ("cu_seqlens with segmentation='constant'", "'packed'")),
    ("linear", {"segmentation": "packed"}, ("B=2 with segmentation='packed'", "B is 1")),
]


@pytest.mark.parametrize(("recurrence", "change", "words"), REFUSED)
def test_refusals(
    recurrence: str, change: dict[str, Any], words: tuple[str, ...], call: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(UsageError) as caught:
        memory_caching(**{**call(recurrence), **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("cu_seqlens", "words"),
    [
        (None, ("segmentation='packed' needs cu_seqlens", "int32 [S+1]")),
        ([0, 7], ("cu_seqlens is [0, 7]", "tensor")),
        (bounds(0, 7, dtype=torch.int64), ("torch.int64", "int32", ".to(torch.int32)")),
        (bounds(0, 7)[None], ("(1, 2)", "int32 [S+1]")),
        (bounds(1, 7), ("[1, 7]", "begin at 0", "T=7")),
        (bounds(0, 6), ("[0, 6]", "end at T=7")),
        (bounds(0, 5, 3, 7), ("[0, 5, 3, 7]", "never decrease")),
        (bounds(0), ("[0]", "end at T=7", "running sum")),
    ],
)
def test_bounds_of_packed_sequences(cu_seqlens: Any, words: tuple[str, ...], call: Callable[..., Any]) -> None:
    with pytest.raises(UsageError) as caught:
        memory_caching(**{**call(segmentation="packed"), "cu_seqlens": cu_seqlens})
    for word in words:
        assert word in str(caught.value)


def test_segment_states_refuses_alike() -> None:
    ones = torch.ones(1, 4, 1, 2)
    with pytest.raises(UsageError, match="recurrence='linear' takes no g"):
        segment_states(ones, ones, g=-torch.ones(1, 4, 1))
    with pytest.raises(UsageError, match="segment_length=-1"):
        segment_states(ones, ones, segment_length=-1)


def test_arguments_without_a_meaning_are_let_be(call: Callable[..., dict[str, Any]]) -> None:
    plain = call()
    y = memory_caching(**plain)
    assert torch.equal(memory_caching(**plain, inner_chunk=0, top_k=0, memory_residual=False), y)
    logarithmic = {**plain, "segmentation": "logarithmic"}
    assert torch.equal(memory_caching(**{**logarithmic, "segment_length": 0}), memory_caching(**logarithmic))


def test_error_ratio_is_the_ratio_of_root_mean_squares() -> None:
    ref = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert error_ratio(ref, ref) == 0
    # difference 1 in one of four: RMS 0.5 over RMS 2.5
    assert error_ratio(torch.tensor([3.0, 4.0, 1.0, 0.0]), ref) == pytest.approx(0.2, rel=1e-7)
    assert error_ratio(torch.tensor([1e-8]), torch.tensor([0.0])) == pytest.approx(1.0)
    # computed in float64: 1 + 1e-12 and 1 are one number in float32
    assert error_ratio(torch.tensor([1.0]), torch.tensor([1 + 1e-12], dtype=torch.float64)) > 1e-13


def test_error_ratio_never_passes_what_cannot_be_compared() -> None:
    ref = torch.ones(2, 3)
    assert error_ratio(torch.ones(3, 2), ref) == math.inf
    assert error_ratio(torch.ones(1, 3), ref) == math.inf
    for bad in (math.nan, math.inf):
        spoiled = ref.clone()
        spoiled[1, 2] = bad
        assert error_ratio(spoiled, ref) == math.inf
        assert error_ratio(ref, spoiled) == math.inf
        assert error_ratio(spoiled, spoiled) == math.inf
