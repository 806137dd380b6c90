"""Occupancy by hand: what the CUDA occupancy calculator says of the same numbers."""

from __future__ import annotations

import pytest

from mctune.backends.protocol import Launch
from mctune.backends.triton.resources import CORES, resources
from mctune.core.target import resolve, targets


def launch(registers=32, shared=0, warps=4, warp_size=32):
    return Launch("k", (1, 1, 1), warps, 2, warp_size, shared, registers, 0, "", b"", (), ())


@pytest.mark.parametrize(
    ("target", "taken", "blocks", "occupancy", "limited_by"),
    [
        # 65536 registers: 2 blocks of 256 threads with 128 each.
        ("h100-sxm", {"registers": 128, "warps": 8}, 2, 16 / 64, "registers"),
        # 168 * 32 = 5376 is 21 units of 256; 16384 // 5376 = 3 warps in each of 4 parts.
        ("h100-sxm", {"registers": 168, "warps": 4}, 3, 12 / 64, "registers"),
        # 255 is rounded up to 256: 2 warps a part.
        ("h100-sxm", {"registers": 255, "warps": 8}, 1, 8 / 64, "registers"),
        # 228 KiB hold two of 112 + 1 KiB, and one of 113 + 1 and a bit.
        ("h100-sxm", {"shared": 112 * 1024, "warps": 4}, 2, 8 / 64, "shared memory"),
        ("h100-sxm", {"shared": 113 * 1024 + 1, "warps": 4}, 1, 4 / 64, "shared memory"),
        # The most that a block may have still fits, with the reserved KiB.
        ("rtx4090", {"shared": 101376, "warps": 4}, 1, 4 / 48, "shared memory"),
        ("rtx4090", {"warps": 1}, 24, 24 / 48, "blocks"),
        ("a10g", {"warps": 1}, 16, 16 / 48, "blocks"),
        ("a100-80g", {"warps": 32}, 2, 1.0, "threads"),
        ("h100-sxm", {"registers": 24, "warps": 16}, 4, 1.0, "threads"),
        # 512 registers a lane: 256 leave two waves in each of 4 parts; 64 KiB, nothing reserved.
        ("mi300x", {"registers": 256, "warps": 4, "warp_size": 64}, 2, 8 / 32, "registers"),
        ("mi300x", {"registers": 64, "shared": 65536, "warps": 4, "warp_size": 64}, 1, 4 / 32, "shared memory"),
        ("mi300x", {"registers": 32, "warps": 8, "warp_size": 64}, 4, 1.0, "threads"),
    ],
)
def test_by_hand(target, taken, blocks, occupancy, limited_by):
    found = resources(launch(**taken), resolve(target)[0])
    assert (found.blocks_per_core, found.limited_by) == (blocks, limited_by)
    assert found.occupancy == pytest.approx(occupancy)


def test_every_gpu_is_known():
    assert {target.arch for target in targets() if not target.on_cpu} == set(CORES)


def test_in_words():
    found = resources(launch(128, 4096, 8), resolve("h100-sxm")[0])
    assert str(found) == "128 registers, 4096 B shared, 2 blocks per SM (25% of its warps, limited by registers)"
