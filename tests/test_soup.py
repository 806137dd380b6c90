"""For a matrix memory soup is grm: the backends make the same programs of both, so that grm's tests are soup's too."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from mctune.backends.triton.templates import write_parts
from mctune.backends.tvm import TvmBackend, templates
from mctune.core.config import Config
from mctune.core.problem import PASSES, STATE_INITS, Problem
from mctune.core.target import resolve
from mctune.verify.spread import draw, draw_formulations, draw_specialized
from tests import draw as drawn

HOPPER, _ = resolve("h100-sxm")


@pytest.mark.parametrize("pass_", PASSES)
def test_tvm(pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a template makes, it makes of the same problem; and the spaces allow the same configurations."""
    given: list[Problem] = []
    template = SimpleNamespace(build=lambda problem, config, target: given.append(problem))
    monkeypatch.setattr(templates.importlib, "import_module", lambda name: template)
    backend, config = TvmBackend(), Config.of({})
    for recurrence, state_init in product(drawn.RECURRENCES, STATE_INITS):
        grm = next(one.problem for one in drawn.wanted(pass_) if one.combination == (recurrence, "grm", state_init))
        for problem in (grm, grm.replace(aggregation="soup")):
            templates.render(backend.padded(problem), config, drawn.host())
        asked, got = given[: len(given) // 2], given[len(given) // 2 :]
        assert len(given) == 2 * len(templates.OPERATIONS[pass_]) and asked == got
        assert {problem.aggregation for problem in given} == {"grm"}
        given.clear()
    assert drawn.formulations(pass_, "soup") == drawn.formulations(pass_, "grm")
    for one in drawn.wanted(pass_):
        if one.problem.aggregation == "grm":
            assert drawn.SPACES[pass_].valid(one.config, one.problem.replace(aggregation="soup"), one.target)


@pytest.mark.parametrize("pass_", PASSES)
def test_triton(pass_: str, tmp_path: Path) -> None:
    some = draw(pass_, HOPPER, ("float32", "bfloat16"))
    some += draw_formulations(pass_, HOPPER, ("bfloat16", "float32")) if pass_ != "decode" else []
    some += draw_specialized(HOPPER) if pass_ == "forward" else []
    some = [one for one in some if one.problem.aggregation == "grm"]
    assert len(some) >= 4
    for one in some:
        parts = [
            [(name, (tmp_path / file).read_text()) for name, file in write_parts(problem, one.config, tmp_path)]
            for problem in (one.problem, one.problem.replace(aggregation="soup"))
        ]
        assert parts[0] and parts[0] == parts[1]
