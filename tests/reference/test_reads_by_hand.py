"""Each aggregation on numbers small enough to be worked on paper: no formula here comes from the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from mctune.reference import memory_caching


def row(*values: float) -> torch.Tensor:
    """One number a token: [1, T, 1, 1]."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)


def listed(y: torch.Tensor) -> list[float]:
    return y.flatten().tolist()


# Three segments of one token: descriptors p = 1, 2, 3; memories M = k v = 10, 40, -30; u = ln 2, so that
# exp(u p) = 2, 4, 8 and the weights are whole numbers over their sum.
Q, K, V, U = row(1, 1, 2), row(1, 2, 3), row(10, 20, -10), row(math.log(2), math.log(2), math.log(2))


def read(aggregation: str, **more: object) -> list[float]:
    return listed(memory_caching(Q, K, V, U, aggregation=aggregation, segment_length=1, scale=1.0, **more))


def test_residual_adds_every_memory() -> None:
    assert read("residual") == [10, 10 + 40, 2 * (10 + 40 - 30)]


def test_grm_weighs_by_softmax_of_the_connector_with_each_mean_key() -> None:
    wanted = [10, (2 * 10 + 4 * 40) / 6, 2 * (2 * 10 + 4 * 40 - 8 * 30) / 14]
    assert read("grm") == pytest.approx(wanted, rel=1e-14)
    assert read("soup") == pytest.approx(wanted, rel=1e-14)


def test_mean_weighs_alike() -> None:
    assert read("mean") == pytest.approx([10, 25, 2 * 20 / 3], rel=1e-14)


def test_ssc_reads_the_online_memory_and_the_best_cached_ones() -> None:
    # token 3: of p = 1 and 2 the second has the larger logit
    assert read("ssc", top_k=1) == pytest.approx([10, 180 / 6, 2 * (4 * 40 - 8 * 30) / 12], rel=1e-14)
    assert read("ssc", top_k=2) == pytest.approx(read("grm"), rel=1e-14)


def test_ssc_reads_the_online_memory_whatever_its_logit() -> None:
    # u < 0 turns the order around: token 3 keeps p = 1 and, though it is the worst, the online p = 3
    u = row(-math.log(2), -math.log(2), -math.log(2))
    y = memory_caching(Q, K, V, u, aggregation="ssc", segment_length=1, top_k=1, scale=1.0)
    assert listed(y)[2] == pytest.approx(2 * (10 / 2 - 30 / 8) / (1 / 2 + 1 / 8), rel=1e-14)


def test_ssc_ties_go_to_the_earlier_segment() -> None:
    # keys 1, 1, 1 tie; of memories 10, 20, 30 and the online 40 the first is read, then the first two
    ones = row(1, 1, 1, 1)
    y = memory_caching(ones, ones, row(10, 20, 30, 40), aggregation="ssc", segment_length=1, top_k=1, scale=1.0)
    assert listed(y)[3] == pytest.approx((10 + 40) / 2, rel=1e-14)
    y = memory_caching(ones, ones, row(10, 20, 30, 40), aggregation="ssc", segment_length=1, top_k=2, scale=1.0)
    assert listed(y)[3] == pytest.approx((10 + 20 + 40) / 3, rel=1e-14)
    # and with many ties, where an unstable sort would show
    many = torch.ones(1, 65, 1, 1)
    v = torch.arange(65.0).reshape(1, 65, 1, 1)
    y = memory_caching(many, many, v, aggregation="ssc", segment_length=1, top_k=3, scale=1.0)
    assert listed(y)[64] == pytest.approx((0 + 1 + 2 + 64) / 4, rel=1e-14)


def test_the_online_descriptor_is_the_running_mean_of_the_keys_so_far() -> None:
    # segments of two, k = 1 3 | 4 6: cached p = 2; online p = 4 at token 3 and 5 at token 4
    # memories: cached 1*1 + 3*2 = 7; online 4*1 = 4, then 4 + 6*-2 = -8; no scale but on q
    k, v, q, u = row(1, 3, 4, 6), row(1, 2, 1, -2), row(1, 1, 1, 3), row(0.5, 0.5, 0.5, -0.25)
    y = memory_caching(q, k, v, u, segment_length=2, scale=10.0)
    third = (math.exp(1.0) * 7 + math.exp(2.0) * 4) / (math.exp(1.0) + math.exp(2.0))
    fourth = (math.exp(-0.5) * 7 + math.exp(-1.25) * -8) / (math.exp(-0.5) + math.exp(-1.25))
    assert listed(y) == pytest.approx([10, 70, 10 * third, 30 * fourth], rel=1e-14)


