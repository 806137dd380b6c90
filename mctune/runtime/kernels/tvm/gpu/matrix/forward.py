"""Launch the forward kernels that TVM made for a GPU: segment states, gates, the read."""

from __future__ import annotations

from typing import Any

from ....triton.matrix.forward import TritonForward
from ..functions import aligned
from .parts import OfMachineCode


class TvmGpuForward(OfMachineCode, TritonForward):
    """y = memory_caching(q, k, v, u) on an NVIDIA GPU, by machine code of one configuration.

    Arguments are those of :class:`OfMachineCode`.
    """

    def __call__(self, q: Any, k: Any, v: Any, u: Any, **options: Any) -> Any:
        """As :class:`TritonForward`; what is not aligned is copied."""
        return super().__call__(*(aligned(x) for x in (q, k, v, u)), **options)


LAUNCHER = TvmGpuForward
