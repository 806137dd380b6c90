"""Where the sequences of a memory are, as decode kernels take it."""

from __future__ import annotations

import torch

from ...errors import KernelError
from ...memory import LayerMemory


def place_of(
    memory: LayerMemory, capacity: int, n: int, length: int, device: torch.device
) -> tuple[tuple[torch.Tensor | None, torch.Tensor | None], tuple[int, int]]:
    """cached and filled as tensors, where sequences differ or the device has them, and as numbers, where not.

    Raises:
        KernelError: if there is no room for the states of ``n`` more tokens, as far as the CPU knows.
    """
    cached, filled = memory.cached, memory.filled
    if cached.device.type != "cpu":
        return (cached, filled), (0, 0)
    where = set(zip(cached.tolist(), filled.tolist(), strict=True))
    needed = memory.needed(n, length)
    if needed > capacity:
        raise KernelError(
            f"{n} more tokens need room for {needed} states and the memory has room for {capacity}; "
            f"call memory.reserve({n}) first"
        )
    if len(where) == 1:
        return (None, None), where.pop()
    if device.type == "cpu":
        return (cached, filled), (0, 0)
    both = torch.stack((cached, filled)).to(device, non_blocking=True)
    return (both[0], both[1]), (0, 0)
