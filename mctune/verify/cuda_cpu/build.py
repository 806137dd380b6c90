"""Kernels as libraries for a CPU, and the shim beneath them: compiled once, and kept by what they came from."""

from __future__ import annotations

import hashlib
import os
import shlex
import struct
import subprocess
import sysconfig
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mctune.backends.kept import scratch_in
from mctune.core.errors import DeviceError
from mctune.runtime.errors import KernelError
from mctune.runtime.kernels.tvm.compiler import c_compiler
from mctune.verify.cuda_cpu.source import on_cpu

HERE = Path(__file__).parent
FLAGS = ("-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-w")
# What a thread has not written is no zero.
_UNWRITTEN = "-ftrivial-auto-var-init=pattern"
_LIMIT_S = 300.0
_SHIM = ("device.h", "device.cpp", "driver.cpp", "again.cpp")


def compiler() -> list[str]:
    """The words of the command that compiles C++.

    Raises:
        DeviceError: if there is none, or it is not for x86-64.
    """
    machine = sysconfig.get_platform()
    if not machine.endswith("x86_64"):
        raise DeviceError(f"CUDA kernels are verified on CPUs of x86-64, and this is {machine}")
    try:
        return c_compiler(("CXX",), ("g++", "clang++", "c++"))
    except KernelError as error:
        raise DeviceError(str(error)) from None


def library(source: str, folder: Path, level: str = "-O1") -> Path:
    """The library of the kernels of CUDA C ``source``, in ``folder``; kept, should it be there already.

    Raises:
        MctuneError: if the source is not what the shim knows.
        DeviceError: if the compiler fails.
    """
    text = on_cpu(source)
    name = digest_of(text, *shim(), level)
    return compiled(folder / f"cpu_{name}.so", [*FLAGS, _UNWRITTEN, level, f"-I{HERE}", "-shared"], text)


def stand_in(folder: Path) -> Path:
    """A library in ``folder`` that stands in for libcuda, and runs kernels on this CPU; kept, should it be there.

    Raises:
        DeviceError: if it does not compile.
    """
    sources = [str(HERE / name) for name in ("device.cpp", "driver.cpp")]
    return compiled(folder / f"libcuda_{digest_of(*shim())}.so", [*FLAGS, "-O2", "-shared", *sources, "-ldl"])


def compiled(path: Path, words: Sequence[str], text: str | None = None) -> Path:
    """What the compiler makes of ``words`` and of C++ ``text``, if any; kept at ``path``, should it be there.

    Raises:
        DeviceError: if it fails.
    """
    if path.is_file():
        return path
    with scratch_in(path.parent, "cuda") as scratch:
        code, made = Path(scratch, "kernels.cpp"), Path(scratch, "made")
        if text is not None:
            code.write_text(text, encoding="utf-8")
        sources = [] if text is None else [str(code)]
        run([*compiler(), *sources, *words, "-o", str(made)])
        made.replace(path)
    return path


def prepare(image: bytes, source: str, folder: Path) -> Path:
    """The kernels of CUDA C ``source``, for the stand-in to find where it is asked to load their machine code.

    Raises:
        MctuneError: if the source is not what the shim knows.
        DeviceError: if the compiler fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_hash(image):016x}.so"
    made = library(source, folder)
    if not (path.is_symlink() and path.resolve() == made.resolve()):
        scratch = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        scratch.symlink_to(made.name)
        scratch.replace(path)
    return path


def _hash(image: bytes) -> int:
    """FNV-1a of a file of machine code, which says itself how long it is, as the stand-in computes it."""
    (segments, sections), (size_s, count_s, size_h, count_h) = (
        struct.unpack_from("<QQ", image, 0x20), struct.unpack_from("<HHHH", image, 0x36),
    )  # fmt: skip
    value = 14695981039346656037
    for byte in image[: max(sections + size_h * count_h, segments + size_s * count_s)]:
        value = (value ^ byte) * 1099511628211 & (1 << 64) - 1
    return value


def run(command: list[str]) -> str:
    """Run a command of the compiler.

    Raises:
        DeviceError: with the first error that it reports.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{command[0]} did not compile a kernel for the CPU within {_LIMIT_S:g} s") from None
    except OSError as error:
        raise DeviceError(f"{command[0]} cannot be run: {error.strerror}; look at CXX") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        raise DeviceError(f"{shlex.join(command[:1])} cannot compile a kernel for the CPU: {lines[0][:300]}")
    return done.stdout


@cache
def shim() -> tuple[str, ...]:
    return tuple((HERE / name).read_text(encoding="utf-8") for name in _SHIM)


def digest_of(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()[:16]
