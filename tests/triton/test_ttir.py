"""A rendered module and its template are one program: they launch kernels of the same TTIR, on the same grids.

Rendering drops arguments that a kernel does not use. Its template is given None for those, so that Triton drops them
too, and would refuse to compile or compile something else if they were used.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest

from mctune.backends.triton.backend import LAUNCHERS, TritonBackend
from mctune.backends.triton.calls import call_on_meta
from mctune.backends.triton.device import VirtualDevice
from mctune.backends.triton.templates import PREFIXES, SHARED, operations, values, write_parts
from mctune.core.config import Config
from mctune.core.paths import templates_dir
from mctune.core.problem import AGGREGATIONS, PASSES, RECURRENCES, STATE_INITS, Problem
from mctune.core.target import resolve
from mctune.runtime.kernels.triton.loader import load_parts
from mctune.verify.spread import draw_specialized, recurrences

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets Triton kernels", allow_module_level=True)

TARGET, _ = resolve("h100-sxm")
TEMPLATES = templates_dir() / "triton"
C = 128


class Case(NamedTuple):
    """A problem, and a configuration of its templates."""

    problem: Problem
    config: Config

    def __str__(self) -> str:
        p = self.problem
        chosen = [str(value) for _, value in self.config.items if isinstance(value, str)]
        sizes = [p.dtype, *chosen, *([f"piece{self.config['piece']}"] if "piece" in self.config else [])]
        return "-".join([p.pass_, p.recurrence, p.aggregation, p.state_init, *sizes])


class Launch(NamedTuple):
    """A kernel as it was launched."""

    name: str
    grid: tuple[int, ...]
    warps: int
    stages: int
    ttir: str


class Recorder:
    """Launches compile to TTIR only; where ``known`` names the arguments of a launch, others are None."""

    def __init__(self, known: Sequence[set[str]] | None = None) -> None:
        self.known = known
        self.launches: list[Launch] = []
        self.arguments: list[set[str]] = []

    def calls(self, monkeypatch: pytest.MonkeyPatch, problem: Problem, kernel: Any) -> None:
        from triton.runtime.jit import JITFunction

        run = JITFunction.run

        def compile_(function: Any, key: Any, signature: Any, device: Any, constexprs: Any, *rest: Any) -> None:
            options, attrs, _ = rest
            ttir = to_ttir(function, signature, constexprs, options, attrs)
            name, grid = function.fn.__name__, tuple(self.grid)
            self.launches.append(Launch(name, grid, options.num_warps, options.num_stages, ttir))

        def recorded(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            assert not args, "kernels are launched by keyword"
            self.arguments.append(set(function.arg_names))
            constexprs = {param.name for param in function.params if param.is_constexpr}
            if self.known is not None:
                unused = set(function.arg_names) - constexprs - self.known[len(self.arguments) - 1]
                kwargs = {key: None if key in unused else value for key, value in kwargs.items()}
            self.grid = grid(kwargs) if callable(grid) else grid
            return run(function, grid=grid, warmup=warmup, **kwargs)

        with monkeypatch.context() as patch, VirtualDevice(TARGET):
            patch.setattr(JITFunction, "run", recorded)
            patch.setattr(JITFunction, "_do_compile", compile_)
            call_on_meta(problem, kernel)


def to_ttir(function: Any, signature: Any, constexprs: Any, options: Any, attrs: Any) -> str:
    """As ``triton.compile`` begins."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend
    from triton.runtime import driver

    target = driver.active.get_current_target()
    backend = make_backend(target)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = function.ASTSource(function, signature, constexprs, attrs)
    codegen = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, codegen, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    # Gluon compiles to TTGIR, where calls may still name the file of their callee.
    first: str = next(iter(stages.values()))(module, {}).str_nodebug()
    return re.sub(r"_mctune_kernels_\w+\.\w+\.", "", first)


def unrendered(operation: str, given: Mapping[str, Any]) -> SimpleNamespace:
    """A template whose functions are given what rendering sets."""
    (file,) = TEMPLATES.glob(f"*/{operation}.py")
    module: ModuleType = load_parts(file.parent, {operation: file.name})[operation]
    wrappers = {
        name: x for name, x in inspect.getmembers(module, inspect.isfunction) if x.__module__ == module.__name__
    }
    bound = {
        name: partial(x, **{key: given[key] for key in inspect.signature(x).parameters.keys() & given.keys()})
        for name, x in wrappers.items()
    }
    return SimpleNamespace(**bound)


