"""Kernels and launchers agree on the arguments: one table of names, which builds are held to."""

from __future__ import annotations

import pytest

from mctune.backends.spaces import load_space
from mctune.backends.tvm import templates
from mctune.core.problem import PASSES, Problem
from mctune.runtime.kernels.tvm.arguments import ARGUMENTS, launch
from tests.draw import host


def problem(pass_: str, recurrence: str) -> Problem:
    return Problem(pass_=pass_, recurrence=recurrence, aggregation="ssc", T=64, H=1, Dk=16, Dv=16, segment_length=16)


@pytest.mark.parametrize("recurrence", ("linear", "titans"))
@pytest.mark.parametrize("pass_", PASSES)
def test_a_build_is_refused_whose_arguments_are_in_another_order(
    pass_: str, recurrence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = problem(pass_, recurrence)
    space = load_space("tvm", one.writes.family, pass_)
    config = space.first_valid(lambda c: space.valid(c, one, host()))
    assert config is not None
    built = {variable.name_hint: f for variable, f in templates.render(one, config, host()).functions.items()}
    assert set(built) <= set(templates.OPERATIONS[one.writes.family, pass_])
    for operation, function in built.items():
        templates.check_arguments(operation, function)
        first, second, *rest = ARGUMENTS[operation]
        said = f"{operation} takes {first}, {second}, .* is passed {second}, {first}, "
        monkeypatch.setitem(ARGUMENTS, operation, (second, first, *rest))
        with pytest.raises(TypeError, match=said):
            templates.check_arguments(operation, function)
        # A render stops at its first template.
        if operation == templates.OPERATIONS[one.writes.family, pass_][0]:
            with pytest.raises(TypeError, match=said):
                templates.render(one, config, host())
        monkeypatch.undo()


def test_values_are_passed_by_name_in_the_kernels_order() -> None:
    names = ARGUMENTS["decode_step"]
    values = {name: name.upper() for name in sorted(names)} | {"more": "than it takes"}
    passed: list[str] = []
    launch("decode_step", lambda *arguments: passed.extend(arguments), values)
    assert passed == [name.upper() for name in names]
    del values["key_sum"]
    with pytest.raises(KeyError, match="key_sum"):
        launch("decode_step", lambda *arguments: None, values)


def test_a_name_is_taken_once() -> None:
    for names in ARGUMENTS.values():
        assert len(set(names)) == len(names)