def test_a_checkpoint_reads_cached_states_that_hold_all_before_them() -> None:
    # states 10, 50, 20 instead of 10, 40, -30
    y = memory_caching(Q, K, V, U, aggregation="residual", segment_length=1, state_init="checkpoint", scale=1.0)
    assert listed(y) == [10, 10 + 50, 2 * (10 + 50 + 20)]


def test_heads_and_batch_do_not_mix() -> None:
    def both(a: torch.Tensor, b: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat((a, b), dim)

    first = memory_caching(Q, K, V, U, segment_length=1, scale=1.0)
    other = memory_caching(V, Q, K, Q, segment_length=1, scale=1.0)
    for dim in (0, 2):
        y = memory_caching(
            both(Q, V, dim), both(K, Q, dim), both(V, K, dim), both(U, Q, dim), segment_length=1, scale=1.0
        )
        torch.testing.assert_close(y, both(first, other, dim), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("aggregation", "copies"), [("residual", [1, 2, 3]), ("grm", [1, 1, 1]), ("soup", [1, 1, 1]), ("mean", [1, 1, 1])]
)
def test_a_deep_memory_adds_its_input_once_a_read(aggregation: str, copies: list[int]) -> None:
    # W = 0 and eta = 0: M(x) = x at x = q / 2; residual reads each of three memories
    deep = {"W_up": torch.zeros(1, 1, 4), "W_down": torch.zeros(1, 4, 1), "eta": torch.zeros(1, 3, 1)}
    y = memory_caching(Q, K, V, U, recurrence="dla", aggregation=aggregation, segment_length=1, scale=0.5, **deep)
    assert listed(y) == pytest.approx([0.5 * copies[0], 0.5 * copies[1], 1.0 * copies[2]], rel=1e-14)


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def test_soup_of_deep_memories_mixes_parameters_and_grm_mixes_answers() -> None:
    # From W_up = 0 and W_down = 1, dla at eta = 1 leaves W_up = k v / 2 and W_down = 1: 5, 20, -15 after segments of
    # one; weights 2, 4, 8 over 14 at token 3, where q = 2 is read as 0.1 * 2
    deep = {"W_up": torch.zeros(1, 1, 1), "W_down": torch.ones(1, 1, 1), "memory_residual": False}
    more = {"recurrence": "dla", "segment_length": 1, "scale": 0.1, **deep}
    soup = memory_caching(Q, K, V, U, aggregation="soup", **more)
    assert listed(soup)[2] == pytest.approx(gelu(0.2 * (2 * 5 + 4 * 20 - 8 * 15) / 14), rel=1e-12)
    grm = memory_caching(Q, K, V, U, aggregation="grm", **more)
    assert listed(grm)[2] == pytest.approx((2 * gelu(1.0) + 4 * gelu(4.0) + 8 * gelu(-3.0)) / 14, rel=1e-12)
    mean = memory_caching(Q, K, V, U, aggregation="mean", **more)
    assert listed(mean)[2] == pytest.approx(gelu(0.2 * (5 + 20 - 15) / 3), rel=1e-12)
    ssc = memory_caching(Q, K, V, U, aggregation="ssc", top_k=1, **more)
    assert listed(ssc)[2] == pytest.approx((4 * gelu(4.0) + 8 * gelu(-3.0)) / 12, rel=1e-12)


def test_packed_sequences_by_hand() -> None:
    # sequences of 2, 0 and 1 tokens, segments of one: the third token sees nothing of the first two
    bounds = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    y = memory_caching(Q, K, V, U, segment_length=1, segmentation="packed", cu_seqlens=bounds, scale=1.0)
    assert listed(y) == pytest.approx([10, 180 / 6, 2 * -30], rel=1e-14)
