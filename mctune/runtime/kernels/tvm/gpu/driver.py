"""The CUDA driver by ctypes: modules of machine code, and launches on torch's current stream.

``MCTUNE_LIBCUDA`` names another library than the system's. The one that mctune builds to verify kernels without a GPU
runs their CUDA C on the CPU, on tensors of the CPU.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache

import torch

from ....errors import KernelError

VARIABLE = "MCTUNE_LIBCUDA"
_NAMES = ("libcuda.so.1", "libcuda.so")
_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ALWAYS = 48 << 10
_WORDS = {
    100: "there is no CUDA device",
    200: "the machine code is damaged",
    209: "the machine code is for another architecture than this GPU",
    500: "the machine code has no such kernel",
    700: "a kernel has accessed memory that is not its own",
    719: "a kernel has failed",
}


def stands_in() -> bool:
    """Whether kernels run on the CPU, by the library that ``MCTUNE_LIBCUDA`` names."""
    return bool(os.environ.get(VARIABLE))


def device() -> str:
    """torch's name of the device that kernels read tensors of."""
    return "cpu" if stands_in() else "cuda"


class Driver:
    """The functions of a driver library.

    Args:
        path: of the library.

    Raises:
        KernelError: if it cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        try:
            self.library = ctypes.CDLL(path)
        except OSError as error:
            raise KernelError(
                f"the CUDA driver {path} does not load: {error}; kernels need an NVIDIA GPU and its driver"
            ) from error
        pointer, number = ctypes.c_void_p, ctypes.c_int
        # What a launch is made of is in one structure: a call with all of it in arguments takes three times as long.
        self.launch = self.library.cuLaunchKernelEx
        self.launch.argtypes = [pointer] * 4
        for name, types in (
            ("cuModuleLoadData", [pointer, ctypes.c_char_p]),
            ("cuModuleGetFunction", [pointer, pointer, ctypes.c_char_p]),
            ("cuFuncSetAttribute", [pointer, number, number]),
        ):
            getattr(self.library, name).argtypes = types
        self.check(self.library.cuInit(0), "the CUDA driver does not start")

    def load(self, image: bytes, name: str) -> ctypes.c_void_p:
        """A module on the current device.

        Raises:
            KernelError: if this GPU cannot run it.
        """
        module = ctypes.c_void_p()
        self.check(self.library.cuModuleLoadData(ctypes.byref(module), image), f"{name} does not load")
        return module

    def function(self, module: ctypes.c_void_p, symbol: str, shared_bytes: int) -> ctypes.c_void_p:
        """A kernel of a module, which may have so much shared memory.

        Raises:
            KernelError: if there is no such kernel, or the GPU has less.
        """
        found = ctypes.c_void_p()
        status = self.library.cuModuleGetFunction(ctypes.byref(found), module, symbol.encode())
        self.check(status, f"{symbol} is not in its module")
        if shared_bytes > _ALWAYS:
            status = self.library.cuFuncSetAttribute(found, _SHARED_BYTES, shared_bytes)
            self.check(status, f"{symbol} needs {shared_bytes} bytes of shared memory a block, more than this GPU has")
        return found

    def check(self, status: int, what: str) -> None:
        """Raise what a status other than 0 says.

        Raises:
            KernelError: beginning with ``what``.
        """
        if status != 0:
            words = None if stands_in() else _WORDS.get(status)
            raise KernelError(f"{what}: {words or self._text(status)} (CUDA error {status})")

    def _text(self, status: int) -> str:
        text = ctypes.c_char_p()
        if self.library.cuGetErrorString(status, ctypes.byref(text)) != 0 or text.value is None:
            return "an unknown error"
        return text.value.decode()


_loading = threading.Lock()


@cache
def _driver(path: str) -> Driver:
    return Driver(path)


def driver() -> Driver:
    """The driver of this process.

    Raises:
        KernelError: if there is none.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return _driver(named)
    if not torch.cuda.is_available():
        raise KernelError("torch sees no CUDA device, and these kernels are for NVIDIA GPUs; use backend='eager'")
    if torch.version.hip is not None:
        raise KernelError("this torch is for AMD's GPUs, and these kernels are for NVIDIA's; use backend='eager'")
    error: KernelError | None = None
    for name in _NAMES:
        try:
            return _driver(name)
        except KernelError as failure:
            error = error or failure
    assert error is not None
    raise error
