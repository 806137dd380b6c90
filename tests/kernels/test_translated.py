"""TVMScript of templates, translated: the IR is that of TVM's own parser, and errors name lines of the template."""

from __future__ import annotations

import importlib
import random
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tvm

from mctune.backends.tvm import TvmBackend, templates
from mctune.backends.tvm.gpu.backend import TvmGpuBackend
from mctune.backends.tvm.gpu.operations import build_kernels, operations
from mctune.core.config import Config
from mctune.core.problem import AGGREGATIONS, PASSES, RECURRENCES, Problem
from mctune.core.target import Target, resolve
from tests.draw import host
from tests.parsed_by_tvm import parsed_by_tvm

FRESH = [pytest.param(None, marks=pytest.mark.slow, id=f"any-{n}") for n in range(20)]
MATRIX = tuple(name for name, recurrence in RECURRENCES.items() if not recurrence.deep)
DEEP = tuple(name for name, recurrence in RECURRENCES.items() if recurrence.deep)


def drawn(source: random.Random, backend: Any, target: Target, pass_: str, recurrences: tuple[str, ...]) -> Any:
    """A problem that there is a template for, and a configuration a random walk away from the default."""
    pick = source.choice
    while True:
        recurrence, aggregation = pick(recurrences), pick(list(AGGREGATIONS))
        widths = (7, 16, 25) if RECURRENCES[recurrence].deep else (7, 16, 25, 40, 64)
        Dk = pick(widths)
        problem = Problem(
            pass_=pass_, recurrence=recurrence, aggregation=aggregation, T=128, H=2, Dk=Dk, Dv=pick((Dk, *widths)),
            state_init=pick(("independent", "checkpoint")), segment_length=pick((24, 64, 100)),
            top_k=pick((1, 2, 3)) if AGGREGATIONS[aggregation].sparse else None,
            expansion=pick((1, 2, 3)) if RECURRENCES[recurrence].deep else None,
        )  # fmt: skip
        if not backend.supports(problem, target):
            continue
        space = backend.space(problem)
        config = space.first_valid(lambda one, p=problem, s=space: s.valid(one, p, target))
        if config is not None:
            break
    for param in source.sample(space.params, len(space.params)):
        changed = config.replace(**{param.name: pick(param.values)})
        config = changed if space.valid(changed, problem, target) else config
    return problem, config


def hold_same(ours: Any, parsed: Any, *told: Any) -> None:
    tvm.ir.assert_structural_equal(ours, parsed, map_free_vars=True)
    # Names as well, which are the exported source's.
    assert ours.script() == parsed.script(), told


def hold_render(problem: Problem, config: Config, *told: Any) -> None:
    padded = TvmBackend().padded(problem)
    ours = templates.render(padded, config, host())
    with parsed_by_tvm():
        parsed = templates.render(padded, config, host())
    hold_same(ours, parsed, problem, config, *told)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("seed", [0, 1, 2, *FRESH])
def test_matrix_memories_have_the_same_ir(seed: int | None, pass_: str) -> None:
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    hold_render(*drawn(random.Random(seed), TvmBackend(), host(), pass_, MATRIX), seed)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("seed", [0, *FRESH])
def test_deep_memories_have_the_same_ir(seed: int | None, pass_: str) -> None:
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    hold_render(*drawn(random.Random(seed), TvmBackend(), host(), pass_, DEEP), seed)


@pytest.mark.parametrize("pass_", PASSES)
@pytest.mark.parametrize("gpu", ["v100", "t4", "a100"])
@pytest.mark.parametrize("seed", [0, *FRESH[:4]])
def test_kernels_of_gpus_have_the_same_ir(seed: int | None, gpu: str, pass_: str) -> None:
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    target = resolve(gpu)[0]
    problem, config = drawn(random.Random(seed), TvmGpuBackend(), target, pass_, MATRIX)
    for operation in operations(problem):
        ours = build_kernels(operation, problem, config, target)
        with parsed_by_tvm():
            parsed = build_kernels(operation, problem, config, target)
        for one, other in zip(ours, parsed, strict=True):
            hold_same(one.function, other.function, seed, problem, config)


