"""Operations of a CPU's pass are compiled once each, whatever the others are."""

from __future__ import annotations

from pathlib import Path

import pytest

from mctune.backends.protocol import OperationError
from mctune.backends.tvm import TvmBackend, objects
from mctune.core.problem import Problem
from tests.draw import host


def test_a_candidate_that_differs_in_one_operation_compiles_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(pass_="backward", aggregation="mean", T=64, H=1, Dk=16, Dv=16, segment_length=32)
    backend, target = TvmBackend(), host()
    space = backend.space(problem)
    config = space.first_valid(lambda one: space.valid(one, problem, target))
    assert config is not None
    built = backend.build(problem, config, target, tmp_path)
    before = set(tmp_path.glob("*.o"))
    assert len(before) == 4
    changed = config.replace(dkv_unroll=2 if config["dkv_unroll"] == 1 else 1)
    other = backend.build(problem, changed, target, tmp_path)
    (new,) = set(tmp_path.glob("*.o")) - before
    assert new.name.startswith("write_backward_") and other.library != built.library
    text = other.source.read_text()
    assert all(f"def {name}(" in text for name in ("segment_states", "read_backward", "write_backward"))
    assert backend.build(problem, config, target, tmp_path) == built

    def refuses(operation: str, *arguments: object) -> object:
        raise ValueError("no such tile")

    monkeypatch.setattr(objects, "function_of", refuses)
    with pytest.raises(OperationError, match="state_backward"):
        backend.build(problem, config.replace(dstates_chunk=256), target, tmp_path)


def test_an_earlier_configuration_means_the_same_tiles() -> None:
    problem = Problem(pass_="backward", aggregation="grm", T=64, H=1, Dk=64, Dv=64, segment_length=64)
    space = TvmBackend().space(problem)
    new = space.first_valid(lambda one: space.valid(one, problem, host()))
    assert new is not None
    values = new.to_dict()
    earlier = {space.renamed.get(name, name): value for name, value in values.items()}
    assert "dq_rows" not in earlier and "key_cols" in earlier
    alike = new.replace(**{now: earlier[old] for now, old in space.renamed.items()})
    assert space.checked(type(new).of(earlier), problem, host()) == alike
