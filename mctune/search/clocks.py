"""The state of a GPU while something was timed on it: clocks, temperature and power, as nvidia-smi tells."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


@dataclass(frozen=True)
class Clocks:
    """Multiprocessor and memory clock in MHz, degrees Celsius, watts."""

    sm_mhz: float
    memory_mhz: float
    celsius: float
    watts: float


def read_clocks() -> Clocks | None:
    """The first visible GPU's; ``None`` where nvidia-smi is absent or does not tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    # nvidia-smi counts all GPUs, CUDA those that this process may see; both know a GPU by its UUID too.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = [tool, f"--id={first}", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return Clocks(*(float(value) for value in done.stdout.strip().split(",")))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return None


def clock_and_heat(device: str) -> tuple[float | None, float | None]:
    """The clock in MHz and the temperature that a :class:`mctune.core.outcome.Timed` has; ``None`` of a CPU."""
    clocks = read_clocks() if device == "cuda" else None
    return (clocks.sm_mhz, clocks.celsius) if clocks else (None, None)
