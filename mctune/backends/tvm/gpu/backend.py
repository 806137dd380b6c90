"""One configuration of TVM's GPU templates, from compiling it to calling it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mctune.backends.kept import write_whole
from mctune.backends.protocol import Built, Kernel, Launch, OperationError, Watch, unwatched
from mctune.backends.registry import computes, refuse
from mctune.backends.spaces import load_space
from mctune.backends.triton.calls import call_on_meta
from mctune.backends.triton.device import DoesNotFit
from mctune.backends.tvm.gpu import nvrtc
from mctune.backends.tvm.gpu.artefact import Artefact
from mctune.backends.tvm.gpu.operations import build_kernels, operations, parameters
from mctune.backends.tvm.gpu.record import recorders
from mctune.backends.tvm.gpu.source import generate
from mctune.backends.tvm.templates import source_hash
from mctune.backends.tvm.versions import TVM, check_versions
from mctune.core.config import Config
from mctune.core.errors import DeviceError, MctuneError
from mctune.core.outcome import TooLarge
from mctune.core.problem import Problem
from mctune.core.space import SearchSpace
from mctune.core.target import Target
from mctune.runtime.kernels.support import Support
from mctune.runtime.kernels.tvm.gpu.functions import load_parts
from mctune.runtime.kernels.tvm.gpu.matrix.backward import TvmGpuBackward
from mctune.runtime.kernels.tvm.gpu.matrix.decode import TvmGpuDecode
from mctune.runtime.kernels.tvm.gpu.matrix.forward import TvmGpuForward
from mctune.runtime.traits import alike

LAUNCHERS = {
    ("matrix", "forward"): TvmGpuForward,
    ("matrix", "backward"): TvmGpuBackward,
    ("matrix", "decode"): TvmGpuDecode,
}
"""By family and pass."""
WIDEST = 128
"""A block holds a row of q whole, and a thread its part of the sums."""
_TRIAL = """\
extern "C" __global__ void __launch_bounds__(32) add_one_kernel(float* __restrict__ x_ptr, float* __restrict__ y_ptr) {
  y_ptr[((int)threadIdx.x)] = x_ptr[((int)threadIdx.x)] + 1.0f;
}
"""


class TvmGpuBackend:
    """Templates of ``templates/tvm/gpu`` for an NVIDIA GPU."""

    name, maker = "tvm", "tvm.gpu"
    measured = False

    def space(self, problem: Problem) -> SearchSpace:
        """The parameters that the templates of ``problem`` take."""
        refuse(self.supports(problem))
        return load_space(self.maker, problem.writes.family, problem.pass_, self.measured)

    def measuring(self) -> TvmGpuBackend:
        """The same with spaces that also have instructions of older GPUs, which newer ones run."""
        backend = type(self)()
        backend.measured = True
        return backend

    def supports(self, problem: Problem, target: Target | None = None) -> Support:
        """Whether a TVM template computes a problem on a GPU."""
        answer = computes("tvm", problem, "cuda")
        for name, width in (("Dk", problem.Dk), ("Dv", problem.Dv)):
            if answer and width > WIDEST:
                answer = Support.no(f"{name}={width}: TVM's templates for GPUs take at most {WIDEST}; take more heads")
        if answer and target is not None and problem.dtype == "bfloat16" and target.arch in ("sm_70", "sm_75"):
            answer = Support.no(
                f"dtype=bfloat16: {target.title} ({target.arch}) multiplies float16 only; take dtype=float16, or "
                "float32, which runs without matrix units"
            )
        return answer

    def ready(self, here: bool = True) -> None:
        """Refuse a missing TVM or NVRTC, and for an absent GPU a machine without a compiler of C++.

        Raises:
            DeviceError: with what to install.
        """
        check_versions()
        nvrtc.version()

    def try_out(self, target: Target, folder: Path) -> None:
        """Compile a kernel that adds 1.

        Raises:
            Exception: what then fails for every candidate.
        """
        if "add_one_kernel" not in nvrtc.compile_source(_TRIAL, target.arch).resources:
            raise DeviceError(f"NVRTC compiled nothing for {target.name}, and did not say why")

    def identity(self) -> dict[str, str]:
        """The TVM, the NVRTC and the templates that results depend on."""
        return {"name": self.name, "tvm": TVM, "nvrtc": nvrtc.version(), "templates": source_hash()[:16]}

    def build(self, problem: Problem, config: Config, target: Target, folder: Path) -> Built:
        """Compile ``config`` into ``folder``: machine code and its CUDA C for each operation, and an index of them.

        Raises:
            DeviceError: if TVM or NVRTC is missing.
            ValueError: if the configuration breaks a constraint of the space; it could compile and be wrong.
            OperationError: with whatever TVM or NVRTC says of a configuration that does not compile.
        """
        refuse(self.supports(problem, target))
        config = self.measuring().space(problem).checked(config, problem, target)
        # One computation has one kernel, whatever the aggregation is called.
        problem = problem.replace(aggregation=alike(problem.aggregation, problem.writes.family))
        parts: list[tuple[str, str]] = []
        source = folder
        for operation in operations(problem):
            try:
                artefact = self._compiled(operation, problem, config, target, folder)
            except (MctuneError, OSError):
                raise
            except Exception as error:
                raise OperationError(operation) from error
            parts += artefact.parts(operation)
            source = artefact.path(".cu")
        index = json.dumps({"problem": problem.to_dict(), "config": config.to_dict(), "parts": dict(parts)}, indent=1)
        name = f"{problem.pass_}_{problem.recurrence}_{problem.aggregation}_{problem.state_init}_{target.arch}"
        library = folder / f"{name}_{hashlib.sha256(index.encode()).hexdigest()[:12]}.json"
        write_whole(library, f"{index}\n")
        return Built(library, source, tuple(parts))

    def _compiled(self, operation: str, problem: Problem, config: Config, target: Target, folder: Path) -> Artefact:
        """The files of an operation, which configurations share that differ elsewhere."""
        static = (problem.recurrence, problem.aggregation, problem.Dk, problem.Dv, problem.dtype)
        about = {"operation": operation, "problem": static, "config": parameters(operation, config)}
        identity = json.dumps([source_hash(), about, target.arch, TVM, nvrtc.version()], sort_keys=True)
        artefact = Artefact(folder, f"{operation}_{hashlib.sha256(identity.encode()).hexdigest()[:12]}")
        if not artefact.whole:
            check_versions()
            kernels = build_kernels(operation, problem, config, target)
            source = generate([kernel.function for kernel in kernels], target.arch)
            shared = {f"{kernel.function.attrs['global_symbol']}_kernel": kernel.shared for kernel in kernels}
            compiled = nvrtc.compile_source(source.text, target.arch, f"{artefact.stem}.cu")
            artefact.write(source, compiled, shared, target.arch, about)
        return artefact

    def compile(self, problem: Problem, config: Config, built: Built, target: Target) -> tuple[Launch, ...] | TooLarge:
        """What one call launches on the GPU, or why the GPU cannot hold it."""
        launches: list[Launch] = []
        stems = {name: Path(file).stem for name, file in built.parts if "." not in name}
        kernels = recorders(built.library.parent, stems, target, launches)
        try:
            launcher = LAUNCHERS[problem.writes.family, problem.pass_](
                built.library, built.record(problem, config), kernels
            )
            call_on_meta(problem, launcher)
        except DoesNotFit as error:
            return TooLarge(str(error), error.need, error.limit, error.unit, error.operation)
        return tuple(launches)

    def load(self, problem: Problem, config: Config, built: Built, watch: Watch = unwatched) -> Kernel:
        """The compiled candidate, through the same launcher that an emitted package uses."""
        record, functions = built.record(problem, config), None
        if watch is not unwatched:
            functions = {
                operation: {name: watch(operation, kernel) for name, kernel in kernels.items()}
                for operation, kernels in load_parts(built.library.parent, record["parts"]).items()
            }
        return LAUNCHERS[problem.writes.family, problem.pass_](built.library, record, functions)
