"""Each recurrence on numbers small enough to be worked on paper: no formula here comes from the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from mctune.reference import memory_caching, segment_states


def row(*values: float) -> torch.Tensor:
    """One number a token: [1, T, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)


def gate(*values: float) -> torch.Tensor:
    """One number a token: [1, T, 1]."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1)


def rows(*tokens: tuple[float, ...]) -> torch.Tensor:
    """One vector a token: [1, T, 1, D]."""
    return torch.tensor(tokens, dtype=torch.float64)[None, :, None]


def weight(*values: float) -> torch.Tensor:
    """One head's W_up [1, 1, E]; ``.mT`` is a W_down [1, E, 1]."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1)


def listed(y: torch.Tensor) -> list[float]:
    return y.flatten().tolist()


HALF, QUARTER = math.log(0.5), math.log(0.25)


def test_linear_memory_reads_as_a_row_vector() -> None:
    q = rows((1, -1), (2, 1), (1, 1))
    k = rows((1, 2), (0, 1), (-1, 3))
    v = rows((3, 5, 0), (2, -1, 4), (1, 1, 1))
    # M_1 = [3 5 0; 6 10 0], M_2 = [3 5 0; 8 9 4], M_3 = [2 4 -1; 11 12 7]
    y = memory_caching(q, k, v, segment_length=8, scale=1.0)
    assert listed(y) == [-3, -5, 0, 14, 19, 4, 13, 16, 6]
    assert listed(memory_caching(q, k, v, segment_length=8, scale=0.5)) == [x / 2 for x in listed(y)]
    by_default = listed(memory_caching(q, k, v, segment_length=8))
    assert by_default == pytest.approx([x / math.sqrt(2) for x in listed(y)])


def test_linear_segments_start_from_zero_or_from_the_end_of_the_last() -> None:
    k, v = row(1, 2, 3, 4, 5), row(1, -1, 2, 1, 1)
    # writes k v: 1, -2, 6, 4, 5 in segments of two
    (M,), p = segment_states(k, v, segment_length=2)
    assert listed(M) == [-1, 10, 5]
    assert listed(p) == [1.5, 3.5, 5]
    (M,), p = segment_states(k, v, segment_length=2, state_init="checkpoint")
    assert listed(M) == [-1, 9, 14]
    assert listed(p) == [1.5, 3.5, 5]


def test_swla_window_of_two_with_decay() -> None:
    k, v, ones = row(1, 2, 3, 1), row(2, 1, 1, 5), row(1, 1, 1, 1)
    gates = {"g": gate(QUARTER, HALF, QUARTER, HALF), "beta": gate(100, 2, 3, -1), "lam": gate(1, 4, 2, 1)}
    # k v: 2, 2, 3, 5
    # M_1 = 1*2 = 2 (no token before, whatever beta_1); M_2 = .5*2 + 2*2 + 4*2 = 13
    # M_3 = .25*13 + 3*2 + 2*3 = 15.25; M_4 = .5*15.25 - 1*3 + 1*5 = 9.625
    y = memory_caching(ones, k, v, recurrence="swla", segment_length=4, scale=1.0, **gates)
    assert listed(y) == pytest.approx([2, 13, 15.25, 9.625], rel=1e-14)


def test_swla_at_a_segment_boundary() -> None:
    k, v = row(1, 2, 3, 1), row(2, 1, 1, 5)
    gates = {"g": gate(QUARTER, HALF, QUARTER, HALF), "beta": gate(100, 2, 3, -1), "lam": gate(1, 4, 2, 1)}
    # independent: M_3 = 2*3 = 6, neither M_2 nor k_2 v_2 seen; M_4 = .5*6 - 3 + 5 = 5
    (M,), _ = segment_states(k, v, recurrence="swla", segment_length=2, **gates)
    assert listed(M) == pytest.approx([13, 5], rel=1e-14)
    # checkpoint: the boundary changes nothing
    (M,), _ = segment_states(k, v, recurrence="swla", segment_length=2, state_init="checkpoint", **gates)
    assert listed(M) == pytest.approx([13, 9.625], rel=1e-14)


def test_swla_without_gates_is_linear() -> None:
    (M,), _ = segment_states(row(1, 2, 3), row(5, 1, 2), recurrence="swla")
    assert listed(M) == [13]


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def gelu_slope(x: float) -> float:
    return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5


def test_gelu_numbers() -> None:
    """The helpers above, against the tanh form's published values, so that the tests below stand on something."""
    assert gelu(1.0) == pytest.approx(0.8411919906082768, rel=1e-12)
    assert gelu(-2.0) == pytest.approx(-0.04540230591222, rel=1e-11)
    assert gelu_slope(0.0) == pytest.approx(0.5)


DEEP = {"W_up": weight(0.0), "W_down": weight(1.0).mT, "memory_residual": False}
"""W_up = 0, W_down = 1: M(x) = gelu(0 x) 1 = 0, gelu'(0) = 1/2."""


def test_dla_takes_its_gradients_where_the_inner_chunk_starts() -> None:
    q, k, v = row(1, 1), row(2, 1), row(3, -4)
    eta = gate(0.1, 0.2)
    # token 1: e = -3; dW_up = 2 * (-3 * 1 / 2) = -3; dW_down = gelu(0) e = 0: W_up = 0.3
    # token 2, same chunk, still at W_up = 0: e = 4, dW_up = 1 * (4 / 2) = 2, W_up = 0.3 - 0.2*2 = -0.1
    y = memory_caching(q, k, v, recurrence="dla", eta=eta, scale=1.0, inner_chunk=2, **DEEP)
    assert listed(y) == pytest.approx([gelu(0.3), gelu(-0.1)], rel=1e-12)
    # chunks of one: at W_up = 0.3, dW_up = 4 gelu'(0.3), dW_down = 4 gelu(0.3)
    y = memory_caching(q, k, v, recurrence="dla", eta=eta, scale=1.0, inner_chunk=1, **DEEP)
    up, down = 0.3 - 0.2 * 4 * gelu_slope(0.3), 1 - 0.2 * 4 * gelu(0.3)
    assert listed(y) == pytest.approx([gelu(0.3), gelu(up) * down], rel=1e-8)


