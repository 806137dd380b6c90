"""Kernels that choose among many configurations: compiled in parts, side by side, and timed briefly."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import OutOfResources


class Kernel:
    """As many as are run are compiled; ``fails`` do not run here."""

    def __init__(self, fails: tuple[int, ...] = ()) -> None:
        self.fails, self.ran, self.arg_names = fails, list[int](), ["x"]

    @staticmethod
    def fn(x: int) -> None:
        """What it is to Triton's tuner."""

    def run(self, *args: Any, BLOCK: int, **others: Any) -> None:
        self.ran.append(BLOCK)
        if BLOCK in self.fails:
            raise OutOfResources(2, 1, "shared memory")


def tuned(kernel: Kernel, number: int) -> Any:
    configs = [triton.Config({"BLOCK": block}) for block in range(number)]
    return Autotuner(kernel, ["x"], configs, ["x"], None, None)


@pytest.fixture
def tuners(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # What the module sets is set back.
    monkeypatch.setattr(Autotuner, "do_bench", Autotuner.__dict__["do_bench"])
    return sys.modules["mctune.measure.gpu.tuners"]


def test_the_parts_are_all_of_them_and_each_is_compiled_once(tuners: ModuleType) -> None:
    ran = Counter[int]()
    for part in range(3):
        tuners.compile_part(part, 3)
        kernel = Kernel()
        tuned(kernel, 8).run(1)
        # The last one is what it is run with: nothing else is compiled for it.
        assert kernel.ran[-1] in kernel.ran[:-1]
        ran.update(kernel.ran[:-1])
    assert ran == Counter(range(8))


def test_what_does_not_run_here_hides_nothing_that_comes_after_it(tuners: ModuleType) -> None:
    tuners.compile_part(1, 2)
    first, second = Kernel(fails=(1, 3)), Kernel()
    tuned(first, 4).run(1)
    assert first.ran == [1, 3, 0]
    tuned(second, 4).run(1)
    assert second.ran == [1, 3, 1]


def test_the_process_that_times_tries_all_of_them_briefly(tuners: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[dict[str, Any]]()

    def bench(call: Any, **options: Any) -> list[float]:
        call()
        asked.append(options)
        return [float(len(asked))] * 3

    monkeypatch.setattr(tuners, "do_bench", bench)
    tuners.time_briefly()
    kernel = Kernel()
    tuned(kernel, 4).run(1)
    assert kernel.ran == [0, 1, 2, 3, 0]
    assert asked == [{"warmup": 5, "rep": 20, "quantiles": (0.5, 0.2, 0.8)}] * 4


def test_they_are_compiled_by_several_processes(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm, training = sys.modules["mctune.measure.gpu.warm"], gpu.Shape("training", 1, 16384, 16, 128, 256)
    forward = replace(training, kind="forward")
    every = {one.name: one for one in gpu.contenders(training, gpu.this_target(), None, tmp_path) if not one.built}
    assert {name for name, one in every.items() if one.tunes} == {"fla chunk_linear_attn", "fla chunk_simple_gla"}
    wanted = ("fla chunk_linear_attn", "mctune base, defaults")
    chosen = [(shape, every[name]) for shape in (forward, training) for name in wanted]
    for cores, parts in ((1, 1), (6, 3), (64, 8)):
        monkeypatch.setattr(warm, "usable_cores", lambda cores=cores: cores)
        made = list(warm.jobs(chosen))
        # A training step has the kernels of a forward too.
        assert all(job.shape.kind == "training" and set(job.shapes) == {forward, training} for job in made)
        assert [job.part for job in made if job.name.startswith("fla")] == list(range(parts))
        assert [job.parts for job in made] == [*[parts] * parts, 1]
