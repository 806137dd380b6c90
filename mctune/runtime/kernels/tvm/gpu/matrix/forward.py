"""Launch the forward kernels that TVM made for a GPU: segment states, gates, the read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....triton.matrix.forward import TritonForward
from ..driver import device
from ..functions import aligned, load_parts
from .gates import LearnedGates
from .read import Read
from .states import SegmentStates


class TvmGpuForward(TritonForward):
    """y = memory_caching(q, k, v, u) on an NVIDIA GPU, by machine code of one configuration.

    Args:
        kernel: a file beside the others.
        record: its entry in the tuned table.
        functions: the kernels by operation and name, instead of those that ``record["parts"]`` names.
    """

    def __init__(
        self, kernel: Path, record: Mapping[str, Any], functions: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        functions = load_parts(kernel.parent, record["parts"]) if functions is None else functions
        config = record["config"]
        tiles = {"read_BT": config["read_warps"] * config["read_rows"], "gates_BT": config["gates_warps"] * config["gates_rows"]}
        record = {**record, "config": {**config, **tiles, "gates": "precomputed"}}
        super().__init__(kernel, record, make_parts(functions, record))
        self.device = device()

    def __call__(self, q: Any, k: Any, v: Any, u: Any, **options: Any) -> Any:
        """As :class:`TritonForward`; what is not aligned is copied."""
        return super().__call__(*(aligned(x) for x in (q, k, v, u)), **options)


def make_parts(functions: Mapping[str, Mapping[str, Any]], record: Mapping[str, Any]) -> dict[str, Any]:
    """The operations of a configuration on tensors, by name."""
    problem, config = record["problem"], record["config"]
    parts: dict[str, Any] = {}
    for operation, kernels in functions.items():
        if operation == "gates":
            parts[operation] = LearnedGates(kernels)
        else:
            parts[operation] = {"segment_states": SegmentStates, "read_forward": Read}[operation](
                kernels, problem, config
            )
    return parts


LAUNCHER = TvmGpuForward
