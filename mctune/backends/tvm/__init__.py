"""The TVM backend: templates compiled by LLVM into libraries that run without TVM."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

import torch

from mctune.backends.kept import keep, scratch_in
from mctune.backends.protocol import Built, Kernel
from mctune.backends.registry import computes, refuse
from mctune.backends.spaces import load_space
from mctune.backends.tvm.link import link, try_linking
from mctune.backends.tvm.templates import render, source_hash
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
from mctune.runtime.whole import is_whole

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
            library = Path(scratch, "trial.so")
            _export(tvm.compile(module, target=_target(target)), library, Path(scratch))
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
            Exception: whatever TVM raises on a configuration that does not compile.
        """
        refuse(self.supports(problem))
        config = self.space(problem).checked(config, problem, target)
        name = self._name(problem, config, target)
        built = Built(folder / f"{name}.so", folder / f"{name}.py")
        if is_whole(built.library, built.source):
            return built
        check_versions()
        import tvm

        module = render(self.padded(problem), config, target)
        compiled = tvm.compile(module, target=_target(target))
        # Others may compile the same candidate into the same folder at the same time.
        with scratch_in(folder, "link") as scratch:
            text, library = Path(scratch, built.source.name), Path(scratch, built.library.name)
            text.write_text(f"# {problem}\n# {config}\n{module.script()}\n", encoding="utf-8")
            _export(compiled, library, Path(scratch))
            keep(library, built.library)
            keep(text, built.source)
        return built

    def compile(self, problem: Problem, config: Config, built: Built, target: Target) -> NoReturn:
        """A CPU is always here to be measured.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"kernels for {target.name} are timed, not predicted; nothing is known of them but their time")

    def load(self, problem: Problem, config: Config, built: Built) -> Kernel:
        """The compiled candidate, through the same launcher that an emitted package uses."""
        return LAUNCHERS[problem.writes.family, problem.pass_](built.library, built.record(problem, config))

    def _name(self, problem: Problem, config: Config, target: Target) -> str:
        """What the library depends on: the templates, the static part of the problem, the configuration, the CPU."""
        compiled = self.padded(problem)
        widths = (compiled.Dk, compiled.Dv, *((compiled.E,) if compiled.deep else ()))
        static = (problem.pass_, problem.recurrence, problem.aggregation, problem.state_init, *widths)
        values = {name: value for name, value in config.to_dict().items() if name != "segment_length"}
        identity = json.dumps([source_hash(), static, values, target.arch, TVM], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        return f"{problem.pass_}_{problem.recurrence}_{problem.aggregation}_{problem.state_init}_{digest}"


def _target(target: Target) -> Any:
    import tvm

    return tvm.target.Target({"kind": "llvm", "mcpu": target.arch, "mtriple": "x86_64-linux-gnu"})


def _export(compiled: Any, library: Path, workspace: Path) -> None:
    """Link what was compiled into ``library``.

    Raises:
        DeviceError: for whatever goes wrong: LLVM has accepted the candidate before.
    """
    try:
        compiled.export_library(str(library), fcompile=link, workspace_dir=str(workspace))
    except DeviceError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        raise DeviceError(f"a compiled kernel cannot be written to {workspace}: {said}") from error