def problems(pass_: str) -> Iterator[Problem]:
    """Every combination of what a problem decides."""
    for recurrence, aggregation, dtype, state_init in product(
        ("linear", "swla"), ("residual", "mean", "grm", "ssc"), ("bfloat16", "float32"), STATE_INITS
    ):
        yield Problem(
            recurrence=recurrence, aggregation=aggregation, state_init=state_init, pass_=pass_, B=2, T=3 * C, H=2,
            Dk=64, Dv=48, segment_length=C, dtype=dtype, top_k=2 if aggregation == "ssc" else None,
        )  # fmt: skip
    for recurrence, aggregation, dtype, state_init in product(
        (name for name in recurrences(pass_) if RECURRENCES[name].deep), AGGREGATIONS, ("bfloat16", "float32"),
        STATE_INITS,
    ):  # fmt: skip
        yield Problem(
            recurrence=recurrence, aggregation=aggregation, state_init=state_init, pass_=pass_, B=2, T=3 * C, H=2,
            Dk=32, Dv=32 if aggregation in ("grm", "soup") else 48, expansion=3, segment_length=C, dtype=dtype,
            top_k=2 if aggregation == "ssc" else None,
        )  # fmt: skip


def configs(problem: Problem) -> Iterator[Config]:
    """Every combination of what a configuration chooses by name, segments in one piece and in two."""
    space = TritonBackend().space(problem)
    default = space.first_valid(lambda config: space.valid(config, problem, TARGET))
    assert default is not None, problem
    choices = {param.name: param.values for param in space.params if isinstance(param.values[0], str | bool)}
    if "piece" in default:
        choices["piece"] = (C // 2, C)
    seen = set()
    for chosen in product(*choices.values()):
        config = default.replace(**dict(zip(choices, chosen, strict=True)))
        if "read_BT" in config and "piece" in config:
            config = config.replace(read_BT=min(config.integer("read_BT"), config.integer("piece")))
        if space.valid(config, problem, TARGET) and config not in seen:
            seen.add(config)
            yield config


def corners(problem: Problem) -> Iterator[Config]:
    """The default with every number at its least and its greatest value, as far as the constraints allow."""
    space = TritonBackend().space(problem)
    default = space.first_valid(lambda config: space.valid(config, problem, TARGET))
    assert default is not None, problem
    for param in space.params:
        for value in (param.values[0], param.values[-1]):
            config = default.replace(**{param.name: value})
            if space.valid(config, problem, TARGET):
                yield config


ALL = [
    *(Case(problem, config) for pass_ in PASSES for problem in problems(pass_) for config in configs(problem)),
    *(Case(one.problem, one.config) for one in draw_specialized(TARGET)),
]


def met(case: Case) -> frozenset[tuple[Any, ...]]:
    """What of its templates a case meets: every flag's value, and those of recurrence and aggregation together."""
    problem, config = case
    found: set[tuple[Any, ...]] = {(problem.pass_, problem.recurrence, problem.aggregation)}
    for operation in operations(problem, config):
        flags = {k: v for k, v in values(operation, problem, config).items() if isinstance(v, bool | str)}
        found |= {(operation, *flag) for flag in flags.items()}
        found |= {(operation, "whole", "piece" not in config or config["piece"] == C)}
    return frozenset(found)


def spread() -> list[Case]:
    """Cases that meet together what all of them meet."""
    every = {case: met(case) for case in ALL}
    left = frozenset().union(*every.values())
    chosen = []
    while left:
        best = max(every, key=lambda case: len(every[case] & left))
        chosen.append(best)
        left -= every[best]
    return chosen


def compare(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, config = case
    parts: Mapping[str, Any] = dict(write_parts(problem, config, folder))
    record = {"problem": problem.to_dict(), "config": config.to_dict(), "parts": parts}
    launcher = LAUNCHERS[problem.writes.family, problem.pass_]
    rendered = Recorder()
    rendered.calls(monkeypatch, problem, launcher(folder / "kernel", record))
    template = Recorder(rendered.arguments)
    parts = {name: unrendered(name, values(name, problem, config)) for name in operations(problem, config)}
    template.calls(monkeypatch, problem, launcher(folder / "kernel", record, parts))
    assert rendered.launches
    assert [(x.name, x.grid) for x in rendered.launches] == [(x.name, x.grid) for x in template.launches]
    for ours, theirs in zip(rendered.launches, template.launches, strict=True):
        assert ours == theirs


def test_every_template_is_compared() -> None:
    used = {operation for case in ALL for operation in operations(case.problem, case.config)}
    assert used == set(PREFIXES) == {path.stem for path in TEMPLATES.glob("*/*.py")} - {*SHARED}


@pytest.mark.parametrize("case", spread(), ids=str)
def test_rendered_and_template_have_the_same_ttir(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(case, tmp_path, monkeypatch)


def test_another_flag_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison tells programs apart."""
    case = next(case for case in ALL if case.problem.dtype == "float32" and case.config["precision"] == "ieee")
    own = values
    monkeypatch.setitem(globals(), "values", lambda *of: {**own(*of), "PRECISION": "tf32"})
    with pytest.raises(AssertionError, match="ttir"):
        compare(case, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("pass_", PASSES)
def test_all_of_them_have_the_same_ttir(pass_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in ALL:
        if case.problem.pass_ == pass_:
            compare(case, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("pass_", PASSES)
def test_numbers_do_not_change_that(pass_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for problem in list(problems(pass_))[::5]:
        for config in corners(problem):
            compare(Case(problem, config), tmp_path, monkeypatch)
