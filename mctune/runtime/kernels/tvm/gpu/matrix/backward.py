"""Launch the backward kernels that TVM made for a GPU: states; gradients of the read, of gates, states and writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....triton.matrix.backward import TritonBackward
from ..driver import device
from ..functions import aligned, load_parts
from .parts import make_parts, with_tiles


class TvmGpuBackward(TritonBackward):
    """The gradients of y = memory_caching(q, k, v, u) on an NVIDIA GPU, by machine code of one configuration.

    Args:
        kernel: a file beside the others.
        record: its entry in the tuned table.
        functions: the kernels by operation and name, instead of those that ``record["parts"]`` names.
    """

    def __init__(
        self, kernel: Path, record: Mapping[str, Any], functions: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        functions = load_parts(kernel.parent, record["parts"]) if functions is None else functions
        super().__init__(kernel, with_tiles(record), make_parts(functions, record))
        self.device = device()

    def __call__(self, dy: Any, q: Any, k: Any, v: Any, u: Any, **options: Any) -> Any:
        """As :class:`TritonBackward`; what is not aligned is copied."""
        return super().__call__(*(aligned(x) for x in (dy, q, k, v, u)), **options)


LAUNCHER = TvmGpuBackward
