"""The TVM backend: templates compiled by LLVM into libraries that run without TVM."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NoReturn

from mctune.backends.protocol import Built, Kernel
from mctune.backends.registry import computes, refuse
from mctune.backends.spaces import load_space
from mctune.backends.tvm.templates import render, source_hash
from mctune.backends.tvm.versions import TVM, check_versions
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.core.space import SearchSpace
from mctune.core.target import Target
from mctune.runtime.kernels.results import padded
from mctune.runtime.kernels.support import Support
from mctune.runtime.kernels.tvm.backward import TvmBackward
from mctune.runtime.kernels.tvm.decode import TvmDecode
from mctune.runtime.kernels.tvm.forward import TvmForward

LAUNCHERS = {"forward": TvmForward, "backward": TvmBackward, "decode": TvmDecode}


class TvmBackend:
    """Templates of ``templates/tvm`` for a CPU."""

    name = "tvm"

    def space(self, problem: Problem) -> SearchSpace:
        """The parameters that the templates of ``problem`` take."""
        refuse(self.supports(problem))
        return load_space("tvm", problem.writes.family, problem.pass_)

    def measuring(self) -> TvmBackend:
        """The same: whatever it compiles is run."""
        return self

    def supports(self, problem: Problem) -> Support:
        """Whether a TVM template computes a problem."""
        return computes("tvm", problem)

    def ready(self, here: bool = True) -> None:
        """Refuse a missing TVM, a pair that crashes, or a machine without a C compiler.

        Raises:
            DeviceError: with what to install.
        """
        check_versions()

    def identity(self) -> dict[str, str]:
        """The TVM and the templates that results depend on."""
        return {"name": self.name, "tvm": TVM, "templates": source_hash()[:16]}

    def padded(self, problem: Problem) -> Problem:
        """The problem with the widths that kernels are compiled for: decode works in place, on exact ones."""
        if problem.pass_ == "decode":
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
        broken = self.space(problem).broken(config, problem, target)
        if broken:
            raise ValueError(f"{broken[0].name}: {broken[0].reason} ({config})")
        name = self._name(problem, config, target)
        built = Built(folder / f"{name}.so", folder / f"{name}.py")
        if built.library.is_file() and built.source.is_file():
            return built
        check_versions()
        import tvm

        module = render(self.padded(problem), config, target)
        device = tvm.target.Target({"kind": "llvm", "mcpu": target.arch, "mtriple": "x86_64-linux-gnu"})
        compiled = tvm.compile(module, target=device)
        folder.mkdir(parents=True, exist_ok=True)
        # Others may compile the same candidate into the same folder at the same time.
        text, scratch = (file.with_suffix(f".{os.getpid()}.tmp{file.suffix}") for file in (built.source, built.library))
        text.write_text(f"# {problem}\n# {config}\n{module.script()}\n", encoding="utf-8")
        text.replace(built.source)
        compiled.export_library(str(scratch))
        scratch.replace(built.library)
        return built

    def compile(self, problem: Problem, config: Config, built: Built, target: Target) -> NoReturn:
        """A CPU is always here to be measured.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"kernels for {target.name} are timed, not predicted; nothing is known of them but their time")

    def load(self, problem: Problem, config: Config, built: Built) -> Kernel:
        """The compiled candidate, through the same launcher that an emitted package uses."""
        return LAUNCHERS[problem.pass_](built.library, {"problem": problem.to_dict(), "config": config.to_dict()})

    def _name(self, problem: Problem, config: Config, target: Target) -> str:
        """What the library depends on: the templates, the static part of the problem, the configuration, the CPU."""
        compiled = self.padded(problem)
        widths = (compiled.Dk, compiled.Dv)
        static = (problem.pass_, problem.recurrence, problem.aggregation, problem.state_init, *widths)
        values = {name: value for name, value in config.to_dict().items() if name != "segment_length"}
        identity = json.dumps([source_hash(), static, values, target.arch, TVM], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        return f"{problem.pass_}_{problem.recurrence}_{problem.aggregation}_{problem.state_init}_{digest}"
