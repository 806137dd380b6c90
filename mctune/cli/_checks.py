"""What ``mctune doctor`` looks at. Nothing heavy is imported: distributions are asked for, not loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mctune.backends.triton.versions import HOPPER, hazards, misfit
from mctune.core.environment import TVM_PAIR, version
from mctune.core.errors import MctuneError
from mctune.core.paths import search_spaces_dir, templates_dir
from mctune.core.target import Target

OK, WARN, BAD = "ok", "warning", "problem"

NEEDED = {
    "torch": "reference, eager path and emitted packages",
    "apache-tvm": "compiles CPU kernels",
    "apache-tvm-ffi": "loads compiled kernels",
    "optuna": "the search",
    "numpy": "used by torch and optuna",
    "rich": "progress",
}
OPTIONAL = {
    "triton": "kernels for recent GPUs",
    "libcst": "renders Triton templates",
    "nvidia-cuda-nvrtc-cu12": "TVM's kernels for GPUs; `pip install 'mctune[cuda-tvm]'`, or of a CUDA toolkit",
}

TVM, FFI = TVM_PAIR
TRITON_OF_TORCH = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8", "2.15": "3.9"}
HOPPER_GPUS = ("H100", "H200", "H800", "H20", "GH200")
"""What the names of GPUs of :data:`HOPPER` contain."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TVM_NUM_THREADS")


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report; ``remedy`` is empty when all is well."""

    name: str
    status: str
    found: str
    remedy: str = ""


def all_checks(cpu: Target) -> list[Check]:
    """Every check, in the order in which they are printed."""
    installed = {package: version(package) for package in (*NEEDED, *OPTIONAL)}
    return [
        check_python(sys.version_info[:3]),
        *check_packages(installed),
        *check_pairs(installed),
        check_data(),
        *check_compilers(os.environ),
        check_cpu(cpu),
        *check_gpus(),
        *check_hazards(installed.get("triton"), nvidia_gpus()),
        *check_threads(os.environ, cpu.cores),
    ]


def check_python(release: tuple[int, ...]) -> Check:
    """3.10 to 3.13."""
    text = ".".join(str(part) for part in release)
    if (3, 10) <= release[:2] <= (3, 13):
        return Check("python", OK, text)
    return Check("python", WARN, text, "mctune is tested on Python 3.10 to 3.13")


def check_packages(installed: Mapping[str, str | None]) -> Iterator[Check]:
    """What must be there, and what may be."""
    for package, purpose in NEEDED.items():
        found = installed.get(package)
        remedy = "" if found else f"pip install {_pinned(package)} ({purpose})"
        yield Check(package, OK if found else BAD, found or "not installed", remedy)
    for package, purpose in OPTIONAL.items():
        yield Check(package, OK, installed.get(package) or f"not installed (optional: {purpose})")


def check_pairs(installed: Mapping[str, str | None]) -> Iterator[Check]:
    """Versions that must go together; nothing else checks them."""
    tvm, ffi = installed.get("apache-tvm"), installed.get("apache-tvm-ffi")
    if tvm and ffi:
        pair, fix = f"{tvm} with {ffi}", f"pip install apache-tvm=={TVM} apache-tvm-ffi=={FFI}"
        if (tvm, ffi) == (TVM, FFI):
            yield Check("tvm pair", OK, pair)
        elif tvm == TVM:
            # A later ffi crashes this compiler in tensorize (apache/tvm#20094, #20390 are of the same kind).
            yield Check("tvm pair", BAD, pair, f"apache-tvm {tvm} may crash with any apache-tvm-ffi but {FFI}: {fix}")
        else:
            yield Check("tvm pair", WARN, pair, f"tested only with {TVM} and {FFI}: {fix}")
    torch, triton = installed.get("torch"), installed.get("triton")
    if torch and triton:
        wanted = TRITON_OF_TORCH.get(_minor(torch))
        if wanted is None or _minor(triton) == wanted:
            yield Check("triton pair", OK, f"{torch} with {triton}")
        else:
            yield Check("triton pair", WARN, f"{torch} with {triton}", f"torch {torch} is built for triton {wanted}")
    numpy = installed.get("numpy")
    said = misfit(triton, numpy)
    if said:
        yield Check("interpreter", WARN, f"triton {triton} with numpy {numpy}", said)


def check_data() -> Check:
    """Templates and search spaces."""
    try:
        return Check("data", OK, f"{templates_dir()}, {search_spaces_dir()}")
    except MctuneError as error:
        return Check("data", BAD, "missing", str(error))


def check_compilers(environ: Mapping[str, str]) -> Iterator[Check]:
    """A C compiler links the exported kernels, a C++ compiler builds the shim that runs them on torch's threads."""
    for name, variable, candidates, package in (
        ("C compiler", "CC", ("cc", "gcc", "clang"), "gcc"),
        ("C++ compiler", "CXX", ("c++", "g++", "clang++"), "g++"),
    ):
        named = environ.get(variable)
        tried = (named.split()[0],) if named and named.split() else candidates
        found = next((path for path in map(shutil.which, tried) if path), None)
        remedy = "" if found else f"install one (apt-get install {package}) or set {variable}; tried {', '.join(tried)}"
        yield Check(name, OK if found else BAD, found or "not found", remedy)


