"""Kernels of one module of machine code, called on torch's tensors by the names of their parameters."""

from __future__ import annotations

import ctypes
import json
import math
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import torch

from ....errors import KernelError
from ....manifest import CONTENTS
from . import driver as drivers

_ALIGNED = 16
"""Bytes; kernels access so many at once."""
_LAUNCH = "7I4xQ16x"
"""CUlaunchConfig: sides of the grid and of a block, shared bytes a block, the stream, no attributes."""
_FORMATS = {"int": "i4x", "float": "f4x"}
_MOST = 2**31 - 1
_PLACE = torch.Tensor.data_ptr
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream)
"""The current stream of a device, as a number."""


@dataclass(frozen=True)
class Signature:
    """What a kernel is called with: parameters in their order, (name, type of C); threads and shared bytes a block."""

    symbol: str
    parameters: tuple[tuple[str, str], ...]
    threads: int
    shared: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Signature:
        """From its record in a module's JSON."""
        parameters = tuple((name, kind) for name, kind in record["parameters"])
        return cls(record["symbol"], parameters, record["threads"], record["shared"])


Grid = tuple[int, int, int]


class Function(Protocol):
    """A kernel, ready to be launched."""

    def __call__(self, grid: Grid, values: Mapping[str, Any]) -> None: ...


class Loaded:
    """A kernel of a module that the driver has loaded; thread-safe, and a launch in a graph is captured.

    Args:
        signature: of the kernel.
        module: the machine code, and its name in errors.
    """

    def __init__(self, signature: Signature, module: Module) -> None:
        self.signature, self.module = signature, module
        pointers = tuple(name for name, kind in signature.parameters if kind.endswith("*"))
        numbers = tuple((name, kind) for name, kind in signature.parameters if not kind.endswith("*"))
        self._pointers = pointers
        self._tensors, self._numbers = _getter(pointers), _getter([name for name, _ in numbers])
        self._block = (signature.threads, 1, 1, signature.shared)
        formats = "Q" * len(pointers) + "".join(_FORMATS[kind] for _, kind in numbers)
        self._packed = struct.Struct(f"<{_LAUNCH}{formats}")
        # Tensors are packed before numbers; the driver is told where each parameter is.
        packed = [*pointers, *(name for name, _ in numbers)]
        head = struct.calcsize(f"<{_LAUNCH}")
        self._offsets = [head + 8 * packed.index(name) for name, _ in signature.parameters]
        self._rooms = threading.local()
        self._ready: dict[int, tuple[Any, ctypes.c_void_p]] = {}

    def __call__(self, grid: Grid, values: Mapping[str, Any]) -> None:
        """Launch on the current stream of the tensors' device.

        Raises:
            KernelError: for a tensor of another device or one that is not aligned, or if the driver refuses.
        """
        tensors = self._tensors(values)
        places = [*map(_PLACE, tensors)]
        # Whoever calls has made sure that all are on one device.
        index = tensors[0].get_device()
        # A place is 0 where a tensor is empty, or has no memory.
        if 0 in places or index not in self._ready:
            self._refuse_foreign(tensors)
        # 16 divides all of them if it divides their greatest common divisor.
        if math.gcd(*places) % _ALIGNED:
            raise self._unaligned(places)
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self(grid, values)
            return
        launch, handle = self._ready.get(index) or self._load(index)
        try:
            buffer, arguments = self._rooms.both
        except AttributeError:
            buffer, arguments = self._rooms.both = self._room()
        stream = _stream(index) if index >= 0 else 0
        self._packed.pack_into(buffer, 0, *grid, *self._block, stream, *places, *self._numbers(values))
        status = launch(buffer, handle, arguments, None)
        if status:
            drivers.driver().check(status, f"{self.signature.symbol} cannot be launched with a grid of {grid}")

    def _room(self) -> tuple[Any, Any]:
        """A thread's memory for what is packed, and the addresses of the parameters in it."""
        buffer = ctypes.create_string_buffer(self._packed.size)
        base = ctypes.addressof(buffer)
        return buffer, (ctypes.c_void_p * len(self._offsets))(*(base + offset for offset in self._offsets))

    def _load(self, index: int) -> tuple[Any, ctypes.c_void_p]:
        ready = drivers.driver().launch, self.module.function(max(index, 0), self.signature)
        self._ready[index] = ready
        return ready

    def _refuse_foreign(self, tensors: Sequence[torch.Tensor]) -> None:
        """One line for the first tensor that is elsewhere than the first, or than kernels read."""
        where = tensors[0].device
        for name, tensor in zip(self._pointers, tensors, strict=True):
            if tensor.device != where or where.type != drivers.device():
                other = where if where.type == drivers.device() else drivers.device()
                raise KernelError(f"{name} is on {tensor.device}, and {self.signature.symbol} reads tensors of {other}")

    def _unaligned(self, places: Sequence[int]) -> KernelError:
        name = next(name for name, place in zip(self._pointers, places, strict=True) if place % _ALIGNED)
        return KernelError(
            f"{name} begins at an address that is no multiple of the {_ALIGNED} bytes that {self.signature.symbol} "
            f"reads at once; pass {name}.clone()"
        )


