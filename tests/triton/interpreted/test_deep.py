"""Deep memories' forward: absent gates, chunks of one token, a memory that does not add its input though it could."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from holding import TARGET

from mctune.backends import get_backend
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.reference import error_ratio, memory_caching
from mctune.runtime.kernels.triton.deep import forward
from mctune.verify.inputs import make_inputs
from mctune.verify.judge import TOLERANCE, poisoned_memory
from mctune.verify.kept import segments_of
from mctune.verify.passes import options
from mctune.verify.spread import default, walk

PROBLEM = Problem(
    recurrence="titans", aggregation="residual", T=23, H=2, Dk=7, Dv=7, expansion=5, segment_length=11, inner_chunk=4
)
CASES = (
    *((PROBLEM, absent) for count in (1, 2, 3) for absent in combinations(("g", "eta", "mu"), count)),
    (PROBLEM.replace(aggregation="mean", state_init="checkpoint"), ("mu",)),
    (PROBLEM.replace(aggregation="soup", dtype="float16"), ("g", "mu")),
    (PROBLEM.replace(T=14, inner_chunk=1), ("mu",)),
    (PROBLEM.replace(recurrence="dla", inner_chunk=1), ()),
    (PROBLEM.replace(recurrence="dla"), ("eta",)),
    (PROBLEM.replace(recurrence="dla", aggregation="soup"), ("eta",)),
)


def named(x: object) -> str | None:
    return "-".join(x) if isinstance(x, tuple) else None


@pytest.mark.parametrize(("problem", "absent"), CASES, ids=named)
def test_absent_gates(problem: Problem, absent: tuple[str, ...], tmp_path: Path) -> None:
    hold(problem, absent, default(problem, TARGET), tmp_path)


@pytest.mark.parametrize(("problem", "absent"), CASES[:8:3], ids=named)
def test_absent_gates_by_rows(problem: Problem, absent: tuple[str, ...], tmp_path: Path) -> None:
    hold(problem, absent, walk(random.Random(1), problem, TARGET, write_FORM="rows"), tmp_path)


def hold(problem: Problem, absent: tuple[str, ...], config: Config, folder: Path) -> None:
    backend = get_backend("triton")
    kernel = backend.load(problem, config, backend.build(problem, config, TARGET, folder))
    inputs = make_inputs(problem, 0)
    given = {name: x for name, x in inputs.arguments(problem).items() if name not in absent}
    given["memory_residual"] = residual = problem.aggregation == "soup"
    with torch.no_grad():
        wanted = memory_caching(**given)
    called = options(problem, inputs) | dict.fromkeys(absent) | {"memory_residual": residual}
    with poisoned_memory():
        y = kernel(inputs.q, inputs.k, inputs.v, inputs.u, segments=segments_of(problem, inputs), **called).y
    assert error_ratio(y, wanted) <= TOLERANCE[problem.dtype]


def test_longer_segments_have_their_states_carried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    problem = PROBLEM.replace(T=14)
    backend, config = get_backend("triton"), walk(random.Random(1), problem, TARGET, write_FORM="rows")
    kernel: Any = backend.load(problem, config, backend.build(problem, config, TARGET, tmp_path))
    inputs = make_inputs(problem, 0)
    call = {"segments": segments_of(problem, inputs), **options(problem, inputs)}
    by_rows = kernel(inputs.q, inputs.k, inputs.v, inputs.u, **call).y
    monkeypatch.setattr(forward, "LONGEST_ROWS", problem.segment_length - 1)
    kernel.rows = kernel.write_rows = "never called"
    by_states = kernel(inputs.q, inputs.k, inputs.v, inputs.u, **call).y
    assert 0 < error_ratio(by_states, by_rows.double()) <= TOLERANCE["float32"]


def test_a_search_takes_rows_where_the_launcher_does() -> None:
    space, long = get_backend("triton").space(PROBLEM), forward.LONGEST_ROWS
    config = walk(random.Random(1), PROBLEM, TARGET, write_FORM="rows")
    valid = [space.valid(config, PROBLEM.replace(T=4096, segment_length=C), TARGET) for C in (long, long + 1)]
    assert valid == [True, False]
