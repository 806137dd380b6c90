"""An emitted package where nothing of mctune, no Optuna and no compiler is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from packages import GRM, run_bare

from mctune.core.target import Target
from mctune.core.winner import Winner
from mctune.emit import emit_package
from mctune.reference import error_ratio, memory_caching
from mctune.verify.inputs import make_inputs

RUN = """
import importlib, sys, warnings

for absent in ("mctune", "optuna", "tvm", "triton"):
    try:
        importlib.import_module(absent)
    except ModuleNotFoundError as error:
        assert error.name == absent
    else:
        raise SystemExit(f"{absent} is here")

warnings.simplefilter("error", UserWarning)
import torch

package = importlib.import_module(sys.argv[1])
calls = torch.load("calls.pt", weights_only=True)
torch.save([package.memory_caching(**call, backend="tvm") for call in calls], "results.pt")

auto = package.memory_caching(**calls[0])
assert torch.equal(auto, torch.load("results.pt")[0]), "auto does not take the tuned kernel"
model = package.MemoryCaching(32, num_heads=2, head_dim=16, segment_length=32)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    y = model(torch.randn(1, 70, 32))[0]
assert ['"pass":"backward"' in str(w.message) for w in seen] == [True], "a package without backward kernels says so"
y.sum().backward()
assert y.shape == (1, 70, 32) and all(p.grad is not None for p in model.parameters())
assert not {"mctune", "tvm", "optuna", "triton"} & {name.partition(".")[0] for name in sys.modules}
print("done")
"""


@pytest.fixture
def package(out: Path, target: Target, winners: Sequence[Winner]) -> Path:
    return emit_package(out, target, winners)


def test_package_runs_without_mctune_optuna_and_the_compiler(bare_python: Path, package: Path) -> None:
    calls, references = [], []
    for seed, changes in enumerate(
        (
            {}, {"T": 1, "H": 1}, {"B": 2, "T": 1000}, {"T": 37, "aggregation": "soup"},
            {"segmentation": "logarithmic", "segment_length": None, "T": 77}, {"T": 50, "dtype": "bfloat16"},
        )
    ):  # fmt: skip
        problem = GRM.replace(**changes)
        calls.append(make_inputs(problem, seed).arguments(problem))
        references.append(memory_caching(**calls[-1]))
    torch.save(calls, package.parent / "calls.pt")
    done = run_bare(bare_python, RUN, package.name, folder=package.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    results = torch.load(package.parent / "results.pt")
    for y, reference, tolerance in zip(results, references, [2e-5] * 5 + [1e-2], strict=True):
        assert error_ratio(y, reference) <= tolerance


def test_threads_library_is_the_packages_own(bare_python: Path, package: Path) -> None:
    """With no compiler and no cache, only the library in the package can have served; without it, it is named."""
    (package / "kernels" / "threads.so").unlink()
    done = run_bare(bare_python, f"import {package.name}", folder=package.parent)
    assert done.returncode == 1
    assert "PackageError: kernels/threads.so is in the manifest of" in done.stderr and "missing from it" in done.stderr


HIDE = """
import importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "tvm_ffi":
            raise ModuleNotFoundError(name=name)

sys.meta_path.insert(0, Hide())
import torch, warnings
import {package} as package

x = torch.ones(1, 40, 2, 16)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    y = package.memory_caching(x, x, x, segment_length=32)
assert y.shape == x.shape
print(*(w.message for w in seen if "eager" in str(w.message)))
package.memory_caching(x, x, x, segment_length=32, backend="tvm")
"""


def test_without_its_ffi_a_package_is_eager_and_says_what_to_install(bare_python: Path, package: Path) -> None:
    done = run_bare(bare_python, HIDE.format(package=package.name), folder=package.parent)
    assert "the eager path runs: TVM kernels need apache-tvm-ffi: pip install apache-tvm-ffi==0.1.14" in done.stdout
    assert done.returncode == 1
    assert 'BackendError: backend="tvm" cannot serve this call: TVM kernels need apache-tvm-ffi' in done.stderr


def test_a_package_does_not_write_into_itself(bare_python: Path, package: Path) -> None:
    def files() -> set[str]:
        found = {path for path in package.rglob("*") if path.is_file()}
        return {path.relative_to(package).as_posix() for path in found if "__pycache__" not in path.parts}

    before = files()
    code = f"import torch, {package.name} as package; x = torch.ones(1, 40, 2, 16)\n"
    code += "package.memory_caching(x, x, x, segment_length=32, backend='tvm')"
    for _ in range(2):
        assert run_bare(bare_python, code, folder=package.parent).returncode == 0
    assert files() == before
