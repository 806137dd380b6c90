"""A warmed package launches without compiling, whatever the sizes of the call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mctune.backends.triton.backend import TritonBackend
from mctune.core.config import Config
from mctune.core.outcome import Predicted
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.core.winner import Winner
from mctune.emit.package import emit_package
from mctune.workers.warm import warm_package

TARGET, _ = resolve("a100")
GRM = Problem(aggregation="grm", T=500, H=4, Dk=64, Dv=48, segment_length=64, dtype="bfloat16")
SSC = GRM.replace(recurrence="swla", aggregation="ssc", top_k=2, state_init="checkpoint")
PROBLEMS = (
    (GRM, {"piece": 32, "read_BT": 32}),
    (SSC.replace(T=700), {"formulation": "grouped"}),
    (SSC.replace(pass_="backward"), {}),
    (GRM.replace(pass_="decode", T=900), {}),
    (SSC.replace(pass_="decode", T=64 * 40), {}),
)
_LATER = """
import sys
from itertools import product
from pathlib import Path
from mctune.backends.triton.calls import call_on_meta
from mctune.backends.triton.device import VirtualDevice
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.verify.package import load_package

dispatch = load_package(Path(sys.argv[1])).runtime.kernels.dispatch
compiled, launched = [], 0
for entry in dispatch.TABLE.entries:
    problem = Problem.from_dict(dict(entry.problem))
    launcher = dispatch.launcher(entry)
    shapes = ((problem.T, 1, 4), (64 * 7, 2, 1), (333, 3, 16), (63, 1, 3), (20, 1, 8))
    sizes = [dict(T=T, B=B, H=H) for T, B, H in shapes]
    with VirtualDevice(resolve("a100")[0]) as device:
        for even, states in product((True, False), ("float32", "bfloat16", "float16")):
            for changes in sizes:
                call_on_meta(problem.replace(**changes), launcher, even, states)
    compiled += device.compiled
    launched += len(device.launches)
print(launched, *compiled)
"""


def winner(problem: Problem, changes: dict[str, int | str], folder: Path) -> Winner:
    """Its default configuration, changed."""
    backend = TritonBackend()
    space = backend.space(problem)
    config = space.first_valid(lambda config: space.valid(config.replace(**changes), problem, TARGET))
    assert config is not None
    config = config.replace(**changes)
    built = backend.build(problem, config, TARGET, folder)
    config = Config.of({**config.to_dict(), "segment_length": problem.segment_length or 0})
    return Winner(
        problem=problem, config=config, outcome=Predicted(1.0, "core"), backend="triton", device="cuda",
        library=built.library, source=built.source, portable=None, cpu_flags=(), recommended=True, verified={},
        parts=tuple((name, built.library.parent / file) for name, file in built.parts),
    )  # fmt: skip


def test_nothing_is_compiled_after_warming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a minute of one core: an empty cache, and every variant of five problems' kernels compiled into it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    out = emit_package(tmp_path / "warmed", TARGET, [winner(*each, tmp_path / "kernels") for each in PROBLEMS])
    first = list(warm_package(out, TARGET))
    assert all(one.compiled and set(one.launched) >= set(one.compiled) for one in first)
    again = subprocess.run([sys.executable, "-c", _LATER, str(out)], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    launched, *compiled = again.stdout.split()
    assert int(launched) > 100 and not compiled
