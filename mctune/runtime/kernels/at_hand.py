"""Which device a call is on."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from .hardware import Hardware


def hardware_of(device: torch.device) -> Hardware | None:
    """What a call's tensors are on; ``None`` for a device of another kind, or one that tells nothing of itself."""
    if device.type == "cpu":
        return Hardware(_cpu())
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _gpu(index: int) -> Hardware:
    found = torch.cuda.get_device_properties(index)
    arch = getattr(found, "gcnArchName", "").partition(":")[0] if torch.version.hip else ""
    return Hardware(arch or f"sm_{found.major}{found.minor}", found.multi_processor_count)


@cache
def _cpu() -> str:
    """The model name of this CPU, as /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
