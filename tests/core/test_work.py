"""Work counts against the closed forms of constant segmentation, and against counting token by token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.core.work import attention_operations, bound, cached_state_bytes, cached_states, work


def problem(**fields: Any) -> Problem:
    base: dict[str, Any] = {"T": 4096, "H": 4, "Dk": 64, "Dv": 64, "segment_length": 256}
    return Problem(**{**base, **fields})


def test_averages_of_constant_segmentation() -> None:
    N, BT, D, per_head_token = 16, 64, 64, 4096 * 4
    parts = dict(work(problem(), chunk=BT).parts)
    assert parts["state update"] == 2 * D * D * per_head_token
    assert parts["intra-chunk"] == (BT + 1) * 2 * D * per_head_token
    assert parts["entering state"] == 2 * D * D * per_head_token * 3 // 4
    assert parts["cached read"] == (N - 1) * D * D * per_head_token
    assert parts["gate logits"] == (N + 1) * D * per_head_token
    checkpoint = dict(work(problem(state_init="checkpoint"), chunk=BT).parts)
    assert checkpoint["entering state"] == 2 * D * D * per_head_token


def test_a_kernel_that_computes_the_masked_half_too_does_one_and_a_half_gigaflop() -> None:
    masked_half = 63 * 2 * 64 * 4096 * 4
    assert work(problem(), chunk=64).operations + masked_half == pytest.approx(1.54e9, rel=0.02)


def test_the_published_sketch() -> None:
    large = problem(T=16384, H=16, Dk=128, Dv=128, dtype="bfloat16")
    assert dict(work(large).parts)["cached read"] == pytest.approx(2.71e11, rel=0.01)
    assert attention_operations(large) == pytest.approx(1.10e12, rel=0.01)


def test_a_deep_memory_of_one_segment_by_hand() -> None:
    # Dk 2, E 6, Dv 3: W_up has 12 numbers, W_down 18. Five tokens in inner chunks of 2: places 1 2, 1 2, 1.
    one = problem(recurrence="dla", expansion=3, inner_chunk=2, T=5, H=1, Dk=2, Dv=3)
    assert dict(work(one).parts) == {
        "gradients": 5 * (2 * 12 + 2 * 18),  # k W_up, e W_down^T
        "state update": 5 * (2 * 12 + 2 * 18),
        # A row at place n: n scores over Dk and n rows of E are added up, then n scores over E and n rows of Dv.
        "intra-chunk": (1 + 2 + 1 + 2 + 1) * 2 * (2 + 6 + 6 + 3),
        "entering state": 5 * (2 * 12 + 2 * 18),
        "cached read": 0,
        "gate logits": 5 * 2 * 2,
    }
    titans = dict(work(one.replace(recurrence="titans")).parts)
    assert titans.pop("gradients") == 5 * (2 * 12 + 2 * 18 + 2 * 18)
    assert titans == {name: count for name, count in work(one).parts if name != "gradients"}
    assert work(one).chunk == work(one, 2).chunk == 2


@pytest.mark.parametrize(
    ("aggregation", "by_hand"),
    [
        # Segments of 4, 4 and 2 tokens, 30 parameters: the second reads one state, the third two.
        ("grm", 4 * 1 * 60 + 2 * 2 * 60),
        ("soup", 4 * 1 * 60 + 2 * 2 * 60),
        ("residual", 4 * 1 * 60 + 2 * 2 * 60),
        ("ssc", 4 * 1 * 60 + 2 * 1 * 60),
        # One sum of states, which the third segment adds to.
        ("mean", (4 * 60 + 30) + (2 * 60 + 30)),
    ],
)
def test_cached_reads_of_a_deep_memory_by_hand(aggregation: str, by_hand: int) -> None:
    shape: dict[str, Any] = {"T": 10, "H": 1, "Dk": 2, "Dv": 3, "expansion": 3, "segment_length": 4}
    top_k = {"top_k": 1} if aggregation == "ssc" else {}
    three = Problem(recurrence="titans", aggregation=aggregation, **shape, **top_k)
    assert dict(work(three).parts)["cached read"] == by_hand


def test_a_deep_read_is_four_to_the_width_of_attention_a_token() -> None:
    """With E = 4 D a state takes 16 D^2: segments of E tokens cost what attention to them costs."""
    deep = problem(recurrence="dla", segment_length=256)
    past = attention_operations(deep) - 16 * attention_operations(problem(T=256))
    # A token attends to T (Dk + Dv) over the whole row: to past segments that much, in 2 operations a product.
    assert dict(work(deep).parts)["cached read"] == past
    wide = dict(work(deep.replace(Dk=128, Dv=128)).parts)["cached read"]
    assert wide == 2 * (
        attention_operations(problem(Dk=128, Dv=128)) - 16 * attention_operations(problem(T=256, Dk=128, Dv=128))
    )


def test_deep_backward_bytes_and_decode() -> None:
    deep = problem(recurrence="titans")
    assert work(deep.replace(pass_="backward")).operations == 3 * work(deep).operations
    rows, parameters, gates = 4096 * 4 * 64, 256 * 128, 3 * 4096 * 4 * 4
    states, weights = 15 * 4 * parameters * 4, 4 * parameters * 4
    assert work(deep).bytes == 5 * rows * 4 + gates + 2 * states + weights
    backward = (4 + 1 + 4) * rows * 4 + 2 * gates + 4 * states + 2 * weights
    assert work(deep.replace(pass_="backward")).bytes == backward
    step = work(deep.replace(pass_="decode"))
    gradients = 2 * parameters + 2 * 256 * 64
    assert step.operations == 4 * (gradients + 4 * parameters + 2 * 15 * parameters + 2 * 16 * 64)
    # The online state and the momentum go both ways, the state at the inner chunk's start one.
    assert step.bytes == 4 * 4 * (5 * 64 + 3 + (2 + 2 + 1 + 15) * parameters + 15 * 64)


def token_by_token(p: Problem, chunk: int) -> int:
    """The same counts, one token at a time."""
    total, top_k = 0, p.top_k
    for past, (begin, end) in enumerate(p.spans()):
        for t in range(end - begin):
            total += 2 * p.Dk * p.Dv
            total += 2 * (t % chunk + 1) * (p.Dk + p.Dv)
            total += 2 * p.Dk * p.Dv * (t >= chunk or p.state_init == "checkpoint")
            if p.aggregation in ("residual", "mean"):
                total += 2 * p.Dk * p.Dv * (past > 0)
            else:
                total += 2 * p.Dk * p.Dv * (min(top_k, past) if top_k else past) + 2 * (past + 1) * p.Dk
        if p.aggregation in ("residual", "mean") and past:
            total += p.Dk * p.Dv
    return total * p.B * p.H


@given(
    T=st.integers(1, 90),
    C=st.integers(1, 40),
    chunk=st.integers(1, 20),
    aggregation=st.sampled_from(["residual", "grm", "soup", "ssc", "mean"]),
    state_init=st.sampled_from(["independent", "checkpoint"]),
    segmentation=st.sampled_from(["constant", "logarithmic"]),
    recurrence=st.sampled_from(["linear", "swla"]),
)
def test_sums_over_the_actual_spans(
    T: int, C: int, chunk: int, aggregation: str, state_init: str, segmentation: str, recurrence: str
) -> None:
    p = Problem(
        T=T, H=2, Dk=3, Dv=5, B=2, segment_length=C if segmentation == "constant" else None, aggregation=aggregation,
        state_init=state_init, segmentation=segmentation, recurrence=recurrence,
    )  # fmt: skip
    counted = work(p, chunk)
    assert counted.operations == token_by_token(p, chunk) == sum(count for _, count in counted.parts)


@pytest.mark.parametrize(("C", "best"), [(256, 1), (32, 32)])
def test_the_default_chunk_is_the_cheapest_divisor(C: int, best: int) -> None:
    counted = work(problem(segment_length=C))
    assert counted.chunk == best
    divisors = [size for size in range(1, C + 1) if C % size == 0]
    assert counted.operations == min(work(problem(segment_length=C), size).operations for size in divisors)


def test_ssc_reads_no_more_than_there_is() -> None:
    few, many = problem(aggregation="ssc", top_k=2), problem(aggregation="ssc", top_k=99)
    assert work(many).operations == work(problem()).operations
    assert dict(work(few).parts)["cached read"] == 2 * 64 * 64 * 4 * 256 * (1 + 2 * 14)


def test_bytes() -> None:
    rows, states = 4096 * 4 * 64, 15 * 4 * 64 * 64 * 4
    assert work(problem()).bytes == 5 * rows * 4 + 2 * states
    assert work(problem(dtype="bfloat16")).bytes == 5 * rows * 2 + 2 * states
    assert work(problem(aggregation="mean")).bytes == 4 * rows * 4 + 2 * states
    assert work(problem(recurrence="swla")).bytes == 5 * rows * 4 + 2 * states + 3 * 4096 * 4 * 4


def test_backward_is_three_forwards_and_reads_dy() -> None:
    forward, backward = work(problem()), work(problem(pass_="backward"))
    assert backward.operations == 3 * forward.operations
    rows, states = 4096 * 4 * 64, 15 * 4 * 64 * 64 * 4
    assert backward.bytes == (4 + 1 + 4) * rows * 4 + 4 * states


def test_decode_is_one_step_at_context_T() -> None:
    step = work(problem(pass_="decode", T=16384, H=16, Dk=128, Dv=128))
    matrix = 128 * 128
    assert step.operations == 16 * (4 * matrix + 2 * 63 * matrix + 2 * 64 * 128)
    assert step.bytes == 16 * 4 * (5 * 128 + 65 * matrix + 63 * 128)
    top8 = work(problem(pass_="decode", T=16384, H=16, Dk=128, Dv=128, aggregation="ssc", top_k=8))
    assert dict(top8.parts)["cached read"] == 16 * 8 * 2 * matrix


def test_cached_states_and_their_bytes() -> None:
    assert cached_states(problem()) == 16 and cached_states(problem(T=4097)) == 17
    assert cached_state_bytes(problem()) == 16 * 4 * (64 * 64 + 64) * 4
    assert cached_state_bytes(problem(aggregation="residual")) == 16 * 4 * 64 * 64 * 4
    assert cached_states(problem(segmentation="logarithmic", segment_length=None, T=37)) == 3
    deep = problem(recurrence="dla", expansion=2)
    assert cached_state_bytes(deep) == 16 * 4 * (2 * 128 * 64 + 64) * 4


def test_the_bound_is_the_slower_of_the_two() -> None:
    counted = work(problem())
    assert bound(counted, 1e9, 1e30) == counted.operations / 1e9
    assert bound(counted, 1e30, 1e9) == counted.bytes / 1e9


def test_refusals() -> None:
    with pytest.raises(UsageError, match="chunk=8 with inner_chunk=16"):
        work(problem(recurrence="titans"), chunk=8)
    with pytest.raises(UsageError, match="chunk=0"):
        work(problem(), chunk=0)
