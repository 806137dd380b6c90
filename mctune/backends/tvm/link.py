"""The C compiler of the machine, which links kernels: found, tried, and blamed for what is not a candidate's fault."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mctune.core.errors import DeviceError
from mctune.runtime.errors import KernelError
from mctune.runtime.kernels.tvm.compiler import c_compiler

_NAMES = ("g++", "gcc", "clang++", "clang", "c++", "cc")
_LIMIT_S = 60.0


def compiler() -> list[str]:
    """The words of the command that links: of ``CXX``, else ``CC``, else the first that is installed.

    Raises:
        DeviceError: if there is no such program.
    """
    try:
        return c_compiler(("CXX", "CC"), _NAMES)
    except KernelError as error:
        raise DeviceError(str(error)) from None


def link(output: str, files: Sequence[str], options: Sequence[str] | None = None) -> None:
    """Link ``files`` into the shared library ``output``, as ``tvm.runtime.Module.export_library`` asks for it.

    What a linker refuses here is never the candidate: LLVM has compiled that before.

    Raises:
        DeviceError: with the command and what it said.
    """
    command = [*compiler(), "-shared", "-fPIC", "-o", output, *files, *(options or ())]
    what = shlex.join(command[: len(command) - len(files) - 4])
    try:
        done = _run(command)
        if done.returncode < 0 or "Killed" in done.stderr:  # from outside (short of memory, say), which may be over
            done = _run(command)
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{what} did not link a kernel within {_LIMIT_S:g} s; look at CXX and CC") from None
    except OSError as error:
        raise DeviceError(f"{what} cannot be run: {error.strerror}; look at CXX and CC") from error
    if done.returncode != 0 or not Path(output).is_file():
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        telling = next((line for line in lines if "error" in line or "No space" in line), lines[-1] if lines else "")
        said = telling[:300] or f"exit status {done.returncode}, and not a word"
        raise DeviceError(f"{what} cannot link kernels: {said}; look at CXX, CC and TMPDIR ({_scratch()})")


def _scratch() -> str:
    """Where a compiler writes, which looks elsewhere less readily than Python."""
    return os.environ.get("TMPDIR") or tempfile.gettempdir()


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S)


def try_linking(folder: Path | None = None) -> None:
    """Link next to nothing, where kernels will be: what fails would fail for every candidate.

    Raises:
        DeviceError: with the reason.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="mctune-", dir=folder) as scratch:
            source = Path(scratch, "nothing.c")
            source.write_text("int mctune_nothing(void) { return 0; }\n", encoding="utf-8")
            link(str(Path(scratch, "nothing.so")), [str(source)])
    except OSError as error:
        raise DeviceError(
            f"kernels cannot be written to {folder or tempfile.gettempdir()}: {error.strerror or error}; "
            "see that it exists, has room and may be written"
        ) from error
