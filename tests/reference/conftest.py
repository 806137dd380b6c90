"""Random calls of the oracle, shared by the tests of its properties."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

GATES = {"linear": (), "swla": ("g", "beta", "lam"), "dla": ("eta",), "titans": ("g", "eta", "mu")}


def make_call(
    recurrence: str = "linear",
    *,
    seed: int = 0,
    B: int = 2,
    T: int = 7,
    H: int = 2,
    Dk: int = 3,
    Dv: int = 3,
    segment_length: int = 3,
    segmentation: str = "constant",
    state_init: str = "independent",
    inner_chunk: int = 2,
) -> dict[str, Any]:
    """Keyword arguments of memory_caching with every gate of ``recurrence`` present; a packed row has an empty part."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    B = 1 if segmentation == "packed" else B
    call: dict[str, Any] = {
        "q": normal(B, T, H, Dk),
        "k": normal(B, T, H, Dk) / 2,
        "v": normal(B, T, H, Dv),
        "u": normal(B, T, H, Dk),
        "recurrence": recurrence,
        "segment_length": segment_length,
        "segmentation": segmentation,
        "state_init": state_init,
    }
    for name in GATES[recurrence]:
        gate = normal(B, T, H)
        call[name] = -gate.abs() if name == "g" else gate.sigmoid() / 8 if name in ("eta", "mu") else gate
    if recurrence in ("dla", "titans"):
        E = 2 * Dk
        call |= {
            "W_up": normal(H, Dk, E) / 2,
            "W_down": normal(H, E, Dv) / 2,
            "memory_residual": Dk == Dv,
            "inner_chunk": inner_chunk,
        }
    if segmentation == "packed":
        call["cu_seqlens"] = torch.tensor([0, T // 3, T // 3, T], dtype=torch.int32)
    return call


@pytest.fixture(scope="session")
def call() -> Callable[..., dict[str, Any]]:
    """The function that makes a random call."""
    return make_call


@pytest.fixture(scope="session")
def calls() -> Callable[..., st.SearchStrategy[dict[str, Any]]]:
    """A hypothesis strategy for random calls; keywords fix some of the choices."""

    def strategy(**fixed: Any) -> st.SearchStrategy[dict[str, Any]]:
        widths = st.integers(1, 4)
        free: dict[str, st.SearchStrategy[Any]] = {
            "recurrence": st.sampled_from(("linear", "swla", "dla", "titans")),
            "segmentation": st.sampled_from(("constant", "logarithmic", "packed")),
            "state_init": st.sampled_from(("independent", "checkpoint")),
            "seed": st.integers(0, 999),
            "B": st.integers(1, 2),
            "T": st.integers(1, 9),
            "H": st.integers(1, 2),
            "Dk": widths,
            "Dv": widths,
            "segment_length": st.integers(1, 5),
            "inner_chunk": st.integers(1, 4),
        }
        return st.builds(make_call, **{**free, **{name: st.just(value) for name, value in fixed.items()}})

    return strategy