# --- what is said of mistakes


HEAD = """
from mctune_templates.tvm.kernel import emit, f32, inline, prim_func, sizes
from tvm.script import tirx as T

def build(steps=3):
    n = sizes("R")
    def body(x):
        y, R = x.y, n.R
        @emit
        def step():
"""
TAIL = """
    return prim_func("step", dict(y=f32(n.R, 16), R=n.R), sizes(), body)
"""


def template(folder: Path, statements: str) -> ModuleType:
    """A template whose step is these statements; their first line is line 11."""
    templates.templates_package()
    path = folder / "template.py"
    lines = "\n".join(" " * 12 + line for line in statements.splitlines())
    path.write_text(HEAD + lines + TAIL)
    spec = importlib.util.spec_from_file_location(f"template_{abs(hash(str(folder)))}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("statements", "line", "said"),
    [
        ("while R > 0:\n    y[0, 0] = T.float32(0)", 11, "has no While"),
        ("for r in range(R):\n    for r in range(R):\n        y[r, 0] = T.float32(0)", 12, "binds r twice"),
        ("for r, s in T.grid(R, R):\n    y[r, s] = T.float32(0)", 11, "one name"),
        ("y[0, 0] = T.float32(0)\ny[0, 0] += T.float32(1)", 12, "has no AugAssign"),
        ("j: T.int32 = R", 11, "annotates with T.let alone"),
        ("if 0 < R < 2:\n    y[0, 0] = T.float32(0)", 11, "compares two values"),
    ],
)
def test_what_templates_do_not_speak_is_refused_with_its_line(
    statements: str, line: int, said: str, tmp_path: Path
) -> None:
    with pytest.raises(SyntaxError, match=said) as caught:
        template(tmp_path, statements).build()
    assert (caught.value.filename, caught.value.lineno) == (str(tmp_path / "template.py"), line)
    assert (caught.value.text or "").strip() == statements.splitlines()[line - 11].strip()


@pytest.mark.parametrize(
    ("statements", "line", "error", "said"),
    [
        ("for r in range(R):\n    y[r, 0] = z", 12, NameError, "z"),
        ("for r in steps:\n    y[r, 0] = T.float32(0)", 11, TypeError, "a loop is over range"),
        ("if steps:\n    y[0, 0] = T.float32(0)", 11, TypeError, "a condition is a bool"),
        ("j = R + 1\ny[j, 0] = T.float32(0)", 11, TypeError, "a value is j: T.let"),
        ("y[0, 0] = T.float32(0)\nsteps", 12, TypeError, "a statement is a call"),
        ("y[0, 0] = T.float32(1 if steps else 0)", 11, TypeError, "a condition is a bool"),
        ("y[0, 0] = T.float32(0)\ny[R, 0].no", 12, AttributeError, "no"),
    ],
)
def test_an_error_is_at_its_line(statements: str, line: int, error: type, said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said) as caught:
        template(tmp_path, statements).build()
    places = [(one.filename, one.lineno) for one in traceback.extract_tb(caught.value.__traceback__)]
    assert (str(tmp_path / "template.py"), line) in places


def test_a_loop_s_variable_is_not_known_after_it(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="r"):
        template(tmp_path, "for r in range(R):\n    y[r, 0] = T.float32(0)\ny[r, 1] = T.float32(0)").build()


def test_a_function_is_translated_once_and_closes_over_its_own_values(tmp_path: Path) -> None:
    made = template(tmp_path, "for r in range(R):\n    y[r, 0] = T.float32(steps)")
    assert "float32(3.0)" in made.build().script() and "float32(5.0)" in made.build(5).script()
