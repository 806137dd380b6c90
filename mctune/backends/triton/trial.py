"""A kernel that no machine in order fails on, compiled for a GPU or interpreted."""

from __future__ import annotations

from pathlib import Path

import torch
import triton
import triton.language as tl

from mctune.backends.triton.device import VirtualDevice
from mctune.core.errors import DeviceError
from mctune.core.target import Target


@triton.jit  # type: ignore[untyped-decorator]
def add_one(x, y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at) + 1.0)


def try_out(target: Target, cache: Path) -> None:
    """Compile it with an empty cache of its own in ``cache``; a process that interprets runs it instead.

    Raises:
        DeviceError: if that is without a result.
        Exception: whatever Triton raises.
    """
    from triton import knobs

    if knobs.runtime.interpret:
        x, y = torch.arange(16.0), torch.full((16,), torch.nan)
        add_one[(1,)](x, y, BLOCK=16)
        if not torch.equal(y, x + 1):
            raise DeviceError(f"Triton's interpreter computed {y.tolist()} for 1 + {x.tolist()}")
        return
    before = knobs.cache.dir
    knobs.cache.dir = str(cache)
    add_one.device_caches.clear()  # else a second trial would compile nothing
    try:
        with VirtualDevice(target) as device:
            meta = torch.empty(16, device="meta")
            add_one[(1,)](meta, torch.empty_like(meta), BLOCK=16)
    finally:
        knobs.cache.dir = before
    if not device.compiled:
        raise DeviceError(f"Triton compiled nothing for {target.name}, and did not say why")
