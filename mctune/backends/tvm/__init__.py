"""The TVM backend: templates compiled by LLVM into libraries that run without TVM."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch

from mctune.backends.kept import scratch_in
from mctune.backends.protocol import Built, Kernel, Watch, unwatched
from mctune.backends.registry import computes, refuse
from mctune.backends.spaces import load_space
from mctune.backends.tvm.link import link, try_linking
from mctune.backends.tvm.objects import compiled, linked, llvm, write_object
from mctune.backends.tvm.templates import OPERATIONS, source_hash
from mctune.backends.tvm.versions import TVM, check_versions
from mctune.core.config import Config
from mctune.core.errors import DeviceError, UsageError
from mctune.core.problem import Problem
from mctune.core.space import SearchSpace
from mctune.core.target import Target
from mctune.runtime.kernels.results import padded
from mctune.runtime.kernels.support import Support
from mctune.runtime.kernels.tvm.deep.backward import TvmDeepBackward
from mctune.runtime.kernels.tvm.deep.decode import TvmDeepDecode
from mctune.runtime.kernels.tvm.deep.forward import TvmDeepForward
from mctune.runtime.kernels.tvm.loader import load_library
from mctune.runtime.kernels.tvm.matrix.backward import TvmBackward
from mctune.runtime.kernels.tvm.matrix.decode import TvmDecode
from mctune.runtime.kernels.tvm.matrix.forward import TvmForward

_ADD_ONE = """
@I.ir_module
class Module:
    @T.prim_func(s_tir=True)
    def add_one(x: T.Buffer((8,), "float32"), y: T.Buffer((8,), "float32")):
        for i in range(8):
            with T.sblock("one"):
                v = T.axis.spatial(8, i)
                y[v] = x[v] + T.float32(1)
"""
LAUNCHERS = {
    ("matrix", "forward"): TvmForward,
    ("matrix", "backward"): TvmBackward,
    ("matrix", "decode"): TvmDecode,
    ("deep", "forward"): TvmDeepForward,
    ("deep", "backward"): TvmDeepBackward,
    ("deep", "decode"): TvmDeepDecode,
}
"""By family and pass."""


class TvmBackend:
    """Templates of ``templates/tvm`` for a CPU."""

    name = maker = "tvm"

    def space(self, problem: Problem) -> SearchSpace:
        """The parameters that the templates of ``problem`` take."""
        refuse(self.supports(problem))
        return load_space("tvm", problem.writes.family, problem.pass_)

    def measuring(self) -> TvmBackend:
        """The same: whatever it compiles is run."""
        return self

    def supports(self, problem: Problem, target: Target | None = None) -> Support:
        """Whether a TVM template computes a problem on a CPU."""
        return computes("tvm", problem, "cpu")

    def ready(self, here: bool = True) -> None:
        """Refuse a missing TVM, a pair that crashes, or a machine that links nothing.

        Raises:
            DeviceError: with what to install or to mend.
        """
        check_versions()
        try_linking()

    def try_out(self, target: Target, folder: Path) -> None:
        """Compile, link, load and run a kernel that adds 1.

        Raises:
            Exception: what then fails for every candidate.
        """
        import tvm

        module = tvm.script.from_source(_ADD_ONE)
        with scratch_in(folder, "trial") as scratch:
            object_, library = Path(scratch, "trial.o"), Path(scratch, "trial.so")
            write_object(tvm.compile(module, target=llvm(target)), object_)
            link(str(library), [str(object_)])
            x = torch.arange(8, dtype=torch.float32)
            y = torch.full_like(x, torch.nan)
            load_library(library)["add_one"](x, y)
        if not torch.equal(y, x + 1):
            raise DeviceError(f"a trial kernel computed {y.tolist()} for 1 + {x.tolist()}")

    def identity(self) -> dict[str, str]:
        """The TVM and the templates that results depend on."""
        return {"name": self.name, "tvm": TVM, "templates": source_hash()[:16]}

    def padded(self, problem: Problem) -> Problem:
        """The problem with the widths that kernels are compiled for: decode works in place, on exact ones.

        Templates of deep memories widen by themselves: the hidden width of a padded problem would be another.
        """
        if problem.pass_ == "decode" or problem.deep:
            return problem
        return problem.replace(Dk=padded(problem.Dk), Dv=padded(problem.Dv))

    def build(self, problem: Problem, config: Config, target: Target, folder: Path) -> Built:
        """Compile ``config`` into ``folder``: a library, and beside it the TVMScript that it came from.

        Raises:
            DeviceError: if TVM is missing or is a wrong pair.
            ValueError: if the configuration breaks a constraint of the space; it could compile and be wrong.
            OperationError: with whatever TVM raises on a configuration that does not compile.
        """
        refuse(self.supports(problem))
        config = self.space(problem).checked(config, problem, target)
        parts = compiled(self.padded(problem), config, target, folder)
        stem = f"{problem.pass_}_{problem.recurrence}_{problem.aggregation}_{problem.state_init}"
        return linked(f"# {problem}\n# {config}\n", stem, parts, folder)

    def compile(self, problem: Problem, config: Config, built: Built, target: Target) -> NoReturn:
        """A CPU is always here to be measured.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"kernels for {target.name} are timed, not predicted; nothing is known of them but their time")

    def load(self, problem: Problem, config: Config, built: Built, watch: Watch = unwatched) -> Kernel:
        """The compiled candidate, through the same launcher that an emitted package uses."""
        key = problem.writes.family, problem.pass_
        kernel = LAUNCHERS[key](built.library, built.record(problem, config))
        for name in OPERATIONS[key]:
            function = getattr(kernel, name, None)
            if function is not None:
                setattr(kernel, name, watch(name, function))
        return kernel
