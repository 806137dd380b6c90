"""Kernels under ThreadSanitizer and AddressSanitizer: the launches of a call, recorded and run again by a program.

A sanitizer wants the whole of a program, which Python is not: what a call launches is written to a file, and a program
of the kernels, the shim and next to nothing else launches it again. Threads are fibers that the sanitizer knows; only
barriers and meetings of a warp order what they do.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mctune.backends.kept import scratch_in
from mctune.core.errors import DeviceError
from mctune.runtime.kernels.tvm.gpu.functions import Grid, Signature
from mctune.verify.cuda_cpu.build import FLAGS, HERE, compiled, digest_of, shim
from mctune.verify.cuda_cpu.source import on_cpu

SANITIZERS = {"threads": ("thread", "MCTUNE_THREADS"), "addresses": ("address", "MCTUNE_ADDRESSES")}
"""Flag of the compiler and macro of the shim, by what is watched."""
_LIMIT_S = 300.0
_SUMMARY = re.compile(
    r"(?:WARNING|ERROR): (?:Thread|Address)Sanitizer: ([^\n(]+?)(?: \(pid=\d+\)| on |$)", re.MULTILINE
)


@dataclass(frozen=True)
class Launched:
    """One launch: what was passed, tensors as they were before it."""

    signature: Signature
    grid: Grid
    values: Mapping[str, Any]

    def packed(self) -> bytes:
        """As the program reads it."""
        name = self.signature.symbol.encode()
        parts = [struct.pack("<i", len(name)), name]
        parts.append(struct.pack("<5i", *self.grid, self.signature.threads, self.signature.shared))
        parts.append(struct.pack("<i", len(self.signature.parameters)))
        for parameter, kind in self.signature.parameters:
            value = self.values[parameter]
            if kind.endswith("*"):
                data = bytes(value.detach().contiguous().view(torch.uint8).numpy().data) if value.numel() else b""
                parts += [struct.pack("<q", len(data)), data]
            else:
                parts.append(struct.pack("<qi" if kind == "int" else "<qf", -1, value))
        return b"".join(parts)


@dataclass
class Recording:
    """A kernel that remembers its launches before it runs them."""

    function: Any
    into: list[Launched] = field(default_factory=list)

    def __call__(self, grid: Grid, values: Mapping[str, Any]) -> None:
        kept = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in values.items()}
        self.into.append(Launched(self.function.signature, grid, kept))
        self.function(grid, values)


def recorded(functions: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict[str, Recording]], list[Launched]]:
    """The kernels of operations, remembering their launches; and the list of these."""
    launches: list[Launched] = []
    made = {
        operation: {name: Recording(function, launches) for name, function in kernels.items()}
        for operation, kernels in functions.items()
    }
    return made, launches


def program(source: str, watch: str, folder: Path) -> Path:
    """The program of the kernels of CUDA C ``source`` under a sanitizer, in ``folder``; kept, should it be there.

    Raises:
        DeviceError: if the compiler fails.
    """
    flag, macro = SANITIZERS[watch]
    text = on_cpu(source)
    options, known = [*FLAGS, f"-I{HERE}", f"-D{macro}"], digest_of(*shim())
    objects = []
    # The shim itself is not watched: what it does for a thread, it says.
    for name, level in (("device", "-O2"), ("again", "-O1")):
        path = folder / f"{name}_{watch}_{known}.o"
        objects.append(str(compiled(path, [*options, level, "-c", str(HERE / f"{name}.cpp")])))
    path = folder / f"{watch}_{digest_of(text, known)}"
    return compiled(path, [*objects, *options, f"-fsanitize={flag}", "-O1", "-g1"], text)


def watched(launches: Sequence[Launched], source: str, watch: str, folder: Path, seed: int = 0) -> str:
    """What a sanitizer reports of launches of kernels of one source; empty if nothing.

    Raises:
        DeviceError: if the program does not run.
    """
    made = program(source, watch, folder)
    with scratch_in(folder, "cuda") as scratch:
        file = Path(scratch, "launches")
        file.write_bytes(b"".join(launch.packed() for launch in launches))
        options = {
            "TSAN_OPTIONS": "halt_on_error=1 report_signal_unsafe=0 exitcode=66",
            "ASAN_OPTIONS": "detect_leaks=0 exitcode=66 detect_stack_use_after_return=0",
        }
        # Sanitizers want their addresses where the system would put none at random.
        command = ["setarch", "-R", str(made), str(file), str(seed)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, env=options | _PATH
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeviceError(f"a kernel's program under a sanitizer does not run: {error}") from error
    if done.returncode == 0:
        return ""
    if done.returncode == 3:
        return done.stderr.strip().removeprefix("FAILED ")
    if found := _SUMMARY.search(done.stderr):
        return found[1].strip()
    raise DeviceError(f"a kernel's program under a sanitizer ended with {done.returncode}: {done.stderr[-300:]}")


_PATH = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
