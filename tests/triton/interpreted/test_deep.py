"""Deep memories' forward: absent gates, chunks of one token, a memory that does not add its input though it could."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from holding import TARGET

from mctune.backends import get_backend
from mctune.core.problem import Problem
from mctune.reference import error_ratio, memory_caching
from mctune.verify.inputs import make_inputs
from mctune.verify.judge import TOLERANCE, poisoned_memory
from mctune.verify.kept import segments_of
from mctune.verify.passes import options
from mctune.verify.spread import default

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


@pytest.mark.parametrize(("problem", "absent"), CASES, ids=lambda x: "-".join(x) if isinstance(x, tuple) else None)
def test_absent_gates(problem: Problem, absent: tuple[str, ...], tmp_path: Path) -> None:
    backend, config = get_backend("triton"), default(problem, TARGET)
    kernel = backend.load(problem, config, backend.build(problem, config, TARGET, tmp_path))
    inputs = make_inputs(problem, 0)
    given = {name: x for name, x in inputs.arguments(problem).items() if name not in absent}
    given["memory_residual"] = residual = problem.aggregation == "soup"
    with torch.no_grad():
        wanted = memory_caching(**given)
    called = options(problem, inputs) | dict.fromkeys(absent) | {"memory_residual": residual}
    with poisoned_memory():
        y = kernel(inputs.q, inputs.k, inputs.v, inputs.u, segments=segments_of(problem, inputs), **called).y
    assert error_ratio(y, wanted) <= TOLERANCE[problem.dtype]
