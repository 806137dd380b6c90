"""The search space of the CPU's forward pass: what each constraint refuses and why, and the default."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mctune.backends import get_backend
from mctune.backends.spaces import load_space
from mctune.backends.tvm import TvmBackend
from mctune.core.config import Config, Scalar
from mctune.core.errors import UsageError
from mctune.core.problem import AGGREGATIONS, Problem
from mctune.core.target import Target, resolve
from mctune.runtime.kernels import support

SPACE = load_space("tvm", "matrix", "forward")
PLAIN = Config.of(
    {
        "chunk": 64, "rows": 4, "cols": 16, "unroll": 1, "formulation": "per_segment", "panel": 1,
        "loop_order": "rows_outer", "parallel": "segment", "score_rows": 4, "score_lanes": 16, "state_chunk": 64,
        "state_rows": 4, "state_cols": 16,
    }
)  # fmt: skip
"""Valid for any width and CPU, segments of 64 and more."""
PROBLEM = Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=256)


def cpu(vector_floats: int) -> Target:
    return replace(resolve("cpu")[0], vector_floats=vector_floats)


@pytest.mark.parametrize(
    ("constraint", "reason", "changes"),
    [
        ("formulation", "the aggregation has no such formulation", {"formulation": "summed"}),
        ("formulation", "the aggregation has no such formulation", {"formulation": "gather"}),
        ("panel", "only gated has panels", {"panel": 2}),
        ("rows", "rows must divide chunk", {"rows": 6}),
        ("cols", "cols must divide Dv, padded to 16", {"cols": 48, "rows": 1}),
        ("registers", "the register tile would spill", {"rows": 8}),
        ("score_rows", "score_rows must divide chunk", {"chunk": 100, "score_lanes": 100, "score_rows": 8}),
        ("score_lanes", "score_lanes must divide chunk", {"score_lanes": 48, "score_rows": 1}),
        ("score registers", "the score tile would spill", {"score_rows": 8}),
        ("state_chunk", "with one task a head the states come from the read's own chunks", {"parallel": "head"}),
        ("state_rows", "state_rows must divide Dk, padded to 16", {"state_rows": 3}),
        ("state_cols", "state_cols must divide Dv, padded to 16", {"state_cols": 48, "state_rows": 1}),
        ("state registers", "the state tile would spill", {"state_rows": 8}),
        ("chunk", "a chunk longer than a segment computes rows that do not exist", {"chunk": 512}),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_each_constraint_refuses_for_its_reason(constraint: str, reason: str, changes: dict[str, Scalar]) -> None:
    broken = SPACE.broken(PLAIN.replace(**changes), PROBLEM, cpu(8))
    named = [c.reason for c in broken if c.name == constraint]
    assert named == [reason]
    if constraint not in ("cols", "score_lanes", "score_rows", "state_cols"):
        assert len(broken) == 1


def test_every_constraint_is_tested() -> None:
    mark = next(m for m in test_each_constraint_refuses_for_its_reason.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    assert {case[0] for case in mark.args[1]} == {c.name for c in SPACE.constraints}


@pytest.mark.parametrize("vector_floats", (8, 16))
def test_register_tiles_end_where_the_registers_do(vector_floats: int) -> None:
    """AVX2 has 16 registers of 8 floats, AVX-512 32 of 16: rows * vectors + vectors + 1 of them are in use."""
    fits = {8: {(6, 16), (2, 32), (1, 48)}, 16: {(16, 16), (12, 32), (8, 48), (6, 64)}}[vector_floats]
    rows = SPACE.param("rows").values
    for cols in (16, 32, 48, 64):
        most = max(
            (
                int(r)
                for r in rows
                if not any(
                    c.name == "registers"
                    for c in SPACE.broken(PLAIN.replace(rows=r, cols=cols), PROBLEM, cpu(vector_floats))
                )
            ),
            default=None,
        )
        assert most == dict((c, r) for r, c in fits).get(cols)


@pytest.mark.parametrize("width", (1, 7, 16, 20, 48, 64, 128, 200))
@pytest.mark.parametrize("vector_floats", (8, 16))
def test_plain_tiles_are_valid_for_any_width(width: int, vector_floats: int) -> None:
    for aggregation in AGGREGATIONS:
        for Dk, Dv in ((width, width), (width, 16), (64, width)):
            problem = PROBLEM.replace(aggregation=aggregation, Dk=Dk, Dv=Dv)
            assert SPACE.broken(PLAIN, problem, cpu(vector_floats)) == ()


@pytest.mark.parametrize("width", (16, 20, 64, 128))
@pytest.mark.parametrize("vector_floats", (8, 16))
def test_the_default_or_a_fallback_is_valid(width: int, vector_floats: int) -> None:
    problem, target = PROBLEM.replace(Dk=width, Dv=width), cpu(vector_floats)
    config = SPACE.first_valid(lambda c: SPACE.valid(c, problem, target))
    assert config is not None and SPACE.valid(config, problem, target)
    if width in (64, 128) and vector_floats == 16:
        assert config == SPACE.default


def test_the_defaults_are_points_of_the_space() -> None:
    for config in (SPACE.default, *SPACE.fallbacks):
        assert SPACE.at(SPACE.indices(config)) == config
        assert set(config) == {param.name for param in SPACE.params}


@pytest.mark.parametrize("segment_length", (1, 16, 32, 40, None))
def test_short_segments_have_valid_configurations_too(segment_length: int | None) -> None:
    problem = PROBLEM.replace(
        segment_length=segment_length, segmentation="constant" if segment_length else "logarithmic"
    )
    assert SPACE.valid(PLAIN.replace(chunk=16), problem, cpu(8))
    config = SPACE.first_valid(lambda c: SPACE.valid(c, problem, cpu(16)))
    assert config is not None and SPACE.valid(config, problem, cpu(16))
    assert segment_length is None or config.integer("chunk") <= max(16, segment_length)


def test_problems_without_a_template_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuple(row for row in support.SERVED if row.family == "matrix")
    monkeypatch.setattr(support, "SERVED", rows)
    with pytest.raises(UsageError, match="recurrence='titans' has no TVM template; there are linear, swla"):
        get_backend("tvm").space(PROBLEM.replace(recurrence="titans"))
    assert TvmBackend().space(PROBLEM) is SPACE
