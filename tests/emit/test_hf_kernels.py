"""A repository for Hugging Face's `kernels` library, loaded by the library itself; no network is used."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packages import GRM, forget

from mctune.backends.triton.backend import TritonBackend
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.outcome import Predicted
from mctune.core.problem import Problem
from mctune.core.target import Target, resolve
from mctune.core.winner import Winner
from mctune.emit import emit_repository, package_before, place_of
from mctune.reference import memory_caching as oracle
from mctune.verify.inputs import make_inputs

kernels = pytest.importorskip("kernels", reason="kernels is not installed: pip install 'mctune[dev]'")
from kernels._rust import Digest, DigestAlgorithm, Metadata  # noqa: E402

ON_GPU = GRM.replace(dtype="bfloat16")
NATIVE = "torch-stable-abi211-cpu-x86_64-linux"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], ModuleType]]:
    """The library's own loader, without a network; what it has loaded is forgotten afterwards."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network is asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    names: list[str] = []

    def load(path: Path) -> ModuleType:
        module = kernels.get_local_kernel(path)
        names.append(module.__name__)
        return module

    yield load
    for name in names:
        forget(name)


def triton_winners(target: Target, folder: Path, *passes: str) -> list[Winner]:
    """Kernels in their default configurations; nothing is compiled."""
    backend, winners = TritonBackend(), []
    for pass_ in passes:
        problem = ON_GPU.replace(pass_=pass_)
        space = backend.space(problem)
        config = space.first_valid(lambda config, space=space, problem=problem: space.valid(config, problem, target))
        assert config is not None
        built = backend.build(problem, config, target, folder)
        config = Config.of({**config.to_dict(), "segment_length": 32})
        winners.append(Winner(
            problem=problem, config=config, outcome=Predicted(1.0, "core"), backend="triton", device="cuda",
            library=built.library, source=built.source, portable=None, cpu_flags=(), recommended=True, verified={},
            parts=tuple((name, built.library.parent / file) for name, file in built.parts),
        ))  # fmt: skip
    return winners


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def gradients(memory_caching: Callable[..., torch.Tensor], problem: Problem, **options: Any) -> list[torch.Tensor]:
    """y, and the gradients of q, k, v and u, at inputs of the problem."""
    call = make_inputs(problem, 3).arguments(problem)
    leaves = [call[name].requires_grad_() for name in ("q", "k", "v", "u")]
    y = memory_caching(**call, **options)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def assert_right(kernel: ModuleType, problem: Problem, **options: Any) -> None:
    """y and gradients are those of the oracle, in float64."""
    call = make_inputs(problem, 3).arguments(problem)
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    leaves = [wide[name].requires_grad_() for name in ("q", "k", "v", "u")]
    y = oracle(**wide)
    expected = [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]
    for found, wanted in zip(gradients(kernel.memory_caching, problem, **options), expected, strict=True):
        rms = (found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert rms < 1e-4


def test_the_library_loads_the_kernels_of_a_cpu(
    tmp_path: Path, target: Target, winners: Sequence[Winner], loaded: Callable[[Path], ModuleType]
) -> None:
    repository = emit_repository(tmp_path / "memory-cache", target, winners)
    kernel = loaded(repository)
    assert kernel.__file__ == str(repository / "build" / NATIVE / "__init__.py")
    assert len(kernel.runtime.kernels.dispatch.TABLE.entries) == len(winners)
    assert_right(kernel, GRM)
    call = make_inputs(GRM, 3).arguments(GRM)
    torch.testing.assert_close(
        kernel.memory_caching(**call, backend="tvm"),
        kernel.memory_caching(**call, backend="eager"),
        atol=1e-4,
        rtol=1e-4,
    )
    plain = loaded(repository / "build" / "torch-cpu")
    assert plain.__name__ != kernel.__name__ and not plain.runtime.kernels.dispatch.TABLE.entries
    with pytest.warns(UserWarning, match="the eager path runs: there are no tuned kernels here"):
        assert_right(plain, GRM)
    # A variant of pure Python has no machine code.
    assert not [name for name in contents(repository / "build" / "torch-cpu") if name.endswith(".so")]


def test_a_repository_of_gpus_runs_without_one(tmp_path: Path, loaded: Callable[[Path], ModuleType]) -> None:
    """What the library chooses here has no kernels; the variant with kernels, loaded all the same, runs eagerly."""
    target, _ = resolve("h100")
    repository = emit_repository(tmp_path / "for-gpus", target, triton_winners(target, tmp_path / "k", "forward"))
    chosen, ours = loaded(repository), loaded(repository / "build" / "torch-cuda")
    assert Path(str(chosen.__file__)).parent.name == "torch-cpu"
    assert len(ours.runtime.kernels.dispatch.TABLE.entries) == 1
    for kernel in (chosen, ours):
        with pytest.warns(UserWarning, match="the eager path runs"):
            assert_right(kernel, GRM)
    assert not [name for name in contents(repository) if name.endswith(".so")]


_INTERPRETED = """
import sys
from pathlib import Path
import kernels, torch
kernel = kernels.get_local_kernel(Path(sys.argv[1]))
call = torch.randn(4, 1, 40, 1, 16, dtype=torch.float16)
y, expected = (kernel.memory_caching(*call, segment_length=32, backend=backend) for backend in ("triton", "eager"))
assert (y - expected).float().norm() <= 0.02 * expected.float().norm()
print("right")
"""


def test_its_triton_kernels_run_in_the_interpreter(tmp_path: Path) -> None:
    target, _ = resolve("a100")
    repository = emit_repository(tmp_path / "for-gpus", target, triton_winners(target, tmp_path / "k", "forward"))
    ran = subprocess.run(
        [sys.executable, "-c", _INTERPRETED, str(repository / "build" / "torch-cuda")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.stdout == "right\n", ran.stderr


def test_two_versions_live_in_one_process(
    tmp_path: Path, target: Target, winners: Sequence[Winner], loaded: Callable[[Path], ModuleType]
) -> None:
    first = loaded(emit_repository(tmp_path / "1" / "memory-cache", target, winners))
    second = loaded(emit_repository(tmp_path / "2" / "memory-cache", target, winners[:1]))
    assert first.__name__ != second.__name__ and first.MemoryCaching is not second.MemoryCaching
    for kernel in (first, second):
        assert_right(kernel, GRM)
        assert kernel.add_op_namespace_prefix("x") == f"{kernel.__name__}::x"
        assert kernel.ops is getattr(torch.ops, kernel.__name__)
        assert kernel.ops.memory_caching_forward.default.name() == f"{kernel.__name__}::memory_caching_forward"
    sizes = [len(kernel.runtime.kernels.dispatch.TABLE.entries) for kernel in (first, second)]
    assert sizes == [2, 1]


def test_what_the_library_reads_of_it(
    tmp_path: Path, target: Target, winners: Sequence[Winner], loaded: Callable[[Path], ModuleType]
) -> None:
    repository = emit_repository(tmp_path / "memory-cache", target, winners)
    for folder in sorted((repository / "build").iterdir()):
        kernel = loaded(folder)
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert (metadata.id, metadata.name.python_name, metadata.version) == (kernel.__name__, "memory_cache", 0)
        assert metadata.digest is not None
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
        # Earlier versions of the library look one folder down.
        spec = importlib.util.spec_from_file_location("memory_cache_1f", folder / "memory_cache" / "__init__.py")
        assert spec is not None and spec.loader is not None
        below = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(below)
        assert below.memory_caching is kernel.memory_caching and set(below.__all__) == set(kernel.__all__)
    spoilt = repository / "build" / "torch-cpu" / "runtime" / "call.py"
    spoilt.write_text(spoilt.read_text() + "\n")
    kernels.importer._loaded_kernels.clear()
    with pytest.raises(RuntimeError, match=r"runtime/call.py has changed since"):
        kernels.get_local_kernel(spoilt.parents[1])


def test_a_layer_takes_the_place_of_another_forward(
    tmp_path: Path, target: Target, winners: Sequence[Winner], loaded: Callable[[Path], ModuleType]
) -> None:
    repository = emit_repository(tmp_path / "memory-cache", target, winners)

    @kernels.use_kernel_forward_from_hub("Core")
    class Core(torch.nn.Module):
        aggregation, segment_length, top_k = "grm", 32, None

        def forward(self, q: Any, k: Any, v: Any, u: Any = None) -> Any:
            raise AssertionError("the forward that is replaced")

    loaded(repository)
    own = kernels.LocalLayerRepository(repository, layer_name="MemoryCachingCore")
    model, call = torch.nn.Sequential(Core()), make_inputs(GRM, 3).arguments(GRM)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({"Core": {"cpu": own}}, inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    y = model[0](call["q"], call["k"], call["v"], call["u"])
    torch.testing.assert_close(y.double(), oracle(**call), atol=1e-4, rtol=1e-4)


def test_its_benchmark_runs(
    tmp_path: Path, target: Target, winners: Sequence[Winner], loaded: Callable[[Path], ModuleType]
) -> None:
    from kernels.cli.benchmark import run_benchmark_script

    repository, h100 = emit_repository(tmp_path / "memory-cache", target, winners), resolve("h100")[0]
    # A deep memory's gates and weights, and gradients, on the PyTorch path: what is loaded here has no kernels.
    (winner,) = triton_winners(h100, tmp_path / "k", "forward")
    deep = Problem.from_dict(winner.problem.to_dict() | {"recurrence": "titans", "pass": "backward"})
    others = emit_repository(tmp_path / "for-gpus", h100, [winner, replace(winner, problem=deep)])
    for place, variant in ((repository, NATIVE), (others, "torch-cpu")):
        loaded(place)
        script = place / "benchmarks" / "benchmark.py"
        results, digits = run_benchmark_script(script, 1, 0, place, str(place), True, "local")
        assert len(results) == 2 and all(timing.verified for timing in results.values())
        assert json.loads((place / "build" / variant / "metadata.json").read_text())["id"].endswith(digits)


def test_targets_are_added_and_a_device_gets_its_own(tmp_path: Path, loaded: Callable[[Path], ModuleType]) -> None:
    out, kernels_folder = tmp_path / "for-gpus", tmp_path / "k"
    targets = [resolve(name)[0] for name in ("h100", "a100", "mi300x")]
    for target in targets:
        emit_repository(out, target, triton_winners(target, kernels_folder, "forward", "backward"))
    place, own = place_of(out, targets[0])
    assert sorted(path.name for path in place.parent.iterdir()) == ["torch-cpu", "torch-cuda", "torch-rocm"]
    assert sorted(path.stem for path in (place / "tuned").iterdir()) == ["a100-80g", "h100-sxm"]
    assert len(package_before(place, pytest.fail, own).winners) == 2
    dispatch = loaded(place).runtime.kernels.dispatch
    request = dispatch.Request(
        "forward", "linear", "grm", "constant", "independent", 1, 150, 2, 16, 16, 32, None, "bfloat16", "cuda"
    )
    hardware = sys.modules[dispatch.__name__.replace("dispatch", "hardware")].Hardware
    assert dispatch.TABLE.several
    for arch, cores, expected in (("sm_90", 132, 132), ("sm_80", 108, 108), ("sm_90", 60, 132), ("sm_89", 58, 108)):
        entry = dispatch.find(dispatch.TABLE, replace(request, hardware=hardware(arch, cores)))
        assert entry.hardware.cores == expected
    card = (out / "README.md").read_text()
    assert all(f"## {target.title}" in card for target in targets) and card.startswith("---\nlibrary_name: kernels\n")
    # Each alone again.
    emit_repository(out, targets[1], triton_winners(targets[1], kernels_folder, "forward"), replace=True)
    assert sorted(path.name for path in place.parent.iterdir()) == ["torch-cpu", "torch-cuda"]
    assert [path.stem for path in (place / "tuned").iterdir()] == ["a100-80g"]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, target: Target, winners: Sequence[Winner]) -> None:
    first, second = (emit_repository(tmp_path / folder / "memory-cache", target, winners) for folder in "ab")
    before = contents(first)
    assert before == contents(second)
    assert contents(emit_repository(first, target, winners)) == before
    assert not [name for name, data in before.items() if str(tmp_path).encode() in data and not name.endswith(".so")]


@pytest.mark.parametrize(
    "name",
    ("Memory", "memory_cache", "m", "1st", "-x", "x-", "runtime", "memory-caching", "ops", "é-x", "a" * 65, "x\n"),
)  # fmt: skip
def test_hostile_names(name: str, tmp_path: Path, target: Target, winners: Sequence[Winner]) -> None:
    with pytest.raises(UsageError, match="the folder's name is the kernel's") as refused:
        emit_repository(tmp_path / name, target, winners)
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_what_cannot_be_kept_is_refused(
    tmp_path: Path, target: Target, winners: Sequence[Winner], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange" / "build").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"build is in the way: .* is no repository that mctune wrote"):
        emit_repository(tmp_path / "strange", target, winners)
    out, (h100, a100) = tmp_path / "for-gpus", [resolve(name)[0] for name in ("h100", "a100")]
    emit_repository(out, h100, triton_winners(h100, tmp_path / "k", "forward"))
    before = contents(out)
    with pytest.raises(UsageError, match="was emitted under the name 'for-gpus'"):
        emit_repository(out.rename(tmp_path / "renamed"), h100, triton_winners(h100, tmp_path / "k", "forward"))
    (tmp_path / "renamed").rename(out)
    monkeypatch.setattr("mctune.emit.hub.runtime_files", lambda: {"manifest.py": b"another"})
    with pytest.raises(UsageError, match=r"tuned/h100-sxm.json of .* was emitted by another mctune"):
        emit_repository(out, a100, triton_winners(a100, tmp_path / "k", "forward"))
    assert contents(out) == before
