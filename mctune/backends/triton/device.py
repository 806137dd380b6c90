"""A virtual GPU: launches of Triton kernels compile for a target and are recorded instead of run.

What is launched is what is compiled: the launchers of ``mctune.runtime`` run unchanged, on tensors of device ``meta``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mctune.backends.protocol import Launch as Launch
from mctune.backends.triton.notes import notes_of, noting
from mctune.core.errors import DeviceError, MctuneError
from mctune.core.target import Target

THREADS_PER_BLOCK = 1024
REGISTERS_PER_BLOCK = 65536
"""32-bit registers that the threads of one block of a CUDA kernel may hold together (CUDA programming guide)."""
TENSOR_COLUMNS = 512
"""Columns of tensor memory that a block of sm_100 may hold (PTX ISA, "Tensor Memory"); others have none."""


class DoesNotFit(MctuneError):
    """``what`` takes more of ``unit`` than ``whose``, by default a block of the target, has."""

    def __init__(self, what: str, need: int, limit: int, unit: str, whose: str = "a block") -> None:
        super().__init__(f"{what} needs {need} {unit}, {whose} has {limit}")
        self.need, self.limit, self.unit = need, limit, unit
        self.operation = ""

    def at(self, operation: str) -> DoesNotFit:
        """The same, of this operation."""
        self.operation = operation
        return self

    @classmethod
    def of_ptxas(cls, message: str) -> DoesNotFit | None:
        """The assembler refuses a kernel one of whose instructions takes more registers than a thread has (C7602)."""
        found = _REGISTERS.search(message)
        if found is None:
            return None
        limit, kernel, need = found.groups()
        return cls(kernel, int(need), int(limit), "registers", "a thread of its blocks")


_REGISTERS = re.compile(r"Insufficient registers \((\d+)\).* in function (\w+).* register target of (\d+)")


def _described(metadata: Any) -> str:
    return f"{metadata.name} with {metadata.num_warps} warps and {metadata.num_stages} stages"


@dataclass(frozen=True)
class _Loaded:
    """What a kernel's "handle" is here."""

    registers: int
    spills: int
    asm: str
    binary: bytes
    notes: tuple[str, ...]
    unused: frozenset[int]
    """Places of parameters that the code has no use for."""


