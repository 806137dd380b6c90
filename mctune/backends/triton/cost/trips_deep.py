"""How often the loops of deep memories' Triton kernels run (:mod:`mctune.backends.triton.cost.trips`)."""

from __future__ import annotations

import math
from collections.abc import Callable

from mctune.backends.triton.cost.walk import Piece, Source, Walk


def _chunks(w: Walk, piece: Piece) -> int:
    """Inner chunks of a segment."""
    return math.ceil(piece.length / w["INNER"])


def _widths(w: Walk) -> tuple[int, int, int]:
    """Rows of a chunk's block, and the widths of keys and values as blocks hold them."""
    return (w["ROWS"], *w.padded)


def _blocks(w: Walk) -> int:
    """Blocks of hidden units."""
    return math.ceil(-(-w.problem.E // 16) * 16 / w["EB"])


def _of_lane(w: Walk, chunk: Source, after: tuple[Source, ...] = ()) -> Source:
    """A lane's chunks, and what follows each segment: a lane is a segment, or a sequence with a loop of them."""
    every = Source(w.of_pieces(lambda p: _chunks(w, p)), chunk.matrix, chunk.inner)
    if w.problem.state_init == "independent":
        return Source(1, 0, (every, *after))
    return Source(1, 0, (Source(w.segments, 0, (every, *after)),))


def _in_blocks(w: Walk, matrix: float) -> tuple[float, tuple[Source, ...]]:
    """Products of every block of hidden units: outside of a loop where there is one block alone."""
    blocks = _blocks(w)
    return (0.0, (Source(blocks, matrix),)) if blocks > 1 else (matrix, ())


def key_means(w: Walk) -> Source:
    return Source(1, 0, (Source(w.of_pieces(lambda p: math.ceil(p.length / w["BT"]))),))


def write_slices(w: Walk) -> Source:
    """Of a chunk: hidden units of keys and queries, back, both updates; scores, and what they weigh; the read."""
    (R, PK, PV), EB = _widths(w), w["EB"]
    matrix = 2 * R * EB * (3 * PK + 2 * PV) + 2 * R * R * (PK + EB)
    if not w.problem.reads.mixes_parameters:
        matrix += 2 * R * EB * PV + 2 * R * R * (EB + PV)
    return _of_lane(w, Source(1, matrix))


def write_lanes(w: Walk) -> Source:
    """Of a chunk: the error over all blocks, then each block's rows, reads and updates."""
    (R, PK, PV), EB = _widths(w), w["EB"]
    mixes, carried = w.problem.reads.mixes_parameters, w.problem.writes.momentum
    block = 2 * R * EB * (3 * PK + 2 * PV) + 2 * R * R * EB
    block += 0 if mixes else 2 * R * EB * PV + 2 * R * R * EB
    if carried:
        block += 2 * R * EB * (2 * PK + PV) + (0 if mixes else 2 * R * EB * PV)
    outside = 2 * R * R * PK + (0 if mixes else 2 * R * R * PV)
    parts = [_in_blocks(w, 2 * R * EB * (PK + PV)), _in_blocks(w, block)]
    chunk = Source(1, outside + sum(part[0] for part in parts), tuple(loop for part in parts for loop in part[1]))
    copies = (Source(_blocks(w)),) if _blocks(w) > 1 else ()
    last = copies if w.problem.dtype != "float32" else ()
    walked = _of_lane(w, chunk, last)
    return Source(1, 0, (*copies, *walked.inner))


def weights(w: Walk) -> Source:
    """Coefficients are products of float32 without tensor cores, where there is momentum."""
    return Source(1, 0, (Source(w.of_pieces(lambda p: math.ceil(p.length / w["ROWS"]))),))


def write_rows(w: Walk) -> Source:
    """Of a chunk: hidden units, the error and back, each of the first state and of the rows before it."""
    (R, PK, PV), E, BJ = _widths(w), w["BLOCKS"] * w["EB"], w["BJ"]
    before = w.of_tiles(w["INNER"], lambda p, t: math.ceil(t / BJ))
    loops = tuple(Source(before, 2 * R * BJ * (width + E)) for width in (PK, PV, PV))
    return _of_lane(w, Source(1, 2 * R * E * (PK + 2 * PV), loops))


def row_states(w: Walk) -> Source:
    (PK, PV), EB, BJ = w.padded, w["EB"], w["BJ"]
    return Source(1, 0, (Source(w.of_pieces(lambda p: math.ceil(p.length / BJ)), 2 * BJ * EB * (PK + PV)),))


def _by_rows(w: Walk, widths: tuple[int, ...]) -> Source:
    """Of a tile: the first state's layers, of which these are the widths, and its segment's rows up to its own."""
    E, BT, BJ = w["BLOCKS"] * w["EB"], w["BT"], w["BJ"]
    seen = w.of_tiles(BT, lambda p, t: math.ceil(min(t + BT, p.length) / BJ))
    loops = tuple(Source(seen, 2 * BT * BJ * (width + E)) for width in widths)
    return Source(1, 2 * BT * E * sum(widths), loops)


def row_read(w: Walk) -> Source:
    return _by_rows(w, w.padded[:1] if w.problem.reads.mixes_parameters else w.padded)


def row_output(w: Walk) -> Source:
    return _by_rows(w, w.padded[1:])


def _partials(w: Walk) -> Source:
    """The online reads' parts are added up."""
    return Source(w["parts"])


def deep_read(w: Walk) -> Source:
    BT, (PK, PV) = w["BT"], w.padded
    state = 2 * BT * w["EB"] * (PK + PV)
    if not w.problem.reads.sparse:
        return Source(1, 0, (_partials(w), Source(w.of_tiles(BT, lambda p, t: p.past) * _blocks(w), state)))
    # A state is read where any token of the tile has chosen it.
    k, past = w.problem.top_k or 1, w.of_tiles(BT, lambda p, t: p.past)
    read = w.of_tiles(BT, lambda p, t: p.past * (1 - (1 - min(k / p.past, 1)) ** BT) if p.past else 0.0)
    share = read / past if past else 0.0
    blocks = _blocks(w)
    inner = Source(past, 0, (Source(share * blocks, state),)) if blocks > 1 else Source(past, share * state)
    return Source(1, 0, (_partials(w), inner))


def mix_hidden(w: Walk) -> Source:
    return Source(1, 0, (Source(w.of_tiles(w["BT"], lambda p, t: p.past), 2 * w["BT"] * w["EB"] * w.padded[0]),))


def replay(w: Walk) -> Source:
    (R, _, PV), EB = _widths(w), w["EB"]
    matrix = 2 * R * EB * PV * (4 if w.problem.writes.momentum else 2) + 2 * R * R * (EB + PV)
    return _of_lane(w, Source(1, matrix))


def mix_output(w: Walk) -> Source:
    states = Source(w.of_tiles(w["BT"], lambda p, t: p.past), 2 * w["BT"] * w["EB"] * w.padded[1])
    blocks = _blocks(w)
    return Source(1, 0, (_partials(w), Source(blocks, 0, (states,)) if blocks > 1 else states))


TRIPS: dict[str, Callable[[Walk], Source]] = {
    "key_means_kernel": key_means,
    "write_slices_kernel": write_slices,
    "write_lanes_kernel": write_lanes,
    "weights_kernel": weights,
    "write_rows_kernel": write_rows,
    "row_states_kernel": row_states,
    "row_read_kernel": row_read,
    "row_output_kernel": row_output,
    "deep_read_kernel": deep_read,
    "mix_hidden_kernel": mix_hidden,
    "replay_kernel": replay,
    "mix_output_kernel": mix_output,
}
"""The loops of a kernel, by its name."""