def test_dla_inner_chunks_count_from_the_segment_not_from_the_sequence() -> None:
    k, v, eta = row(2, 1, 1), row(3, -4, -4), gate(0.1, 0.2, 0.2)
    # segments of 2 and 1 tokens; the first ends at W_up = -0.1, as above, and the second takes its gradient there,
    # though chunks of 3 counted from the sequence's start would take it at W_up = 0
    (W_up, W_down), _ = segment_states(
        k, v, recurrence="dla", segmentation="logarithmic", state_init="checkpoint", eta=eta, inner_chunk=3, **DEEP
    )
    assert listed(W_up) == pytest.approx([-0.1, -0.1 - 0.2 * 4 * gelu_slope(-0.1)], rel=1e-8)
    assert listed(W_down) == pytest.approx([1, 1 - 0.2 * 4 * gelu(-0.1)], rel=1e-8)
    (W_up, _), _ = segment_states(
        k, v, recurrence="dla", segmentation="logarithmic", state_init="independent", eta=eta, inner_chunk=3, **DEEP
    )
    assert listed(W_up) == pytest.approx([-0.1, -0.4], rel=1e-12)


def test_titans_momentum_decay_and_the_factor_of_two() -> None:
    q, k, v = row(1, 3), row(2, 1), row(3, 1)
    gates = {"g": gate(HALF, HALF), "eta": gate(0.1, 0.1), "mu": gate(0.9, 0.5)}
    # token 1: e = 2 (0 - 3) = -6; dW_up = 2 (-6 / 2) = -6; S = -0.6; W_up = 0.5*0 + 0.6 = 0.6, W_down = 0.5*1
    # token 2, same chunk: e = 2 (0 - 1) = -2, dW_up = -1; S = 0.5*-0.6 + 0.1*-1 = -0.4
    #          W_up = 0.5*0.6 + 0.4 = 0.7, W_down = 0.25
    y = memory_caching(q, k, v, recurrence="titans", scale=1.0, inner_chunk=2, **gates, **DEEP)
    assert listed(y) == pytest.approx([gelu(0.6) / 2, gelu(2.1) / 4], rel=1e-12)
    # chunks of one: at W_up = 0.6, W_down = 0.5: o = gelu(0.6)/2, e = 2 (o - 1)
    y = memory_caching(q, k, v, recurrence="titans", scale=1.0, inner_chunk=1, **gates, **DEEP)
    e = 2 * (gelu(0.6) / 2 - 1)
    up = 0.3 - (-0.3 + 0.1 * e * 0.5 * gelu_slope(0.6))
    down = 0.25 - 0.1 * e * gelu(0.6)
    assert listed(y)[1] == pytest.approx(gelu(3 * up) * down, rel=1e-8)


def test_titans_error_includes_the_residual() -> None:
    # o = 0 + 2, e = 2 (2 - 3) = -2, dW_up = 2 (-2 / 2) = -2, W_up = 0.2; read: gelu(0.2 x) + x at x = scale q = 2
    deep = {**DEEP, "memory_residual": True}
    y = memory_caching(row(4), row(2), row(3), recurrence="titans", scale=0.5, eta=gate(0.1), **deep)
    assert listed(y) == pytest.approx([gelu(0.4) + 2], rel=1e-12)


def test_titans_momentum_is_dropped_or_carried_at_a_boundary() -> None:
    k, v = row(2, 0), row(3, 0)
    # the second token writes nothing (k = 0 and o = v), so only momentum moves W_up from 0.6 on
    gates = {"eta": gate(0.1, 0.1), "mu": gate(0.9, 0.5)}
    (W_up, _), _ = segment_states(k, v, recurrence="titans", segment_length=1, **gates, **DEEP)
    assert listed(W_up) == pytest.approx([0.6, 0.0], rel=1e-12)
    (W_up, _), _ = segment_states(k, v, recurrence="titans", segment_length=1, state_init="checkpoint", **gates, **DEEP)
    assert listed(W_up) == pytest.approx([0.6, 0.6 + 0.3], rel=1e-12)


def test_absent_gates_of_deep_memories() -> None:
    (W_up, W_down), _ = segment_states(row(2, 2), row(3, 3), recurrence="titans", **DEEP)
    # eta = 1, mu = 0, g = 0: two steps of 6 from 0
    assert listed(W_up) == pytest.approx([12], rel=1e-12)
    assert listed(W_down) == pytest.approx([1], rel=1e-12)
    (W_up, _), _ = segment_states(row(2, 2), row(3, 3), recurrence="dla", **DEEP)
    assert listed(W_up) == pytest.approx([6], rel=1e-12)


@pytest.mark.parametrize(("T", "ends"), [(1, [1]), (2, [2]), (3, [2, 3]), (37, [32, 36, 37]), (22, [16, 20, 22])])
def test_logarithmic_segments_are_the_powers_of_two_of_T(T: int, ends: list[int]) -> None:
    ones = torch.ones(1, T, 1, 1)
    (M,), _ = segment_states(ones, ones, segmentation="logarithmic", state_init="checkpoint")
    assert listed(M) == ends
