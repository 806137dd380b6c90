"""Load an exported TVM kernel without TVM: apache-tvm-ffi, and a small library that runs its loops on torch's threads.

A kernel library calls its host through three pointers. Where nothing filled them it would crash, so everything that
fills them is checked here first, and what is missing is an error that says what to install.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ...errors import KernelError
from ...manifest import CONTENTS, ROOT, digest
from ...whole import is_whole, take_note
from .compiler import c_compiler

FFI_VERSION = "0.1.14.post1"
"""The apache-tvm-ffi that the kernels are exported and tested with; 0.1.15 crashes with apache-tvm 0.27."""
_FFI_REMEDY = f"pip install apache-tvm-ffi=={FFI_VERSION}"
_SOURCE = Path(__file__).with_name("threads.c")
_PREBUILT = ROOT / "kernels" / "threads.so"
_SYMBOLS = {
    "__TVMBackendParallelLaunch": "mctune_parallel_launch",
    "__TVMBackendAllocWorkspace": "mctune_alloc_workspace",
    "__TVMBackendFreeWorkspace": "mctune_free_workspace",
}


@cache
def load_library(path: Path) -> Any:
    """The functions of an exported kernel library, by name.

    Raises:
        KernelError: if the machine, apache-tvm-ffi or the library cannot run it.
    """
    functions = _host_functions()
    import tvm_ffi

    file = _file(path)
    # A library takes its pointers as it is loaded, and an `import tvm` at any time puts its own pool in their place.
    _register(functions)
    try:
        # What `tvm_ffi.load_module` does, which tells by the path's ending that it is a library.
        module = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(file, "so")
        tvm_ffi.get_global_func("ffi.ModuleGlobalsAdd")(module)
        return module
    except (OSError, RuntimeError) as error:
        raise KernelError(f"kernel library {path.name} does not load: {error}") from error


def _file(library: Path) -> str:
    """What the dynamic linker opens for a library: of a package, a private copy in memory of what was verified.

    Whatever becomes of the package's file, before it is loaded or while it is mapped, does not reach the process.

    Raises:
        KernelError: if there is none, or no such copy can be made.
    """
    if CONTENTS is None:
        if not library.is_file():
            raise KernelError(f"kernel library {library} is missing; emit the package again with `mctune emit`")
        return str(library)
    data = CONTENTS.of(library)
    if data is None:
        raise KernelError(f"{library} is not in the package's manifest; emit the package again with `mctune emit`")
    try:
        # It stays open: by its number the linker tells it from others.
        descriptor = os.memfd_create(library.name)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
    except OSError as error:
        raise KernelError(f"no memory file for {library.name} can be made here: {error}") from error
    return f"/proc/self/fd/{descriptor}"


@cache
def host_flags() -> frozenset[str]:
    """The flags of this CPU, as /proc/cpuinfo names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def runnable(library: Path, record: Mapping[str, Any]) -> Path:
    """The build of a kernel that this CPU can execute: the tuned one, else the portable one (x86-64-v3).

    Raises:
        KernelError: if it can execute neither; running it all the same would be an illegal instruction.
    """
    lacking = sorted(set(record.get("cpu_flags", ())) - host_flags())
    if not lacking:
        return library
    if record.get("portable") and {"avx2", "fma", "bmi2", "f16c"} <= host_flags():
        return library.with_name(Path(record["portable"]).name)
    raise KernelError(f"{library.name} needs {', '.join(lacking)}, which this CPU lacks; tune for it: `mctune search`")


