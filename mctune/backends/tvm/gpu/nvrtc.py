"""NVRTC, NVIDIA's compiler of CUDA C as a library, called by ctypes: machine code and what the assembler says of it."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mctune.core.errors import DeviceError

REMEDY = "pip install 'mctune[cuda-tvm]' (Linux, x86-64)"
_NAMES = ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so")
OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v", "--fmad=true")
"""No --use_fast_math: it would flush denormals to zero and make division, square roots and exponentials approximate.
Products and sums may become one operation, which rounds once instead of twice."""


class CompileError(RuntimeError):
    """NVRTC refuses a source."""


@dataclass(frozen=True)
class Resources:
    """What the assembler says of one kernel: registers and bytes of stack a thread, bytes of static shared memory."""

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Compiled:
    """A module: machine code, PTX, the resources of its kernels by name, and the rest of what was said."""

    cubin: bytes
    ptx: str
    resources: dict[str, Resources]
    notes: tuple[str, ...] = ()


def version() -> str:
    """Of the NVRTC that is found, ``12.9``.

    Raises:
        DeviceError: if there is none.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def architectures() -> tuple[str, ...]:
    """What it compiles for, ``sm_70`` and so on."""
    count = ctypes.c_int()
    _library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _library().nvrtcGetSupportedArchs(numbers)
    return tuple(f"sm_{number}" for number in numbers)


def compile_source(source: str, arch: str, name: str = "kernels.cu") -> Compiled:
    """Machine code for one architecture.

    Raises:
        CompileError: with the first error of the log.
        DeviceError: if NVRTC is missing, or does not know the architecture.
    """
    library = _library()
    if arch not in architectures():
        raise DeviceError(
            f"NVRTC {version()} compiles for {', '.join(architectures())}, not for {arch}; "
            "12.9 is the last that knows sm_70: pip install 'nvidia-cuda-nvrtc-cu12==12.9.*'"
        )
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
    try:
        options = [option.encode() for option in (f"--gpu-architecture={arch}", *OPTIONS)]
        status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _text(program, "ProgramLog").decode(errors="replace")
        if status != 0:
            raise CompileError(_telling(log) or _said(status))
        return Compiled(_text(program, "CUBIN"), _text(program, "PTX").decode().rstrip("\0"), *read_log(log))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


_ABOUT = re.compile(r"Compiling entry function '(\w+)' for '")
_STACK = re.compile(r"(\d+) bytes stack frame")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


def read_log(log: str) -> tuple[dict[str, Resources], tuple[str, ...]]:
    """The resources of every kernel in a log, and lines that warn."""
    found: dict[str, Resources] = {}
    notes: list[str] = []
    name, stack = "", 0
    for line in log.splitlines():
        if about := _ABOUT.search(line):
            name, stack = about[1], 0
        elif frame := _STACK.search(line):
            stack = int(frame[1])
        elif used := _USED.search(line):
            found[name] = Resources(int(used[1]), stack, int(used[2] or 0))
        elif "warning" in line.lower() and "declared but never referenced" not in line:
            notes.append(line.strip())
    return found, tuple(notes)


def _telling(log: str) -> str:
    errors = [line.strip() for line in log.splitlines() if "error" in line.lower()]
    return errors[0][:300] if errors else ""


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _said(status: int) -> str:
    text: bytes = _library().nvrtcGetErrorString(status)
    return text.decode()


def _check(status: int) -> None:
    if status != 0:
        raise DeviceError(f"NVRTC fails: {_said(status)}; {REMEDY}")


@cache
def _library() -> ctypes.CDLL:
    tried = []
    for place in (*_wheels(), *_NAMES):
        try:
            library = ctypes.CDLL(str(place))
        except OSError as error:
            tried.append(str(error))
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise DeviceError(f"NVRTC, which compiles TVM's CUDA C, is not installed; {REMEDY}")


def _wheels() -> list[Path]:
    """libnvrtc of the wheels of NVIDIA, 12 before 13: later ones no longer compile for sm_70."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    patterns = ("cuda_nvrtc/lib/libnvrtc.so.*", "cu*/lib/libnvrtc.so.*")
    found = [path for folder in folders for pattern in patterns for path in Path(folder).glob(pattern)]
    return sorted(found, key=lambda path: path.suffix)
