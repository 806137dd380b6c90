"""The operations of a configuration on tensors, as the launchers of all GPUs' kernels call them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..driver import device
from ..functions import load_parts
from .gates import LearnedGates
from .gradients import GatesBackward, ReadBackward, StateBackward, WriteBackward
from .read import Read
from .states import SegmentStates
from .step import DecodeStep

_OPERATIONS: Mapping[str, Any] = {
    "segment_states": SegmentStates,
    "gates": LearnedGates,
    "read_forward": Read,
    "read_backward": ReadBackward,
    "gates_backward": GatesBackward,
    "state_backward": StateBackward,
    "write_backward": WriteBackward,
    "decode_step": DecodeStep,
}


def make_parts(functions: Mapping[str, Mapping[str, Any]], record: Mapping[str, Any]) -> dict[str, Any]:
    """By the operations' names; ``functions``: the kernels of each by name."""
    return {
        operation: _OPERATIONS[operation](kernels, record["problem"], record["config"])
        for operation, kernels in functions.items()
    }


class OfMachineCode:
    """What a launcher of machine code has before those of all GPUs' kernels, whose class comes after it.

    Args:
        kernel: a file beside the others.
        record: its entry in the tuned table.
        functions: the kernels by operation and name, instead of those that ``record["parts"]`` names.
    """

    device: str

    def __init__(
        self, kernel: Path, record: Mapping[str, Any], functions: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        functions = load_parts(kernel.parent, record["parts"]) if functions is None else functions
        super().__init__(kernel, _asked_for(record), make_parts(functions, record))  # type: ignore[call-arg]
        self.device = device()


def _asked_for(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with what the launchers ask a configuration for: tokens of tiles, and that gates are precomputed; a
    decode step takes any number of tokens."""
    config = record["config"]
    tiles = {
        f"{name}_BT": config[f"{name}_warps"] * config[f"{name}_rows"]
        for name in ("read", "gates")
        if f"{name}_warps" in config
    }
    return {**record, "config": {**config, **tiles, "gates": "precomputed", "decode_TOKENS": 1 << 30}}
