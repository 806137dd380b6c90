"""For a matrix memory soup is grm: the backends make the same programs of both, so that grm's tests are soup's too.

For a deep memory each aggregation has programs of its own.
"""

from __future__ import annotations

from importlib import util
from itertools import product
from types import SimpleNamespace

import pytest

from mctune.backends.triton.backend import TritonBackend
from mctune.backends.triton.templates import operations, values
from mctune.backends.tvm import TvmBackend, templates
from mctune.core.config import Config
from mctune.core.problem import AGGREGATIONS, PASSES, STATE_INITS, Problem
from mctune.core.target import resolve
from mctune.verify import spread
from tests import draw as drawn
from tests import draw_deep

HOPPER, _ = resolve("h100-sxm")


@pytest.mark.parametrize("pass_", PASSES)
def test_tvm(pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a template makes, it makes of the same problem; and the spaces allow the same configurations."""
    given: list[Problem] = []
    template = SimpleNamespace(build=lambda problem, config, target: given.append(problem))
    monkeypatch.setattr(templates, "importlib", SimpleNamespace(import_module=lambda name: template, util=util))
    backend = TvmBackend()
    for recurrence, state_init in product(drawn.RECURRENCES, STATE_INITS):
        grm = next(one for one in drawn.wanted(pass_) if one.combination == (recurrence, "grm", state_init))
        for problem in (grm.problem, grm.problem.replace(aggregation="soup")):
            templates.render(backend.padded(problem), grm.config, drawn.host())
        asked, got = given[: len(given) // 2], given[len(given) // 2 :]
        assert len(given) == 2 * len(templates.OPERATIONS["matrix", pass_]) and asked == got
        assert {problem.aggregation for problem in given} == {"grm"}
        given.clear()
    assert drawn.formulations(pass_, "soup") == drawn.formulations(pass_, "grm")
    for one in drawn.wanted(pass_):
        if one.problem.aggregation == "grm":
            assert drawn.SPACES[pass_].valid(one.config, one.problem.replace(aggregation="soup"), one.target)


@pytest.mark.parametrize("pass_", PASSES)
def test_a_deep_memory_has_programs_of_its_own(pass_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Problem] = []
    template = SimpleNamespace(build=lambda problem, config, target: given.append(problem))
    monkeypatch.setattr(templates, "importlib", SimpleNamespace(import_module=lambda name: template, util=util))
    for recurrence, aggregation in product(draw_deep.RECURRENCES, AGGREGATIONS):
        one = next(w for w in draw_deep.wanted(pass_) if w.combination[:2] == (recurrence, aggregation))
        templates.render(TvmBackend().padded(one.problem), Config.of({}), one.target)
        assert given == [one.problem] * len(templates.OPERATIONS["deep", pass_])
        given.clear()


@pytest.mark.parametrize("pass_", PASSES)
def test_triton(pass_: str) -> None:
    """A template is rendered with the same values, whatever it is."""
    measured = TritonBackend().measuring()
    for recurrence, state_init, dtype in product(drawn.RECURRENCES, STATE_INITS, ("float32", "bfloat16")):
        grm = Problem(
            pass_=pass_, recurrence=recurrence, aggregation="grm", state_init=state_init, T=4096, H=4, Dk=128, Dv=128,
            segment_length=256, dtype=dtype,
        )  # fmt: skip
        soup, space, default = grm.replace(aggregation="soup"), measured.space(grm), spread.default(grm, HOPPER)
        names = [name for name in ("formulation", "gates") if name in default]
        for chosen in product(*(space.param(name).values for name in names)):
            config = default.replace(**dict(zip(names, chosen, strict=True)))
            assert space.valid(config, grm, HOPPER) == space.valid(config, soup, HOPPER)
            assert operations(grm, config) == operations(soup, config)
            for operation in operations(grm, config):
                assert values(operation, grm, config) == values(operation, soup, config)
