"""benchmarks/contact.py without a GPU: what stays of a step that fails, and every step rehearsed."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mctune.core.target import resolve
from mctune.report.write import read_document
from mctune.workers.hold import Held

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
MOST_FILES = 8


@pytest.fixture(scope="module")
def contact() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        before = set(sys.modules)
        import contact

        yield contact
        for name in set(sys.modules) - before:
            if name.startswith(("contact", "on_gpu")):
                del sys.modules[name]


@pytest.fixture
def guard(contact: ModuleType, tmp_path: Path) -> Any:
    return contact.Guard(contact.Facts(tmp_path), tmp_path / "log.txt", time.monotonic() + 600)


def outcomes(guard: Any) -> dict[str, str]:
    return {fact["step"]: fact["outcome"] for fact in guard.facts.of("step")}


def test_a_step_that_fails_leaves_its_facts_and_the_others(guard: Any) -> None:
    def telling(then: Callable[[], object]) -> Callable[[], object]:
        def step() -> None:
            guard.facts.add("any", "told", value=1)
            print("said")
            then()

        return step

    def wrong() -> None:
        raise ValueError("planted")

    def crash() -> None:
        faulthandler.disable()
        ctypes.string_at(0)

    for name, then in (
        ("good", lambda: None),
        ("raises", wrong),
        ("crashes", crash),
        ("exits", lambda: sys.exit(3)),
        ("hangs", lambda: time.sleep(60)),
    ):
        guard.run(name, telling(then), 2.0 if name == "hangs" else 60.0)
    assert outcomes(guard) == {
        "good": "ok", "raises": "raised", "crashes": "killed by SIGSEGV", "exits": "raised",
        "hangs": "not done after 2 s",
    }  # fmt: skip
    assert len(guard.facts.of("told")) == 5
    raised = guard.facts.of("raised", step="raises")[0]
    assert raised["error"] == "ValueError: planted" and 'raise ValueError("planted")' in raised["where"][-1]
    assert guard.log.read_text().count("said") == 5


def test_what_a_step_has_started_ends_with_it(guard: Any, tmp_path: Path) -> None:
    def step() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(60)

    running = guard.start("parent", step)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    running.stop("enough")
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    while status.exists() and "State:\tZ" not in status.read_text():
        time.sleep(0.05)
    assert outcomes(guard) == {"parent": "enough"}


def test_no_step_begins_after_the_deadline(contact: ModuleType, tmp_path: Path) -> None:
    late = contact.Guard(contact.Facts(tmp_path), tmp_path / "log.txt", time.monotonic() - 1)
    assert late.run("late", lambda: late.facts.add("late", "told"), 10.0) == "no time"
    assert not late.facts.of("told")


def test_a_line_that_was_cut_off_is_passed_over(contact: ModuleType, tmp_path: Path) -> None:
    facts = contact.Facts(tmp_path)
    facts.add("one", "told", value=float("nan"))
    with (tmp_path / "facts.jsonl").open("a") as file:
        file.write('{"at": 1, "step": "cut')
    assert len(facts.of("told")) == 1
    with (tmp_path / "facts.jsonl").open("a") as file:
        file.write("\n")
    facts.add("two", "told", value=2)
    assert [fact["step"] for fact in facts.of("told")] == ["one", "two"]


def test_a_kernel_is_compiled_once_whoever_dies(contact: ModuleType, tmp_path: Path) -> None:
    ahead = sys.modules["contact_ahead"]
    facts, kernel = contact.Facts(tmp_path / "out"), {"key": "k", "fn": SimpleNamespace(module="m", name="n")}
    first, second = (ahead.Claims(tmp_path / "claims", facts, "ahead") for _ in range(2))
    assert not first.skip(**kernel) and second.skip(**kernel)
    waiting = ahead.Claims(tmp_path / "claims", facts, "wait", time.monotonic() + 60)
    first.done(**kernel)
    assert waiting.skip(**kernel)
    # Left by a process that is gone.
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (place,) = (path for path in (tmp_path / "claims").iterdir() if not path.suffix)
    place.write_text(str(gone.pid))
    place.with_suffix(".done").unlink()
    assert not second.skip(**kernel)
    assert [fact["kernel"] for fact in facts.of("compiled")] == ["n"]


@pytest.mark.parametrize("aggregation", ["grm", "residual", "ssc"])
def test_every_form_is_tried_on_all_kernels_and_on_each(contact: ModuleType, tmp_path: Path, aggregation: str) -> None:
    diagnose, kernels_of = sys.modules["contact_diagnose"], sys.modules["contact_kernels"]
    target = resolve("h100-sxm")[0]
    kernels = kernels_of.Kernels(tmp_path, target, kernels_of.Sizes())
    whole = {trial.form: trial for trial in diagnose.trials(kernels, aggregation, diagnose.FORMS, None)}
    assert {"warps", "stages", "mma"} <= set(whole) <= set(diagnose.FORMS)
    # By default gated rows wait in shared memory already.
    assert "operand" not in whole
    for pass_, config in whole["warps"].configs.items():
        assert all(config.integer(name) <= 4 for name in config if name.endswith("_num_warps")), pass_
    assert whole["mma"].variables == {"DISABLE_MMA_V3": "1"}
    each = diagnose.trials(kernels, aggregation, ("warps", "stages"), None, each=True)
    assert {trial.only for trial in each} >= {"states", "read", "dq", "dstates", "dkv"}
    names = [str(trial) for trial in (*whole.values(), *each)]
    assert len(set(names)) == len(names)
    # A step waits for the jobs whose names begin with its own.
    assert not [(a, b) for a in names for b in names if a != b and b.startswith(a)]


def test_the_search_for_a_wrong_kernel_goes_on_with_the_forms_that_help(contact: ModuleType, tmp_path: Path) -> None:
    diagnose, kernels_of = sys.modules["contact_diagnose"], sys.modules["contact_kernels"]
    facts, compiled, asked = contact.Facts(tmp_path / "out"), [], []
    kernels = kernels_of.Kernels(tmp_path, resolve("h100-sxm")[0], kernels_of.Sizes())
    steps = SimpleNamespace(kernels=kernels, sizes=kernels.sizes)

    def step(name: str, function: Callable[[], object], limit_s: float) -> str:
        asked.append(name)
        right = "stages" in name and ("of" not in name or "dstates" in name)
        facts.add(name, "form", aggregation="grm", form="x", only=None, right=right, equal=right, wrong={})
        return "ok"

    diagnose.Search(steps, facts, tmp_path, step, compiled.extend, lambda starts, limit_s: None,
                    time.monotonic() + 60).run("grm")  # fmt: skip
    assert {"watch grm", "watch grm by mma.sync", "form warps grm", "form stages grm"} <= set(asked)
    single = [name for name in asked if " of " in name]
    assert {"form stages of dstates grm", "form stages of read grm"} <= set(single)
    assert all(name.startswith("form stages of") for name in single)
    assert {job.name for job in compiled} == {f"{name} {pass_}" for name in asked if "form" in name
                                              for pass_ in ("forward", "backward")}  # fmt: skip


def test_rehearsal(tmp_path: Path) -> None:
    """A minute of one core: every step in a process of its own, which interprets or compiles what it needs anew."""
    out = tmp_path / "out"
    command = [sys.executable, str(BENCHMARKS / "contact.py"), "--rehearse", "--minutes", "9", "--work",
               str(tmp_path / "work"), "--wheels", str(tmp_path)]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "OUT": str(out)}, timeout=540)
    facts = [json.loads(line) for line in (out / "facts.jsonl").read_text().splitlines()]
    steps = {fact["step"]: fact["outcome"] for fact in facts if fact["fact"] == "step"}
    lost = {name: outcome for name, outcome in steps.items() if outcome != "ok"}
    assert done.returncode == 0 and not lost, done.stdout + (out / "log.txt").read_text()[-3000:]
    compared = {"compare grm", "compare residual", "compare ssc", "decode", "variant", "tvm"}
    assert compared | {"machine", "device", "prepare grm", "prepare decode", "predict", "verify"} <= set(steps)
    assert {name for name in steps if name.startswith("time ")} == {
        "time grm 24", "time residual 24", "time ssc 40", "time residual 40"
    }  # fmt: skip

    def of(fact: str) -> list[dict[str, Any]]:
        return [line for line in facts if line["fact"] == fact]

    assert {fact["step"] for fact in of("compared")} == compared and all(fact["right"] for fact in of("compared"))
    assert {f["tensor"] for f in of("compared") if f["step"] == "compare ssc"} == {"y", "dq", "dk", "dv", "du"}
    assert len([fact for fact in of("repeats") if fact["step"].startswith("compare")]) == 3
    kinds = {f["aggregation"] for f in of("compared") if f["step"] == "tvm"}
    assert kinds == {"tvm m16n8k16"}
    assert all(fact["equal"] for fact in of("repeats"))
    # Compiled for the absent GPU while other processes interpreted.
    compiled = {fact["kernel"] for fact in of("compiled")}
    assert {"local_kernel", "gates_kernel", "read_gated_kernel", "step_kernel"} <= compiled
    assert all(fact["registers"] > 0 for fact in of("kernel")) and of("predicted")[0]["us"] > 0
    assert {f["part"] for f in of("timed")} == {"forward", "backward", "training", "decode"}
    # The files that come back; the table is last.
    assert {path.name for path in out.iterdir()} == {
        "facts.jsonl", "contact.txt", "rows.json", "held.jsonl", "log.txt"
    } and len(list(out.iterdir())) <= MOST_FILES  # fmt: skip
    table = (out / "contact.txt").read_text()
    assert done.stdout.endswith(f"{table}\n") and "a rehearsal" in table and "bitwise equal" in table
    rows = read_document(out / "rows.json").rows
    assert {row.problem.pass_ for row in rows} == {"forward", "backward", "decode"}
    assert all(row.how == "measured" for row in rows) and {row.backend for row in rows} == {"triton", "tvm"}
    held = [json.loads(line) for line in (out / "held.jsonl").read_text().splitlines()]
    assert [Held.from_dict({k: v for k, v in line.items() if k != "backend"}).failure for line in held] == [""]
    assert not (tmp_path / "work" / "contact").exists() and not list((tmp_path / "work").glob("contact_*"))