@cache
def _host_functions() -> dict[str, ctypes.c_void_p]:
    """The functions through which kernels reach threads and scratch memory, by the name of their pointer."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise KernelError(
            f"the kernels are for Linux on x86_64, this is {platform.system()} on {platform.machine()}; "
            'use backend="eager"'
        )
    _check_ffi()
    threads = _threads()
    threads.mctune_set_openmp(*_openmp())
    return {symbol: ctypes.cast(getattr(threads, name), ctypes.c_void_p) for symbol, name in _SYMBOLS.items()}


def _register(functions: Mapping[str, ctypes.c_void_p]) -> None:
    """Have apache-tvm-ffi fill these pointers in the libraries that it loads from now on."""
    from tvm_ffi import libinfo

    # Kernels resolve their error helper in the process's global scope.
    ffi = ctypes.CDLL(libinfo.find_libtvm_ffi(), mode=ctypes.RTLD_GLOBAL)
    register = ffi.TVMFFIEnvModRegisterContextSymbol
    register.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    for symbol, function in functions.items():
        if register(symbol.encode(), function) != 0:
            raise KernelError(f"apache-tvm-ffi refused to register {symbol}; {_FFI_REMEDY}")


def _check_ffi() -> None:
    try:
        installed = metadata.version("apache-tvm-ffi")
        import tvm_ffi  # noqa: F401
    except (metadata.PackageNotFoundError, ImportError) as error:
        raise KernelError(f"TVM kernels need apache-tvm-ffi: {_FFI_REMEDY}") from error
    if installed != FFI_VERSION and not installed.startswith("0.1.14"):
        raise KernelError(f"apache-tvm-ffi {installed} is installed; the kernels need 0.1.14: {_FFI_REMEDY}")


def _openmp() -> list[ctypes.c_void_p]:
    """The entry points of the OpenMP that torch itself uses."""
    folder = Path(torch.__file__).parent / "lib"
    candidates = [None, *sorted(map(str, folder.glob("lib*omp*.so*")))]
    for candidate in candidates:
        library = ctypes.CDLL(candidate)
        try:
            names = ("GOMP_parallel", "omp_get_max_threads", "omp_in_parallel")
            return [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in names]
        except AttributeError:
            continue
    raise KernelError('torch\'s OpenMP library was not found; use backend="eager"')


def _threads() -> ctypes.CDLL:
    """The compiled ``threads.c``: the package's own, or built once into the user's cache, or where that cannot be
    written, for this process alone."""
    if CONTENTS is not None:
        return ctypes.CDLL(_file(_PREBUILT))
    library = _cached()
    try:
        if library is not None:
            if not is_whole(library):
                build_threads_library(library)
                take_note(library)
            return ctypes.CDLL(str(library))
    except OSError:
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="mctune-") as folder:
            build_threads_library(Path(folder, "threads.so"))
            return ctypes.CDLL(str(Path(folder, "threads.so")))  # what is mapped stays
    except OSError as error:
        raise KernelError(
            f"{_SOURCE.name} cannot be compiled: neither {library} nor {tempfile.gettempdir()} can be written "
            f"({error}); see that one of them exists and has room (XDG_CACHE_HOME, TMPDIR)"
        ) from error


def _cached() -> Path | None:
    """Where the user's cache keeps the compiled ``threads.c``; ``None`` for a user without a home."""
    name = f"threads-{digest(_SOURCE.read_bytes())[:16]}.so"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mctune" / name
    except (OSError, RuntimeError):
        return None


def build_threads_library(library: Path) -> None:
    """Compile ``threads.c`` into ``library`` with the C compiler of the machine; it has the modes of the umask.

    Raises:
        KernelError: if there is no C compiler, or it fails, or there is no room.
    """
    compiler = c_compiler(("CC",), ("cc", "gcc", "clang"))
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mctune-", dir=library.parent) as folder:
        scratch = Path(folder, library.name)
        command = [*compiler, "-O2", "-std=c11", "-shared", "-fPIC", str(_SOURCE), "-o", str(scratch)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise KernelError(f"{shlex.join(compiler)} cannot be run ({error.strerror}); look at CC") from error
        if done.returncode != 0 or not scratch.is_file():
            said = done.stderr.strip()[-500:] or f"exit status {done.returncode}"
            raise KernelError(f"{shlex.join(compiler)} failed on {_SOURCE.name}: {said}; look at CC")
        scratch.replace(library)