class VirtualDevice:
    """A driver for Triton, active inside ``with VirtualDevice(target) as device``.

    Attributes:
        launches: what was launched so far, in order.
        compiled: names of the kernels that were compiled, not found in Triton's cache on disk.
        operation: the one at work, of those that :meth:`watch` watches.

    Raises:
        DeviceError: on entering, in a process whose Triton interprets.
        DoesNotFit: from a launch whose kernel takes more than a block of the target has, or on leaving, in the place of
            the assembler's error, a thread.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.launches: list[Launch] = []
        self.compiled: list[str] = []
        self.operation = ""
        self.utils = _Utils(self)
        self.metadata: Any = None
        self._group: Mapping[str, str] = {}
        self._digest = ""
        self._before: tuple[Any, Any] = (None, None)
        self._noting = ExitStack()

    def __enter__(self) -> VirtualDevice:
        from triton import knobs
        from triton.runtime import driver

        if knobs.runtime.interpret:
            raise DeviceError("this process interprets Triton kernels; unset TRITON_INTERPRET to compile them")
        # ``driver.active`` would look for a GPU.
        self._before = (driver._active, knobs.compilation.listener)
        driver.set_active(self)
        knobs.compilation.listener = self._listen
        knobs.runtime.kernel_load_start_hook.add(self._about_to_load)
        if self.target.kind == "cuda":
            self._noting.enter_context(noting())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        from triton import knobs
        from triton.runtime import driver
        from triton.runtime.errors import PTXASError

        self._noting.close()
        knobs.runtime.kernel_load_start_hook.remove(self._about_to_load)
        driver._active, knobs.compilation.listener = self._before
        refused = DoesNotFit.of_ptxas(str(error)) if isinstance(error, PTXASError) else None
        if refused is not None:
            raise refused from None

    def watch(self, operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose launches are of ``operation``; it stays at work when it fails."""

        def watched(*arguments: Any, **named: Any) -> Any:
            self.operation = operation
            return function(*arguments, **named)

        return watched

    # --- what Triton asks of a driver

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """The driver that the JIT calls: it records launches.

        It refuses kernels that need too much tensor memory, before Triton does so in an error of its own.
        """
        columns = getattr(metadata, "tmem_size", None) or 0
        if columns > TENSOR_COLUMNS:
            raise DoesNotFit(_described(metadata), columns, TENSOR_COLUMNS, "columns of tensor memory")
        self.metadata = metadata
        return _Recorder(src, metadata)

    def get_current_target(self) -> Any:
        """The GPU as Triton's compiler names it."""
        from triton.backends.compiler import GPUTarget

        arch = self.target.arch
        if self.target.kind == "hip":
            return GPUTarget("hip", arch, 64)
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        """One number for each target: Triton keeps compiled kernels by device."""
        return _device_number(self.target)

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are."""
        return torch.device("meta")

    # --- what is recorded

    def _listen(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            self.compiled.append(src.name)

    def _about_to_load(self, module: Any, function: Any, name: str, group: Mapping[str, str], hash: str) -> None:
        self._group, self._digest = group, hash

    def load(self, name: str, binary: bytes, shared: int) -> _Loaded:
        """Judge a kernel that was just compiled or found on disk."""
        what, threads = _described(self.metadata), self.metadata.num_warps * self.get_current_target().warp_size
        for need, limit, unit in (
            (shared, self.target.shared_bytes, "B of shared memory"),
            (threads, THREADS_PER_BLOCK, "threads"),
        ):
            if need > limit:
                raise DoesNotFit(what, need, limit, unit)
        asm = self._text(".amdgcn" if self.target.kind == "hip" else ".ptx")
        registers, spills = _amd_usage(asm) if self.target.kind == "hip" else _cuda_usage(binary)
        if self.target.kind == "cuda" and registers * threads > REGISTERS_PER_BLOCK:
            raise DoesNotFit(what, registers * threads, REGISTERS_PER_BLOCK, "registers")
        notes = notes_of(self._digest, asm, self.metadata) if self.target.kind == "cuda" else ()
        return _Loaded(registers, spills, asm, binary, notes, _unused(self._text(".llir")))

    def _text(self, ending: str) -> str:
        """What the compiler made of the kernel at one stage."""
        return next((Path(path).read_text() for file, path in self._group.items() if file.endswith(ending)), "")


_NUMBERS: dict[Target, int] = {}


def _device_number(target: Target) -> int:
    return _NUMBERS.setdefault(target, len(_NUMBERS))


@dataclass(frozen=True)
class _Utils:
    """``driver.utils``."""

    device: VirtualDevice

    def get_device_properties(self, device: int) -> dict[str, int]:
        """No limit on shared memory: ``VirtualDevice.load`` checks it, and names the kernel."""
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": self.device.target.cores}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, _Loaded, int, int, int]:
        """Module, function, registers, spills and the most threads of a block; ``load`` checks the last."""
        loaded = self.device.load(name, kernel, shared)
        return None, loaded, loaded.registers, loaded.spills, 1 << 30

    def unload_module(self, module: Any) -> None:
        """There is none."""


@dataclass(frozen=True)
class _Recorder:
    """A launcher. It outlives the device that its kernel was compiled under: the JIT keeps it, by target."""

    src: Any
    metadata: Any

    def __call__(self, x: int, y: int, z: int, stream: int, function: _Loaded, *rest: Any) -> None:
        from triton.runtime import driver

        device, metadata = driver.active, self.metadata
        # Before the arguments: packed metadata, launch metadata, and the hooks of entry and exit.
        given = zip(self.src.fn.arg_names, rest[4:], strict=True)
        device.launches.append(
            Launch(
                name=self.src.fn.__name__,
                grid=(int(x), int(y), int(z)),
                num_warps=metadata.num_warps,
                num_stages=metadata.num_stages,
                warp_size=device.get_current_target().warp_size,
                shared=metadata.shared,
                registers=function.registers,
                spills=function.spills,
                asm=function.asm,
                binary=function.binary,
                arguments=tuple(
                    one for place, one in enumerate(_members(self.src.signature)) if place not in function.unused
                ),
                values=tuple(_numbers(given)),
                notes=function.notes,
                operation=device.operation,
            )
        )


def _members(signature: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and types of a kernel's parameters as it is compiled; those of a named tuple one by one."""
    for name, kind in signature.items():
        fields = getattr(kind, "_fields", None)
        members = ((name, kind),) if fields is None else zip(fields, kind, strict=True)
        yield from ((member, str(kind)) for member, kind in members if str(kind) != "constexpr")


def _unused(llir: str) -> frozenset[int]:
    """Places of a kernel's parameters that LLVM found no use of, such as tensors of a tuple that only others read."""
    parameters = re.search(r"^define .*?@\w+\((.*)\) ", llir, re.MULTILINE)
    found = re.findall(r"([^%]*)%\d+", parameters[1]) if parameters else []
    return frozenset(place for place, about in enumerate(found) if "readnone" in about)


def _numbers(given: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, int | float | str]]:
    """Names and values of a launch's numbers; those of a named tuple one by one."""
    for name, value in given:
        if isinstance(value, (int, float, str)):
            yield name, value
        elif hasattr(value, "_fields"):
            yield from _numbers(zip(value._fields, value, strict=True))


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, of the one kernel in a cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise DeviceError(f"cuobjdump does not state a kernel's registers: {(done.stderr or done.stdout).strip()}")
    return int(found[1]), int(found[2])


def _amd_usage(asm: str) -> tuple[int, int]:
    """Vector registers (accumulation registers included) and bytes of scratch memory a thread, from the metadata."""
    counts = [re.search(rf"\.{name}:\s+(\d+)", asm) for name in ("vgpr_count", "private_segment_fixed_size")]
    if None in counts:
        raise DeviceError("the compiled kernel's metadata does not state its registers")
    registers, scratch = (int(count[1]) for count in counts if count is not None)
    return registers, scratch
