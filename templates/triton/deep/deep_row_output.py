"""What the second layer of the own segment makes of mixed hidden units, of the rows that ``deep_write_rows`` leaves.

    z_t W_t = c_t z_t W_0 + sum_{j <= t} c_tj (z_t z_j) e_j (Eq. 14-15 and 34-36; section 4.3)

z is not known before all states' first layers have been read: ``deep_mix`` calls this between its two reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .deep_common import Dims, Spans, Tables, load_rows, load_tile, store_rows
from .deep_rows_common import Left, Weights, left_of, read_second, tile_state


@triton.jit(do_not_specialize=["T", "H", "span"])
def row_output_kernel(
    hidden, W_down, left, weights, spans, tiles, partials, T, H, span,
    PRECISION: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BLOCKS: tl.constexpr,
    EB: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens of a head."""
    bh = tl.program_id(1).to(tl.int64)
    tile = load_tile(tiles + tl.program_id(0) * 2, spans, BT)
    begin = tl.load(spans.seg_begin + tile.segment)
    hidden += bh * T * dims.SE
    z = ()
    for i in tl.static_range(BLOCKS):
        z = z + (load_rows(hidden, tile.first, tile.stop, dims.SE, i * EB, dims.SE, BT, EB),)
    W = W_down + bh % H * (dims.DE * dims.DV)
    state, left = tile_state(weights, bh, tile, T, BT), left_of(left, bh, T, dims)
    y = read_second(state, z, W, left, weights, bh, tile, begin, T, span, PRECISION, dims, BT, BJ, BLOCKS, EB)
    partials += (bh // H * T * H + bh % H) * dims.DV
    store_rows(partials, y, tile.first, tile.stop, H * dims.DV, 0, dims.DV, BT, dims.PV)


def deep_row_output(
    hidden: torch.Tensor,
    W_down: torch.Tensor,
    left: Left,
    weights: Weights,
    tables: Tables,
    tiles: torch.Tensor,
    DK: int,
    DV: int,
    DE: int,
    PK: int,
    PV: int,
    SK: int,
    SV: int,
    SE: int,
    PRECISION: str,
    BT: int,
    BJ: int,
    EB: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    """``[1, B, T, H, DV]``, float32.

    Args:
        hidden [B*H, T, SE]: gelu of what all states' first layers make of the queries.
        W_down [H, DE, DV]: the second layer that every segment starts from, of hidden's dtype.
        left, weights: of ``deep_write_rows``.
        tables: segments, each one piece.
        tiles: of BT tokens.
    """
    (heads, T, _), H, span = hidden.shape, W_down.shape[0], weights.pairs.shape[2]
    dims, spans = Dims(DK, DV, DE, PK, PV, SK, SV, SE), Spans(tables.seg_begin, tables.seg_end, tables.seg_first)
    partials = hidden.new_empty((1, heads // H, T, H, DV), dtype=torch.float32)
    row_output_kernel[(tiles.shape[0], heads)](
        hidden=hidden, W_down=W_down, left=left, weights=weights, spans=spans, tiles=tiles, partials=partials, T=T,
        H=H, span=span, PRECISION=PRECISION, dims=dims, BT=BT, BJ=BJ, BLOCKS=triton.cdiv(SE, EB), EB=EB,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return partials