def _getter(names: Sequence[str]) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    """A function that gives the values of some names."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda values: [values[name] for name in names]


class Module:
    """Machine code of one architecture, loaded once on each device.

    Args:
        image: the cubin.
        name, arch: for errors.
    """

    def __init__(self, image: bytes, name: str, arch: str) -> None:
        self.image, self.name, self.arch = image, name, arch
        self._lock = threading.Lock()
        self._loaded: dict[int, ctypes.c_void_p] = {}

    def function(self, index: int, signature: Signature) -> ctypes.c_void_p:
        """A kernel on the current device, whose number is ``index``.

        Raises:
            KernelError: if this GPU cannot run it.
        """
        driver = drivers.driver()
        with self._lock:
            if index not in self._loaded:
                self._refuse_other(index)
                self._loaded[index] = driver.load(self.image, self.name)
            return driver.function(self._loaded[index], signature.symbol, signature.shared)

    def _refuse_other(self, index: int) -> None:
        """Machine code runs on GPUs of its major architecture, from its minor one on."""
        if drivers.stands_in():
            return
        major, minor = torch.cuda.get_device_capability(index)
        wanted = divmod(int(self.arch.removeprefix("sm_")), 10)
        if major != wanted[0] or minor < wanted[1]:
            raise KernelError(
                f"{self.name} is machine code for {self.arch}, and {torch.cuda.get_device_name(index)} is "
                f"sm_{major}{minor}; tune kernels for it with `mctune search`"
            )


def load_parts(folder: Path, parts: Mapping[str, str]) -> dict[str, dict[str, Loaded]]:
    """The kernels of each operation by name; ``parts``: of every operation a JSON, and as ``NAME.cubin`` its code.

    Raises:
        KernelError: if a file is missing or damaged, or there is no driver.
    """
    drivers.driver()
    found = {}
    for operation, file in parts.items():
        if "." in operation:
            continue
        record = json.loads(_bytes(folder / file))
        module = Module(_bytes(folder / parts[f"{operation}.cubin"]), file, record["arch"])
        signatures = [Signature.of(kernel) for kernel in record["kernels"]]
        found[operation] = {signature.symbol: Loaded(signature, module) for signature in signatures}
        if not drivers.stands_in():
            for function in found[operation].values():
                # Before a graph may be captured.
                function._load(torch.cuda.current_device())
    return found


def _bytes(path: Path) -> bytes:
    """A file: of a package, what was verified.

    Raises:
        KernelError: if there is none.
    """
    if CONTENTS is not None:
        data = CONTENTS.of(path)
        if data is None:
            raise KernelError(f"{path} is not in the package's manifest; emit the package again with `mctune emit`")
        return data
    try:
        return path.read_bytes()
    except OSError as error:
        raise KernelError(
            f"kernel {path} cannot be read: {error.strerror}; emit the package again with `mctune emit`"
        ) from error


def check_reach(*sizes: int) -> None:
    """Refuse arrays of more elements than the kernels' 32-bit indices reach.

    Raises:
        KernelError: naming the largest.
    """
    if max(sizes) > _MOST:
        raise KernelError(
            f"an array of {max(sizes)} elements exceeds 2^31 - 1; split the batch, or use backend='eager'"
        )


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, and at a multiple of 16 bytes: the tensor itself where it is."""
    x = x.contiguous()
    return x if x.is_meta or x.data_ptr() % _ALIGNED == 0 else x.clone()


def blocks(count: int, each: int) -> int:
    """Blocks of ``each`` that hold ``count``."""
    return -(-count // each)
