"""Launch the backward kernels that TVM made for a GPU: states; gradients of the read, of gates, states and writes."""

from __future__ import annotations

from typing import Any

from ....triton.matrix.backward import TritonBackward
from ..functions import aligned
from .parts import OfMachineCode


class TvmGpuBackward(OfMachineCode, TritonBackward):
    """The gradients of y = memory_caching(q, k, v, u) on an NVIDIA GPU, by machine code of one configuration.

    Arguments are those of :class:`OfMachineCode`.
    """

    def __call__(self, dy: Any, q: Any, k: Any, v: Any, u: Any, **options: Any) -> Any:
        """As :class:`TritonBackward`; what is not aligned is copied."""
        return super().__call__(*(aligned(x) for x in (dy, q, k, v, u)), **options)


LAUNCHER = TvmGpuBackward
