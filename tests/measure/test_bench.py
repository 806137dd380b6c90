"""Side-by-side timing: what is checked, what is left out, the arithmetic, the documents. Tiny shapes, one round."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mctune.backends.tvm import TvmBackend
from mctune.cli import main
from mctune.core.config import Config
from mctune.core.errors import MctuneError, UsageError
from mctune.core.outcome import Timed
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.core.winner import Winner
from mctune.core.work import work
from mctune.core.workload import Case, Workload
from mctune.emit.package import emit_package
from mctune.measure import bench
from mctune.measure.bench import Contender, Rates, Result, eager, measure
from mctune.measure.documents import document
from mctune.report.rows import Row
from mctune.report.write import read_document, write_results
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.kernels.support import Support
from mctune.verify.inputs import make_inputs
from mctune.verify.package import find_entry, launcher_of, load_package
from mctune.verify.passes import PASSES

TINY = Problem(T=96, H=1, Dk=64, Dv=64, segment_length=32)
SSC = TINY.replace(T=1000, Dk=8, Dv=8, segment_length=200, aggregation="ssc", top_k=2)
TARGET, _ = resolve("cpu")
RATES = Rates(sgemm=100e9, copy=10e9)


def timed(ms: float) -> Timed:
    return Timed(ms, 0.9 * ms, 1.2 * ms, 5, 1e-7)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and copies that take no time; compiling is somebody else's code."""
    monkeypatch.setattr(bench, "_SGEMM", ((64, 64, 64), (128, 64, 16)))
    monkeypatch.setattr(bench, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(torch, "compile", lambda function: function)


@pytest.fixture(scope="module")
def forward() -> Iterator[ModuleType]:
    """benchmarks/forward.py."""
    path = Path(__file__).parents[2] / "benchmarks" / "forward.py"
    spec = importlib.util.spec_from_file_location("benchmark_forward", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def package(forward: ModuleType, kernel_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with one kernel."""
    folder = tmp_path_factory.mktemp("bench")
    config = forward.fitting(forward.DENSE, resolve("cpu")[0]).replace(chunk=32)
    built = TvmBackend().build(TINY, config, TARGET, kernel_folder)
    winner = Winner(TINY, config, timed(1.0), "tvm", "cpu", built.library, built.source, None, (), True, {})
    return emit_package(folder / "mctune_bench_test", TARGET, [winner])


def exact(problem: Problem, inputs: Any) -> dict[str, torch.Tensor]:
    return {"y": PASSES["forward"].expected(problem, inputs)["y"].float()}


def test_every_contender_and_the_machine_are_timed() -> None:
    found = measure([Contender("oracle", TINY, exact), eager(TINY)], rounds=2, note=pytest.fail)
    assert list(found.times) == ["oracle", "eager"]
    for one in found.times.values():
        assert one.repeats == 2 and 0 < one.low <= one.ms <= one.high and one.error < 1e-6
    assert found.rates.sgemm > 0 and found.rates.copy > 0


def test_rates_follow_from_the_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = [[2.0, 4.0, 3.0], [0.5] * 3, [0.25] * 3, [1.0] * 3]
    monkeypatch.setattr(bench, "time_rotated", lambda functions, **_: milliseconds[: len(functions)])
    found = measure([eager(TINY)], rounds=3, note=pytest.fail)
    assert (found.times["eager"].ms, found.times["eager"].low, found.times["eager"].high) == (3.0, 2.0, 4.0)
    # The faster of 2 * 64^3 operations in half and 2 * 128 * 64 * 16 in a quarter of a millisecond.
    assert found.rates.sgemm == pytest.approx(max(2 * 64**3 / 0.5e-3, 2 * 128 * 64 * 16 / 0.25e-3))
    assert found.rates.copy == pytest.approx(2 * (1 << 16) / 1e-3)


@pytest.mark.parametrize(
    "spoil", [lambda y: 1.001 * y, lambda y: y[:, :-1], lambda y: y.where(y != y[0, 5, 0, 3], torch.nan)]
)
def test_what_is_wrong_is_not_timed(spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    wrong = Contender("liar", TINY, lambda case, inputs: {"y": spoil(exact(case, inputs)["y"])}, optional=True)
    with pytest.raises(MctuneError, match="liar is wrong on forward linear grm"):
        measure([eager(TINY), wrong], rounds=1, note=pytest.fail)


def test_ssc_may_read_another_segment_where_logits_are_equal() -> None:
    def differs(tokens: int) -> Contender:
        def run(problem: Problem, inputs: Any) -> Any:
            results = eager(problem).run(problem, inputs)
            results["y"][0, :tokens, 0] *= 1.5
            return results

        return Contender("kernel", SSC, run)

    assert measure([differs(1)], rounds=1, note=pytest.fail).times["kernel"].error < 1e-6
    with pytest.raises(MctuneError, match="kernel is wrong"):
        measure([differs(2)], rounds=1, note=pytest.fail)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
@pytest.mark.parametrize(("recurrence", "names"), [("linear", ["eager", "torch.compile"]),
                                                   ("titans", ["eager", "vmap(grad)"])])  # fmt: skip
def test_passes_are_timed_as_what_they_are(pass_: str, recurrence: str, names: list[str]) -> None:
    """A backward is a training step: all gradients are held to a reference, not y."""
    problem = TINY.replace(T=40, Dk=8, Dv=8, segment_length=16, pass_=pass_, recurrence=recurrence)
    found = measure(bench.baselines(problem), rounds=1, note=pytest.fail)
    assert list(found.times) == names and max(one.error for one in found.times.values()) < 5e-6
    given = bench.run_of(memory_caching, "eager")(problem, make_inputs(problem, 0))
    others = {"dg", "deta", "dmu", "dW_up", "dW_down"} if recurrence == "titans" else set()
    assert set(given) == ({"y"} if pass_ == "forward" else {"dq", "dk", "dv", "du"} | others)


def test_what_cannot_run_is_left_out_aloud_if_it_may() -> None:
    def run(problem: Problem, inputs: Any) -> torch.Tensor:
        raise RuntimeError("no C++ compiler\nand a long story")

    notes: list[str] = []
    found = measure([eager(TINY), Contender("inductor", TINY, run, optional=True)], rounds=1, note=notes.append)
    assert list(found.times) == ["eager"]
    assert notes == ["inductor left out: RuntimeError: no C++ compiler"]
    with pytest.raises(RuntimeError, match="no C"):
        measure([Contender("inductor", TINY, run)], rounds=1, note=notes.append)


def test_speedup_and_fraction_of_bound(tmp_path: Path) -> None:
    baselines = {"eager": timed(12.0), "torch.compile": timed(9.0)}
    result = Result(TINY, "tvm", Config.of({"chunk": 32}), timed(3.0), baselines, RATES)
    counted = work(TINY)
    shortest = max(counted.operations / 100e9, counted.bytes / 10e9)
    assert result.fraction_of_bound == pytest.approx(shortest / 3e-3)
    faster_copy = Result(TINY, "tvm", result.config, timed(3.0), {}, Rates(100e9, 40e9))
    data = document(TARGET, [result, faster_copy])
    row, bare = (Row.from_dict(values) for values in data["rows"])
    assert row.speedup == 3.0 and row.best_baseline == ("torch.compile", 9.0)
    assert (row.ms, row.low, row.high, row.repeats, row.error) == (3.0, 0.9 * 3.0, 1.2 * 3.0, 5, 1e-7)
    assert bare.speedup is None
    assert data["rates"][0] == {"matrix_gflops": 100, "copy_gbs": 10}
    assert data["environment"]["copy_gbs"] == 25 and data["environment"]["threads"] == TARGET.cores
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(data))
    (folder,) = write_results([read_document(path)], tmp_path / "results")
    assert "3.00x" in (folder / "README.md").read_text() and "matrix_gflops" in (folder / "README.md").read_text()


def test_deep_memories_have_a_bound_too() -> None:
    deep = TINY.replace(recurrence="dla", Dk=8, Dv=8)
    result = Result(deep, "eager", Config.of({}), timed(3.0), {}, RATES)
    counted = work(deep)
    assert result.fraction_of_bound == pytest.approx(max(counted.operations / 100e9, counted.bytes / 10e9) / 3e-3)


def test_benchmarks_find_the_kernels_of_a_package(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_package(package)
    entry = find_entry(module, TINY.replace(T=200), "cpu", "tvm")
    assert entry is not None and launcher_of(module, entry)
    for other in (TINY.replace(Dk=32, Dv=32), TINY.replace(recurrence="dla"), TINY.replace(pass_="decode")):
        assert find_entry(module, other, "cpu", "tvm") is None
    assert find_entry(module, TINY, "cpu", "triton") is None
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        decode = importlib.import_module("decode")
        config, _ = decode.kernel_of(TINY, TARGET, package, package.parent)
        monkeypatch.setattr(decode, "computes", lambda backend, problem: Support.no("no template"))
        assert decode.kernel_of(TINY.replace(recurrence="dla"), TARGET, package, package.parent) is None
        for change in ({}, {"aggregation": "ssc", "top_k": 2}):
            few = decode.DEEP.replace(H=2, Dk=8, Dv=8, **change)
            found = decode.bench(few, None, 1)
            assert found.backend == "eager" and set(found.baselines) == {"vmap(grad)"}
            assert decode.said([found]).startswith(str(few))
    finally:
        sys.path.pop(0)
    assert config["chunk"] == 32


def test_a_package_from_the_command_line(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, threads = tmp_path / "new" / "bench.json", torch.get_num_threads()
    assert main(["bench", str(package), "--rounds", "1", "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert data == json.loads(out.read_text())
    (row,) = read_document(out).rows
    assert row.problem == TINY and row.backend == "tvm" and row.config["chunk"] == 32
    assert set(dict(row.baselines)) == {"eager", "torch.compile"}
    assert row.error is not None and row.error < 2e-5 and row.repeats == 1
    assert f"1/1 {TINY}" in printed.err and "GFLOP/s" in printed.err
    assert torch.get_num_threads() == threads


def test_without_a_package_the_eager_path_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = (Case.of({"T": 96, "H": 1, "Dk": 8, "Dv": 8}, (16, 32, 48)),
             Case.of({"T": 40, "H": 1, "Dk": 8, "Dv": 8, "pass": "decode"}, (8,)),
             Case.of({"T": 40, "H": 1, "Dk": 8, "Dv": 8, "pass": "backward"}, (8,)),
             Case.of({"T": 40, "H": 1, "Dk": 8, "Dv": 8, "segmentation": "logarithmic"}, ()))  # fmt: skip
    monkeypatch.setattr(bench, "load_workload", lambda name: Workload(name, "", 1, None, cases))
    assert main(["bench", "--rounds", "1"]) == 0
    printed = capsys.readouterr()
    header, constant, backward, logarithmic = printed.out.splitlines()
    assert header.split()[:2] == ["problem", "backend"]
    assert " C32 " in constant and " eager " in constant and "torch.compile" in constant
    assert " log " in logarithmic and backward.startswith("backward ") and " eager step " in backward
    assert "left out: benchmarks/decode.py times decode steps" in printed.err


def test_a_backward_without_a_forward_is_left_out(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {"problem": TINY.replace(Dk=32, Dv=32, pass_="backward").to_dict(), "backend": "tvm", "config": {}}
    monkeypatch.setattr(bench, "read_entries", lambda path: [alone])
    notes: list[str] = []
    _, results = bench.bench_package(package, rounds=1, note=notes.append)
    assert not results and notes[0].endswith("left out: the package has no forward kernel to train with")


def test_packages_that_cannot_be_timed(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="not an emitted package"):
        bench.bench_package(tmp_path, rounds=1, note=pytest.fail)
    assert main(["bench", str(package), "--small"]) == 2
    assert "for a package of GPU kernels" in capsys.readouterr().err
    monkeypatch.setattr(bench, "resolve", lambda name: resolve("a100-80g"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["bench", str(package)]) == 3
    assert capsys.readouterr().err.count("there is no GPU here") == 1


@pytest.mark.parametrize(
    "shape", [{}, {"B": 2, "H": 2, "Dk": 8, "Dv": 8}, {"T": 384, "segment_length": 128}, {"T": 32}]
)
def test_the_torch_forms_agree_with_the_oracle(forward: ModuleType, shape: dict[str, int]) -> None:
    problem = TINY.replace(**shape)
    names = ["eager", "torch.compile", "one product", "one product, torch.compile", "loop", "loop, torch.compile"]
    found = measure(forward.baselines(problem), rounds=1, note=pytest.fail)
    assert list(found.times) == names
    assert max(one.error for one in found.times.values()) < 1e-6


def test_the_torch_forms_are_causal(forward: ModuleType) -> None:
    inputs = make_inputs(TINY, 0)
    arrays = [inputs.q, inputs.k, inputs.v, inputs.u]
    changed = [torch.cat([x[:, :50], x[:, 50:] + 1], 1) for x in arrays]
    for form in (forward.one_product, forward.loop):
        before, after = form(*arrays, 32), form(*changed, 32)
        assert torch.equal(before[:, :50], after[:, :50]) and not torch.equal(before, after)


def test_the_forward_benchmark(forward: ModuleType, package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = TINY.replace(T=512, segment_length=64)
    found = forward.bench(TINY, long, long.replace(aggregation="ssc", top_k=4), package, 1)
    assert "has no kernel for" in capsys.readouterr().err
    assert found.dense.config["chunk"] == 32 and found.long_sparse.config["formulation"] == "gather"
    assert len(found.dense.baselines) == 6 and list(found.long_dense.baselines) == ["eager"]
    ratio, rate, sparse = found.goals()
    assert ratio.figure == min(one.ms for one in found.dense.baselines.values()) / found.dense.timed.ms
    counted = work(TINY, 32).operations
    assert rate.figure == pytest.approx(counted / (found.dense.timed.ms * 1e-3) / found.dense.rates.sgemm)
    assert sparse.figure == found.long_dense.timed.ms / found.long_sparse.timed.ms
    said = forward.said(found)
    assert said.count("met   ") + said.count("MISSED") == 3
    for name in found.dense.baselines:
        assert f"\n{name} " in said


@pytest.mark.parametrize(("figure", "met"), [(1.99, False), (2.0, True)])
def test_a_goal(forward: ModuleType, figure: float, met: bool) -> None:
    assert forward.Goal("times", 2.0, figure, "").to_dict()["met"] is met
