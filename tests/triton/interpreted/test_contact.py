"""benchmarks/contact.py where it asks what is wrong; templates as they are; gated rows in shared memory."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mctune.backends import get_backend
from mctune.backends.triton import templates
from mctune.core.problem import RECURRENCES, Problem
from mctune.core.target import resolve
from mctune.runtime.kernels import dispatch
from mctune.verify.inputs import judged, make_inputs
from mctune.verify.judge import run_kernel, tolerance, verify_case
from mctune.verify.spread import default, odd_cases
from mctune.workers.hold import candidates

BENCHMARKS = Path(__file__).parent.parent.parent.parent / "benchmarks"
TARGET, _ = resolve("h100-sxm")
SMALL = Problem(aggregation="grm", T=40, H=1, Dk=16, Dv=16, segment_length=16, dtype="float16")


@pytest.fixture(scope="module")
def contact() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        before = set(sys.modules)
        import contact_diagnose
        import contact_guard
        import contact_kernels
        import contact_steps

        yield {
            "diagnose": contact_diagnose, "guard": contact_guard, "kernels": contact_kernels, "steps": contact_steps
        }  # fmt: skip
        for name in set(sys.modules) - before:
            if name.startswith("contact"):
                del sys.modules[name]


@pytest.fixture
def steps(contact: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(dispatch, "TABLE", dispatch.TABLE)
    kernels = contact["kernels"].Kernels(tmp_path / "kernels", TARGET, contact["kernels"].SMALL)
    return contact["steps"].Steps(kernels, contact["guard"].Facts(tmp_path / "out"))


def test_templates_run_as_they_are(contact: dict[str, ModuleType], tmp_path: Path) -> None:
    for pass_ in ("forward", "backward", "decode"):
        problem = SMALL.replace(pass_=pass_, aggregation="ssc", top_k=2)
        config, backend = default(problem, TARGET), get_backend("triton")
        found = []
        for built in (backend.build(problem, config, TARGET, tmp_path / "rendered"),
                      contact["kernels"].unrendered(problem, config, tmp_path / "as_they_are")):  # fmt: skip
            kernel = backend.load(problem, config, built)
            found.append(run_kernel(kernel, problem, make_inputs(problem, 1)))
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]), pass_


def test_without_libcst_it_takes_them(
    contact: dict[str, ModuleType], steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "libcst", None)
    for name in ("render", "fold"):
        monkeypatch.delitem(sys.modules, f"mctune.backends.triton.{name}", raising=False)
    bare: dict[str, Any] = runpy.run_path(templates.__file__)
    monkeypatch.setattr(templates, "render", bare["render"])
    templates._rendered.cache_clear()
    built = steps.kernels.built(SMALL, default(SMALL, TARGET))
    assert "partial" in (built.library.parent / dict(built.parts)["read_forward"]).read_text()
    assert steps.kernels.is_built(SMALL, default(SMALL, TARGET))


def planted(monkeypatch: pytest.MonkeyPatch, pass_: str, name: str, fault: Any) -> None:
    """Every launcher of a pass does something else where it calls the host function of that name."""
    launcher = dispatch.launcher.__wrapped__

    def faulty(entry: Any) -> Any:
        made = launcher(entry)
        if entry.problem["pass"] == pass_:
            right = getattr(made, name)
            setattr(made, name, lambda *args, **kwargs: fault(right(*args, **kwargs)))
        return made

    found: dict[Any, Any] = {}
    monkeypatch.setattr(dispatch, "launcher", lambda entry: found.setdefault(entry, faulty(entry)))


def test_the_operation_that_has_a_race_is_named(
    contact: dict[str, ModuleType], steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact["diagnose"], "RUNS", 2)
    watch = partial(contact["diagnose"].watch, steps, steps.facts)
    watch("quiet", "grm", tmp_path, reference=True)
    assert steps.facts.of("first to differ")[0]["operations"] == {}
    count = iter(range(100))

    def racing(made: Any) -> Any:
        return made._replace(du=made.du + next(count) * 1e-3)

    planted(monkeypatch, "backward", "gates_backward", racing)
    watch("racing", "grm", tmp_path, reference=True)
    (found,) = steps.facts.of("first to differ", step="racing")
    assert found["operations"] == {"gates_backward": 2}
    steps.kernels.serve(*steps.kernels.pairs("grm"))
    assert not steps.repeat("repeats", "grm", 2)
    assert set(steps.facts.of("repeats")[0]["differing"]) == {"du"}


def test_the_operation_that_is_wrong_is_named(
    contact: dict[str, ModuleType], steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contact["diagnose"], "RUNS", 0)
    watch = partial(contact["diagnose"].watch, steps, steps.facts)
    with monkeypatch.context() as patch:
        planted(patch, "backward", "state_backward", lambda made: made._replace(dends=made.dends * 1.5))
        watch("wrong", "grm", tmp_path, reference=True)
        steps.kernels.serve(*steps.kernels.pairs("grm"))
        off = {name: error for name, error, limit in steps.compared("grm") if not error <= limit}
        assert set(off) == {"dk", "dv"}
    watch("right", "grm", tmp_path, reference=False)
    wrong = [fact for fact in steps.facts.of("operation") if not fact["right"]]
    assert wrong[0]["operation"] == "state_backward" and wrong[0]["error"] == pytest.approx(1 / 3, rel=1e-3)


@pytest.mark.parametrize(
    ("aggregation", "kind", "dtype"), [("grm", "per_segment", "float16"), ("ssc", "grouped", "float32")]
)
def test_gated_rows_may_wait_in_shared_memory(aggregation: str, kind: str, dtype: str, tmp_path: Path) -> None:
    problem = Problem(
        aggregation=aggregation, pass_="backward", T=100, H=1, Dk=24, Dv=40, segment_length=24, dtype=dtype,
        top_k=2 if aggregation == "ssc" else None,
    )  # fmt: skip
    backend, (hopper, _) = get_backend("triton"), resolve("h100-sxm")
    space = backend.space(problem)
    fixed = {"formulation": kind, "dgroup_OPERAND": "shared"}
    if kind == "per_segment":
        fixed = {"formulation": kind, "dstates_OPERAND": "shared", "dgroup_OPERAND": "registers", "dstates_SEGMENTS": 4}
    config = space.first_valid(lambda c: space.valid(c.replace(**fixed), problem, hopper))
    assert config is not None
    config = config.replace(**fixed)
    kernel = backend.load(problem, config, backend.build(problem, config, hopper, tmp_path))
    for seed, case in enumerate(odd_cases(problem)):
        assert verify_case(partial(run_kernel, kernel), case, seed) <= tolerance(case), case


def test_what_is_held_first_are_the_widest_defaults(tmp_path: Path) -> None:
    wide = [one for one in candidates(TARGET) if one.problem.H == 16]
    assert wide == candidates(TARGET)[: len(wide)]
    every = set(product(("forward", "backward", "decode"), ("grm", "residual", "ssc")))
    assert {(one.problem.pass_, one.problem.aggregation) for one in wide if not one.problem.deep} == every
    assert {one.problem.recurrence for one in wide} == set(RECURRENCES)
    assert all(one.config == default(one.problem, TARGET) and one.problem.dtype == "bfloat16" for one in wide)
    # The cheapest of them here.
    one = next(one for one in wide if one.problem.pass_ == "decode" and one.problem.aggregation == "grm")
    backend, problem = get_backend("triton"), judged(one.problem)
    kernel = backend.load(problem, one.config, backend.build(problem, one.config, TARGET, tmp_path))
    case = list(odd_cases(problem))[1]
    assert verify_case(partial(run_kernel, kernel), case, 0) <= tolerance(case)
