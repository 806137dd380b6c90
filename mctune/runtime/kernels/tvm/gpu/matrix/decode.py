"""Launch the decode kernels that TVM made for a GPU: new tokens over the cache, read and written in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....triton.matrix.decode import TritonDecode
from ..driver import device
from ..functions import load_parts
from .parts import make_parts


class TvmGpuDecode(TritonDecode):
    """y of n new tokens of every sequence on an NVIDIA GPU, by machine code of one configuration.

    Args:
        kernel: a file beside the others.
        record: its entry in the tuned table.
        functions: the kernels by operation and name, instead of those that ``record["parts"]`` names.
    """

    def __init__(
        self, kernel: Path, record: Mapping[str, Any], functions: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        functions = load_parts(kernel.parent, record["parts"]) if functions is None else functions
        record = {**record, "config": {**record["config"], "decode_TOKENS": 1 << 30}}
        super().__init__(kernel, record, make_parts(functions, record))
        self.device = device()


LAUNCHER = TvmGpuDecode
