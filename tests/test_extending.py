"""A new aggregation that combines known traits is a row, a line of the oracle, and nothing else: two are added here."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from mctune import reference
from mctune.backends import get_backend
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.reference.aggregation import GAMMA
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.traits import AGGREGATIONS, RECURRENCES, Aggregation
from mctune.verify.judge import decided_inputs, run_kernel, tolerance, verify_case

Tensor = torch.Tensor
ROOT = Path(__file__).resolve().parents[1]


def average(logits: Tensor, top_k: int | None) -> Tensor:
    """1/s, of what the memories answer: ``mean`` is of their parameters."""
    return torch.full_like(logits, 1 / logits.shape[1])


def sparse_soup(logits: Tensor, top_k: int | None) -> Tensor:
    """A soup of the online memory and of the ``top_k`` cached ones of largest logit."""
    cached = logits[:, :-1]
    if top_k is not None and cached.shape[1] > top_k:
        least = cached.topk(top_k, dim=1).values[:, -1:]
        logits = torch.cat((cached.masked_fill(cached < least, -torch.inf), logits[:, -1:]), 1)
    return logits.softmax(1)


TOYS: dict[str, tuple[Aggregation, Callable[[Tensor, int | None], Tensor]]] = {
    "average": (Aggregation("average", averages=True), average),
    "sparse_soup": (Aggregation("sparse_soup", routed=True, sparse=True, mixes_parameters=True), sparse_soup),
}


@pytest.fixture(params=TOYS)
def toy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an aggregation that exists for one test."""
    row, formula = TOYS[request.param]
    monkeypatch.setitem(AGGREGATIONS, row.name, row)
    monkeypatch.setitem(GAMMA, row.name, formula)
    yield row.name


@pytest.mark.parametrize(("recurrence", "state_init"), list(product(("linear", "dla"), ("independent", "checkpoint"))))
def test_the_eager_path_computes_it(toy: str, recurrence: str, state_init: str) -> None:
    problem = Problem(
        aggregation=toy, recurrence=recurrence, state_init=state_init, T=23, B=2, H=2, Dk=4, Dv=4, segment_length=5
    )
    inputs = decided_inputs(problem, 0)
    arguments = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.arguments(problem).items()
    }
    torch.testing.assert_close(
        memory_caching(**arguments, backend="eager"), reference.memory_caching(**arguments), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("pass_", ("forward", "decode"))
def test_a_kernel_of_templates_as_they_are_computes_it(toy: str, pass_: str, tmp_path: Path) -> None:
    problem = Problem(aggregation=toy, pass_=pass_, T=41, H=2, Dk=8, Dv=12, segment_length=8)
    backend, (target, _) = get_backend("tvm"), resolve("cpu")
    space = backend.space(problem)
    config = space.first_valid(lambda one: space.valid(one, problem, target))
    assert config is not None
    kernel = backend.load(problem, config, backend.build(problem, config, target, tmp_path))
    assert verify_case(partial(run_kernel, kernel), problem, 0) <= tolerance(problem)


def names_in(path: Path) -> set[str]:
    """The aggregations and recurrences that a module names, other than as the default of an argument or a field."""
    tree, defaults = ast.parse(path.read_text(encoding="utf-8")), set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            defaults |= {id(default) for default in (*node.args.defaults, *node.args.kw_defaults)}
        elif isinstance(node, ast.AnnAssign):
            defaults.add(id(node.value))
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in defaults]
    return {node.value for node in constants if isinstance(node.value, str)} & {*AGGREGATIONS, *RECURRENCES}


def test_only_the_files_of_the_page_name_one() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8").split("## Where an aggregation")[1]
    listed = set(re.findall(r"`(mctune/[\w/]+\.py)`", page))
    sources = [path for room in ("mctune", "templates", "search_spaces") for path in (ROOT / room).rglob("*.py")]
    assert listed == {path.relative_to(ROOT).as_posix() for path in sources if names_in(path)}
