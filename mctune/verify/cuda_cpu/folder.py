"""Where the kernels of a process are prepared for the stand-in, and the environment in which it is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from mctune.backends.protocol import Built
from mctune.core.errors import DeviceError
from mctune.runtime.kernels.tvm.gpu.driver import VARIABLE
from mctune.verify.cuda_cpu.build import prepare, stand_in

FOLDERS = "MCTUNE_CUDA_ON_CPU"
BY = "CUDA on CPU"
"""What verified a kernel, in a package's table."""


def environment(folder: Path) -> dict[str, str]:
    """Variables with which a process runs CUDA kernels on the CPU, out of ``folder``.

    Raises:
        DeviceError: if there is no compiler of C++ for it.
    """
    return {VARIABLE: str(stand_in(folder.resolve())), FOLDERS: str(folder.resolve())}


def active() -> bool:
    """Whether this process runs CUDA kernels on the CPU."""
    return bool(os.environ.get(VARIABLE)) and bool(os.environ.get(FOLDERS))


def prepare_built(built: Built) -> None:
    """Have the stand-in find the kernels of a candidate."""
    prepare_parts(built.library.parent, dict(built.parts))


def prepare_parts(kernels: Path, parts: dict[str, str]) -> None:
    """Have the stand-in find the kernels of some parts, whose files lie in ``kernels``.

    Raises:
        DeviceError: in a process without the stand-in.
    """
    if not active():
        raise DeviceError(f"{FOLDERS} is not set: this process does not run CUDA kernels on the CPU")
    folder = Path(os.environ[FOLDERS].split(":")[0])
    for name, file in parts.items():
        if name.endswith(".cubin"):
            source = kernels / parts[f"{name.removesuffix('.cubin')}.cu"]
            prepare((kernels / file).read_bytes(), source.read_text(encoding="utf-8"), folder)
