"""Candidates for an absent GPU: refused by the compiler, wrong, crashed, and predicted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mctune.backends.spaces import load_space
from mctune.core.config import Config
from mctune.core.outcome import FailedBuild, Outcome, Predicted, TooLarge, Wrong, describe, from_json
from mctune.core.problem import Problem
from mctune.verify.inputs import odd_problems
from mctune.verify.judge import load_cases
from mctune.workers.evaluate import Prepared
from mctune.workers.worker import Worker, WorkerDied, WorkerTimedOut

PLANTED = Path(__file__).parent.parent / "planted"
PROBLEM = Problem(aggregation="mean", T=256, H=2, Dk=16, Dv=16, segment_length=32, dtype="float16")
WIDE = Problem(aggregation="mean", T=4096, H=2, Dk=256, Dv=256, segment_length=256, dtype="bfloat16")
CONFIG = load_space("triton", "matrix", "forward").default.replace(formulation="summed", piece=32, read_BT=32)
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLANTED))
        folder = tmp_path_factory.mktemp("candidates")
        patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        yield {"backend": "faulty_triton:FaultyBackend", "target": "rtx3090", "folder": str(folder), "seed": 0}


@pytest.fixture(scope="module")
def compiler(setup: dict[str, Any]) -> Iterator[Worker]:
    with Worker("mctune.workers.predicted:start", setup) as running:
        yield running


@pytest.fixture(scope="module")
def checker(setup: dict[str, Any]) -> Iterator[Worker]:
    with Worker("mctune.workers.predicted:start", setup, env={"TRITON_INTERPRET": "1"}) as running:
        yield running


def ask(
    worker: Worker, what: str, fault: str, *, limit_s: float = LIMIT_S, problem: Problem = PROBLEM,
    config: Config = CONFIG,
) -> Outcome | WorkerDied | WorkerTimedOut:  # fmt: skip
    candidate = {"problem": problem.to_dict(), "config": config.replace(fault=fault).to_dict()}
    reply = worker.call({what: candidate}, limit_s)
    return from_json(reply["outcome"]) if isinstance(reply, dict) else reply


def test_a_right_candidate_is_predicted_then_verified(compiler: Worker, checker: Worker) -> None:
    outcome = ask(compiler, "evaluate", "none")
    assert isinstance(outcome, Predicted) and outcome.ms > 0 and outcome.error is None
    assert describe(outcome).startswith("predicted ")
    verified = ask(checker, "verify", "none")
    assert isinstance(verified, Predicted) and verified.error is not None and 0 < verified.error < 2e-3


def test_a_prepared_candidate_has_everything_compiled_that_judging_it_takes(
    compiler: Worker, setup: dict[str, Any], tmp_path: Path
) -> None:
    def kernels() -> int:
        return len(list((Path(setup["folder"]) / "triton").rglob("*.cubin")))

    # A single token is in one piece, which has kernels of its own.
    config = CONFIG.replace(piece=16, read_BT=16, read_num_warps=2, states_num_warps=4)
    assert isinstance(ask(compiler, "evaluate", "none", config=config), Predicted)
    before = kernels()
    candidate = {"problem": PROBLEM.to_dict(), "config": config.replace(fault="none").to_dict()}
    cases = []
    for again in (False, False, True):
        file = tmp_path / "cases.pt"
        reply = compiler.call({"prepare": candidate, "into": str(file), "again": again}, LIMIT_S)
        assert isinstance(reply, dict) and reply["ready"]
        assert Path(reply["built"]["library"]).is_file() and Prepared.of(reply).built is not None
        cases.append(load_cases(str(file)))
    assert kernels() > before
    assert [case.problem for case in cases[0]] == list(odd_problems(PROBLEM))
    same, other = (bool((cases[0][1].inputs.q == one[1].inputs.q).all()) for one in cases[1:])
    assert same and not other


@pytest.mark.parametrize("fault", ["wrong", "unwritten"])
def test_a_wrong_candidate_compiles_and_is_found_out(compiler: Worker, checker: Worker, fault: str) -> None:
    assert isinstance(ask(compiler, "evaluate", fault), Predicted)
    outcome = ask(checker, "verify", fault)
    assert isinstance(outcome, Wrong) and not outcome.error <= outcome.tolerance


def test_a_candidate_that_overwrites_its_inputs_is_found_out(checker: Worker) -> None:
    outcome = ask(checker, "verify", "overwrites")
    assert isinstance(outcome, Wrong) and outcome.case.endswith("it wrote to its input v")


def test_what_exceeds_the_target_says_by_how_much(compiler: Worker) -> None:
    config = CONFIG.replace(piece=256, read_BT=128)
    outcome = ask(compiler, "evaluate", "none", problem=WIDE, config=config)
    assert isinstance(outcome, TooLarge) and outcome.need > outcome.limit == 101376
    assert f"needs {outcome.need} B of shared memory, a block has 101376" in outcome.message


def test_what_the_space_excludes_is_not_built(compiler: Worker) -> None:
    outcome = ask(compiler, "evaluate", "none", config=CONFIG.replace(formulation="grouped"))
    assert isinstance(outcome, FailedBuild) and "the aggregation has no such formulation" in outcome.message


def test_a_template_that_raises_hangs_or_kills_its_process(compiler: Worker) -> None:
    outcome = ask(compiler, "evaluate", "raises")
    assert isinstance(outcome, FailedBuild) and outcome.message == "ValueError: refuses this"
    hung = ask(compiler, "evaluate", "hangs", limit_s=2.0)
    assert isinstance(hung, WorkerTimedOut) and hung.seconds == 2.0
    assert isinstance(ask(compiler, "evaluate", "aborts"), WorkerDied)
    assert isinstance(ask(compiler, "evaluate", "none"), Predicted)
