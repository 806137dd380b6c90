"""The reference at the timed size is held to the oracle on small problems, and a kernel to the reference."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from mctune.core.problem import Problem
from mctune.runtime.kernels.kept import CHOICE, LOGITS
from mctune.verify import at_size as module
from mctune.verify.at_size import AtSize, at_size, make
from mctune.verify.decided import decided, gaps, means_of
from mctune.verify.inputs import make_inputs, sized_problems
from mctune.verify.judge import error_of, tolerance
from mctune.verify.kept import kept_by, segments_of
from mctune.verify.passes import PASSES
from mctune.verify.rerun import error_at_size

PROBLEMS = [
    Problem(
        recurrence=recurrence, aggregation=aggregation, state_init=state_init, pass_=pass_, B=2, T=45, H=2, Dk=8, Dv=12,
        segment_length=8, top_k=2 if aggregation == "ssc" else None,
    )
    for pass_, recurrence, (aggregation, state_init) in itertools.product(
        ("forward", "backward"), ("linear", "swla"),
        (("grm", "checkpoint"), ("ssc", "independent"), ("residual", "checkpoint"), ("mean", "independent")),
    )
]  # fmt: skip


def ids(problem: Problem) -> str:
    return f"{problem.pass_}-{problem.recurrence}-{problem.aggregation}"


@pytest.mark.parametrize("problem", PROBLEMS, ids=ids)
def test_the_reference_is_what_the_oracle_computes(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    # One head at a time, as on large problems.
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    case = make(problem, 3, ())
    wanted = PASSES[problem.pass_].expected(problem, case.inputs)
    assert error_of({name: x.float() for name, x in case.wanted.items()}, wanted) < tolerance(problem) / 4


@pytest.mark.parametrize("aggregation", ("grm", "ssc"))
def test_what_a_backward_is_given_is_what_the_oracle_keeps(aggregation: str) -> None:
    problem = PROBLEMS[0].replace(pass_="backward", aggregation=aggregation, top_k=2 if aggregation == "ssc" else None)
    names = ("states", "operand", "means", *(LOGITS if aggregation == "grm" else CHOICE))
    case = make(problem, 3, names)
    for name, x in kept_by(problem, case.inputs, names).items():
        assert case.given[name].dtype == x.dtype and case.given[name].shape == x.shape, name
        finite = x.isfinite() if x.is_floating_point() else torch.ones_like(x, dtype=torch.bool)
        if name not in ("logits",):
            torch.testing.assert_close(case.given[name][finite], x[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("aggregation", "T"), (("grm", 30), ("ssc", 33), ("residual", 32)))
def test_a_decode_step_has_a_reference(aggregation: str, T: int) -> None:
    problem = Problem(
        aggregation=aggregation, pass_="decode", B=2, T=T, H=2, Dk=8, Dv=8, segment_length=8,
        top_k=2 if aggregation == "ssc" else None,
    )  # fmt: skip
    case = make(problem, 1, ())
    memory = case.arguments().keywords["memory"]
    assert int(memory.cached[0]) == (T - 1) // 8 and int(memory.filled[0]) == (T - 1) % 8
    assert case.wanted["y"].shape == (2, 1, 2, 8) and case.wanted["states"].shape[2] == T // 8
    # The states so far, and one that the token ends.
    assert torch.equal(case.wanted["states"][:, :, : (T - 1) // 8], memory.states[0][:, :, : (T - 1) // 8])


def test_choices_of_ssc_are_decided() -> None:
    problem = Problem(aggregation="ssc", T=2000, H=2, Dk=4, Dv=4, segment_length=16, top_k=3)
    drawn = make_inputs(problem.replace(segment_length=2000), 0)
    again = decided(problem, drawn, 0, 1e-2)
    changed = (again.u != drawn.u).any(-1)
    assert 0 < int(changed.sum()) < 1500
    means = means_of(drawn.k[:, :, 0], segments_of(problem, drawn))[0]
    last = again.u[0, 1984:, 0] @ means[:124].T
    assert float(gaps(last, 3).min()) >= 1e-2 - 1e-6


def test_the_file_gives_what_was_made(tmp_path: Path) -> None:
    class Kernel:
        device, wants = "cpu", (("states",),)

    problem = PROBLEMS[-1]
    made = at_size(Kernel(), problem, 5, tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    again: AtSize = at_size(Kernel(), problem, 5, tmp_path)
    assert file.stat().st_mtime_ns == before
    assert error_at_size(again.wanted, made.wanted) == 0.0 and torch.equal(again.inputs.q, made.inputs.q)
    # It is this process's alone.
    again.wanted["dq"].fill_(0.0)
    assert float(at_size(Kernel(), problem, 5, tmp_path).wanted["dq"].abs().max()) > 0


def test_one_wrong_row_among_many_is_an_error() -> None:
    wanted = {"y": torch.randn(1, 20_000, 1, 16, generator=torch.Generator().manual_seed(0))}
    found = {"y": wanted["y"].clone()}
    assert error_at_size(found, wanted) == 0.0
    found["y"][0, 7777] *= 0.9
    # Over all rows it is 0.1 / sqrt(20000).
    assert 0.005 < error_at_size(found, wanted) < 0.05
    found["y"][0, 7777, 0, 3] = float("nan")
    assert error_at_size(found, wanted) == float("inf")
    assert error_at_size({}, wanted) == float("inf")


def test_several_segments_of_the_timed_length_are_among_the_cases() -> None:
    for C, T in ((64, 4096), (4096, 4096), (256, 400)):
        problem = Problem(aggregation="grm", T=T, H=8, Dk=16, Dv=16, segment_length=C)
        assert any(one.segment_length == C and one.T > 2 * C for one in sized_problems(problem))
        assert sized_problems(problem)[0] == problem
