"""The operations of a configuration on tensors, as the launchers of all GPUs' kernels call them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def with_tiles(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with what the launchers ask a configuration for: tokens of tiles, and that gates are precomputed."""
    config = record["config"]
    tiles = {
        f"{name}_BT": config[f"{name}_warps"] * config[f"{name}_rows"]
        for name in ("read", "gates")
        if f"{name}_warps" in config
    }
    return {**record, "config": {**config, **tiles, "gates": "precomputed"}}
