"""Kernels of one module of machine code, called by keyword on torch's tensors."""

from __future__ import annotations

import ctypes
import json
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ....errors import KernelError
from ....manifest import CONTENTS
from . import driver as drivers

_ALIGNED = 16
"""Bytes; kernels access so many at once."""
_FORMATS = {"int": "i4x", "float": "f4x"}
_MOST = 2**31 - 1


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

    def __call__(self, grid: Grid, **values: Any) -> None: ...


class Loaded:
    """A kernel of a module that the driver has loaded; thread-safe, and a launch in a graph is captured.

    Args:
        signature: of the kernel.
        module: the machine code, and its name in errors.
    """

    def __init__(self, signature: Signature, module: Module) -> None:
        self.signature, self.module = signature, module
        self.names = tuple(name for name, _ in signature.parameters)
        self._pointers = tuple(name for name, kind in signature.parameters if kind.endswith("*"))
        formats = ("Q" if kind.endswith("*") else _FORMATS[kind] for _, kind in signature.parameters)
        self._packed = struct.Struct("<" + "".join(formats))
        self._slots = threading.local()
        self._handles: dict[int, ctypes.c_void_p] = {}

    def __call__(self, grid: Grid, **values: Any) -> None:
        """Launch on the current stream of the tensors' device.

        Raises:
            KernelError: for a tensor of another device or one that is not aligned, or if the driver refuses.
        """
        places, where = 0, None
        for name in self._pointers:
            tensor = values[name]
            where = tensor.device if where is None else where
            if tensor.device != where or where.type != drivers.device():
                raise self._foreign(name, tensor, where)
            place = tensor.data_ptr()
            places |= place
            values[name] = place
        if places % _ALIGNED:
            raise self._unaligned(values)
        assert where is not None
        if where.type == "cpu" or where.index == torch.cuda.current_device():
            self._launch(grid, where, values)
        else:
            with torch.cuda.device(where):
                self._launch(grid, where, values)

    def _launch(self, grid: Grid, where: torch.device, values: Mapping[str, Any]) -> None:
        handle = self._handles.get(where.index or 0) or self._load(where.index or 0)
        slots = self._slots
        if not hasattr(slots, "buffer"):
            slots.buffer = ctypes.create_string_buffer(self._packed.size)
            base = ctypes.addressof(slots.buffer)
            count = len(self.names)
            slots.arguments = (ctypes.c_void_p * count)(*(base + 8 * place for place in range(count)))
        self._packed.pack_into(slots.buffer, 0, *[values[name] for name in self.names])
        stream = 0 if where.type == "cpu" else torch.cuda.current_stream(where).cuda_stream
        driver = drivers.driver()
        status = driver.launch(
            handle, *grid, self.signature.threads, 1, 1, self.signature.shared, stream, slots.arguments, None
        )
        if status:
            driver.check(status, f"{self.signature.symbol} cannot be launched with a grid of {grid}")

    def _load(self, index: int) -> ctypes.c_void_p:
        handle = self.module.function(index, self.signature)
        self._handles[index] = handle
        return handle

    def _foreign(self, name: str, tensor: torch.Tensor, where: torch.device) -> KernelError:
        other = where if where.type == drivers.device() else drivers.device()
        return KernelError(f"{name} is on {tensor.device}, and {self.signature.symbol} reads tensors of {other}")

    def _unaligned(self, values: Mapping[str, Any]) -> KernelError:
        name = next(name for name in self._pointers if values[name] % _ALIGNED)
        return KernelError(
            f"{name} begins at an address that is no multiple of the {_ALIGNED} bytes that {self.signature.symbol} "
            f"reads at once; pass {name}.clone()"
        )


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
