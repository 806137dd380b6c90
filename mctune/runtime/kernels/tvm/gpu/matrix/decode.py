"""Launch the decode kernels that TVM made for a GPU: new tokens over the cache, read and written in place."""

from __future__ import annotations

from ....triton.matrix.decode import TritonDecode
from .parts import OfMachineCode


class TvmGpuDecode(OfMachineCode, TritonDecode):
    """y of n new tokens of every sequence on an NVIDIA GPU, by machine code of one configuration.

    Arguments are those of :class:`OfMachineCode`.
    """


LAUNCHER = TvmGpuDecode