def check_cpu(cpu: Target) -> Check:
    """The CPU, the device that is always there."""
    cores = f"{cpu.cores} core{'s' * (cpu.cores != 1)}"
    return Check("cpu", OK, f"{cpu.title}, {cores}, {cpu.arch}, {cpu.vector_floats} float32 lanes")


def check_gpus() -> Iterator[Check]:
    """GPUs, by the names that their drivers report."""
    listed = nvidia_gpus()
    for index, name in enumerate(listed):
        yield Check(f"gpu {index}", OK, name)
    if Path("/dev/kfd").exists():
        yield Check("gpu", OK, "an AMD GPU (/dev/kfd)")
    elif not listed:
        yield Check("gpu", OK, "none seen: for those of `mctune targets` kernels are compiled, and times predicted")


def nvidia_gpus() -> list[str]:
    """The names that nvidia-smi prints; none where it is absent or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def check_hazards(triton: str | None, gpus: Sequence[str]) -> Iterator[Check]:
    """What is known to go wrong with the installed Triton on GPUs of one architecture."""
    here = any(name in gpu for gpu in gpus for name in HOPPER_GPUS)
    for hazard in hazards(triton, HOPPER[0]) if triton else ():
        fixed = f"mended in {'.'.join(map(str, hazard.mended))}" if hazard.mended else "in every supported version"
        yield Check(
            f"triton: {hazard.name}", WARN if here else OK, f"{triton}, on {HOPPER[0]} only; {fixed}",
            f"{hazard.what} ({hazard.reports}); benchmarks/contact.py says whether it happens here, docs/gpu.md what "
            "avoids it" if here else "",
        )  # fmt: skip


def check_threads(environ: Mapping[str, str], cores: int) -> Iterator[Check]:
    """Thread variables that would make a measurement mean something else."""
    for variable in THREAD_VARIABLES:
        value = environ.get(variable)
        if value is None:
            yield Check(variable, OK, f"unset ({cores} cores)")
        elif value.isdigit() and int(value) == cores:
            yield Check(variable, OK, value)
        else:
            remedy = f"this machine has {cores} cores; unset {variable} unless another count is to be measured"
            yield Check(variable, WARN, value, remedy)
    pinned = environ.get("TVM_BIND_THREADS", "0") != "0"
    found = environ.get("TVM_BIND_THREADS", "unset")
    remedy = "TVM would pin the calling thread, and torch with it: set TVM_BIND_THREADS=0"
    yield Check("TVM_BIND_THREADS", WARN if pinned else OK, found, remedy if pinned else "")


def _pinned(package: str) -> str:
    return {"apache-tvm": f"apache-tvm=={TVM}", "apache-tvm-ffi": f"apache-tvm-ffi=={FFI}"}.get(package, package)


def _minor(text: str) -> str:
    return ".".join(text.split("+")[0].split(".")[:2])
