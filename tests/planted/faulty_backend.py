"""A backend whose compiled kernels fail in the way that ``config["fault"]`` says; see ``faulty_read``."""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path

from faulty_read import build as read_forward

from mctune.backends.protocol import Built
from mctune.backends.tvm import TvmBackend
from mctune.backends.tvm.templates import render
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import Target


class FaultyBackend(TvmBackend):
    """The TVM backend with the real ``segment_states`` and the planted ``read_forward``."""

    name = "faulty"

    def build(self, problem: Problem, config: Config, target: Target, folder: Path) -> Built:
        fault = config["fault"]
        if fault == "build_aborts":
            os.abort()
        if fault == "build_hangs":
            time.sleep(600)
        if fault == "build_raises":
            raise ValueError("planted: the template\nrefuses this\n")
        name = f"{fault}_{target.arch}"
        built = Built(folder / f"{name}.so", folder / f"{name}.py")
        if built.library.is_file():
            return built
        tvm = importlib.import_module("tvm")
        problem = self.padded(problem)
        real = self.space(problem).default.replace(parallel="segment", cols=16, state_rows=2, state_cols=16)
        module = render(problem, real, target)
        module["read_forward"] = read_forward(problem, fault)
        device = tvm.target.Target({"kind": "llvm", "mcpu": target.arch, "mtriple": "x86_64-linux-gnu"})
        compiled = tvm.compile(module, target=device)
        # Workers of the tests share the folder, and some are killed.
        text, scratch = (file.with_suffix(f".{os.getpid()}.tmp{file.suffix}") for file in (built.source, built.library))
        text.write_text(module.script())
        text.replace(built.source)
        compiled.export_library(str(scratch))
        scratch.replace(built.library)
        return built
