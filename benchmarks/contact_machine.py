"""What `benchmarks/contact.py` records about the machine, and the two rates that times are compared with."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
from contact_guard import Facts, told

PACKAGES = ("torch", "triton", "numpy", "libcst", "fla-core", "flash-attn-3", "click", "optuna", "sqlalchemy")
_SMI = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
        "power.limit", "temperature.gpu", "compute_mode", "mig.mode.current")  # fmt: skip


def machine(facts: Facts) -> None:
    """Without the GPU's help: versions, tools, clocks."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    facts.add(
        "machine", "versions", python=platform.python_version(), system=platform.platform(), packages=found,
        cores=os.cpu_count(), torch_cuda=torch.version.cuda,
    )  # fmt: skip
    # One field at a time where all together are refused: older drivers know fewer fields.
    lines = said(["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"])
    facts.add("machine", "nvidia-smi", said=dict(zip(_SMI, lines.split(", "), strict=False)), line=lines)
    for tool, arguments in (("nvcc", ["--version"]), ("gcc", ["--version"]), ("ptxas", ["--version"])):
        facts.add("machine", "tool", tool=tool, path=shutil.which(tool), said=said([tool, *arguments])[-200:])


def gpu_name(facts: Facts) -> str:
    """A value as nvidia-smi reported it; empty where it did not."""
    return next((str(line["said"].get("name", "")) for line in facts.of("nvidia-smi")), "")


def said(command: Sequence[str]) -> str:
    """What a command prints, its errors too."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return told(error)
    return (done.stdout.strip() or done.stderr.strip())[:2000]


def device(facts: Facts) -> None:
    """With it: its properties, Triton's target, key and ptxas; and that Triton launches at all."""
    if not torch.cuda.is_available():
        facts.add("device", "no GPU", cuda=torch.version.cuda)
    else:
        properties = torch.cuda.get_device_properties(0)
        names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size", "warp_size",
                 "regs_per_multiprocessor", "shared_memory_per_block", "shared_memory_per_block_optin",
                 "shared_memory_per_multiprocessor", "max_threads_per_multi_processor")  # fmt: skip
        facts.add("device", "properties", **{name: getattr(properties, name, None) for name in names})
        facts.add("device", "memory", free=torch.cuda.mem_get_info()[0])
    from triton import knobs
    from triton.runtime.cache import triton_key

    facts.add(
        "device",
        "triton key",
        digest=hashlib.sha256(str(triton_key()).encode()).hexdigest()[:16],
        cache=knobs.cache.dir,
    )
    for name in ("ptxas", "ptxas_blackwell"):
        tool = getattr(knobs.nvidia, name, None)
        facts.add("device", "ptxas", which=name, path=getattr(tool, "path", None),
                  version=getattr(tool, "version", None))  # fmt: skip
    if torch.cuda.is_available():
        from triton.runtime import driver

        facts.add("device", "triton target", target=str(driver.active.get_current_target()),
                  limits=driver.active.utils.get_device_properties(0))  # fmt: skip


def rates(facts: Facts, small: bool) -> None:
    """What this GPU reaches: a bfloat16 product of 8192 x 8192, a copy of 1 GiB."""
    from mctune.measure.clocks import read_clocks
    from mctune.measure.timing import summary, time_rotated
    from mctune.runtime.kernels.triton.tables import DEVICE

    size, count = (64, 1 << 12) if small else (8192, 1 << 28)
    dtype = torch.float32 if small else torch.bfloat16
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    source, copied = (torch.ones(count, device=DEVICE) for _ in range(2))
    product, copy = (
        summary(samples)[0] / 1e3
        for samples in time_rotated([lambda: a @ b, lambda: copied.copy_(source)], rounds=11, device=DEVICE)
    )
    values: dict[str, Any] = {"matrix": 2.0 * size**3 / product, "copy": 8.0 * count / copy}
    clocks = read_clocks() if DEVICE == "cuda" else None
    facts.add("device", "rates", **values, clocks=vars(clocks) if clocks else None)
