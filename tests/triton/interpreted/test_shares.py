"""The reads of ssc's pairs, share by share: the same as all at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from holding import TARGET

from mctune.backends import get_backend
from mctune.core.problem import Problem
from mctune.runtime.kernels.triton import tables as triton_tables
from mctune.runtime.kernels.triton.matrix import forward as triton_forward
from mctune.runtime.kernels.triton.tables import Shares, Tables, make_tables, share_out
from mctune.runtime.segments import make_segments
from mctune.verify.judge import error_of, judge, poisoned_memory, run_kernel, tolerance
from mctune.verify.kept import checked_names

PROBLEM = Problem(aggregation="ssc", T=256, B=1, H=3, Dk=16, Dv=24, segment_length=32, top_k=2)


@pytest.mark.parametrize(
    ("problem", "limit", "shares"),
    (
        (PROBLEM, 64 * 2 * 24 * 4, Shares(3, 1, 256, 4)),
        (PROBLEM, 2 * 256 * 2 * 24 * 4, Shares(3, 2, 256, 1)),
        (PROBLEM.replace(segment_length=64, recurrence="swla", state_init="checkpoint"), 1, Shares(3, 1, 256, 4)),
        (PROBLEM.replace(T=250), 1, Shares(3, 1, 250, 1)),
        (PROBLEM.replace(T=192, segment_length=48), 1, Shares(3, 1, 192, 1)),
    ),
)
def test_shares_are_the_whole(
    problem: Problem, limit: int, shares: Shares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_backend("triton")
    space = backend.space(problem)
    fixed = {"formulation": "grouped"}
    config = space.first_valid(lambda c: space.valid(c.replace(**fixed), problem, TARGET))
    assert config is not None
    kernel = backend.load(problem, config, backend.build(problem, config.replace(**fixed), TARGET, tmp_path))
    case = judge(problem, 0)
    names = checked_names(kernel, problem)
    options = {"g": None, "beta": None, "lam": None} | case.inputs.gates
    segments = make_segments(problem.T, "constant", problem.segment_length or 1)
    call = partial(kernel, case.inputs.q, case.inputs.k, case.inputs.v, case.inputs.u, **options,
                   scale=0.25, top_k=2, segments=segments, keep=names)  # fmt: skip
    whole = call()
    taken: list[Shares] = []

    def little(heads: int, T: int, row_bytes: int, _: int, tables: Tables) -> Shares:
        taken.append(share_out(heads, T, row_bytes, limit, tables))
        return taken[-1]

    monkeypatch.setattr(triton_tables, "_BLOCK", 64)
    monkeypatch.setattr(triton_forward, "share_out", little)
    with poisoned_memory():
        found = call()
        results = run_kernel(kernel, problem, case.inputs)
    assert taken == [shares, shares]
    # Where a row stands in a product may change how the interpreter's is rounded.
    torch.testing.assert_close(found.y, whole.y, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(found.kept[name], whole.kept[name]) for name in names)
    assert error_of(results, case.wanted) <= tolerance(problem)


def test_every_head_and_token_is_in_one_share() -> None:
    tables = make_tables(make_segments(8192, "constant", 256), 256, False, torch.device("cpu"))
    for limit in (0, 1, 1 << 20, 3 << 20, 1 << 30):
        shares = share_out(5, 8192, 1024, limit, tables)
        seen = torch.zeros(5, 8192)
        for first, count, _, (begin, end) in shares:
            seen[first : first + count, begin:end] += 1
            assert not limit or shares.blocks == 8 or count * (end - begin) * 1024 <= limit
        assert bool((seen == 1).all())
