"""How often the loops of deep memories' backward and decode kernels run (:mod:`mctune.backends.triton.cost.trips`)."""

from __future__ import annotations

import math
from collections.abc import Callable

from mctune.backends.triton.cost.walk import Source, Walk


def _widths(w: Walk) -> tuple[int, int, int, int]:
    """Rows and hidden units of a chunk's block, and the widths of keys and values as blocks hold them."""
    return (w["BB"], w["EB"], *w.padded)


def _blocks(w: Walk) -> int:
    """Blocks of hidden units."""
    return math.ceil(-(-w.problem.E // 16) * 16 / w["EB"])


def _in_blocks(w: Walk, matrix: float) -> tuple[float, tuple[Source, ...]]:
    """Products of every block of hidden units: outside of a loop where there is one block alone."""
    return (0.0, (Source(_blocks(w), matrix),)) if _blocks(w) > 1 else (matrix, ())


def _lane(w: Walk, by_segment: bool) -> float:
    """Inner chunks of a lane: of a segment, or of a sequence."""
    chunks = w.of_pieces(lambda p: math.ceil(p.length / w["INNER"]))
    return chunks if by_segment or w.problem.state_init == "independent" else chunks * w.segments


def _past(w: Walk) -> float:
    """Cached states of a tile's tokens."""
    return w.of_tiles(w["BT"], lambda p, t: p.past)


def _read(w: Walk, trips: float, matrix: float, inner: tuple[Source, ...], share: float) -> Source:
    """A loop over states or tokens; under ssc only a share of it is done."""
    if not w.problem.reads.sparse:
        return Source(trips, matrix, inner)
    return Source(trips, matrix * share, tuple(Source(loop.trips * share, loop.matrix) for loop in inner))


def _chosen(w: Walk) -> float:
    """The share of pairs of a tile and a state that any of the tile's tokens has chosen."""
    k, BT = w.problem.top_k or 1, w["BT"]
    past = w.of_tiles(BT, lambda p, t: p.past)
    read = w.of_tiles(BT, lambda p, t: p.past * (1 - (1 - min(k / p.past, 1)) ** BT) if p.past else 0.0)
    return read / past if past else 0.0


def rewrite_slices(w: Walk) -> Source:
    R, EB, PK, PV = _widths(w)
    return Source(1, 0, (Source(_lane(w, w.has("saved", "states")), 4 * R * EB * (PK + PV)),))


def rewrite_lanes(w: Walk) -> Source:
    """Of a chunk: the error over all blocks, then each block's rows and updates."""
    R, EB, PK, PV = _widths(w)
    parts = [_in_blocks(w, 2 * R * EB * (PK + PV)), _in_blocks(w, 2 * R * EB * 3 * (PK + PV))]
    chunk = Source(_lane(w, False), sum(part[0] for part in parts), tuple(x for part in parts for x in part[1]))
    opened = (Source(_blocks(w)),) if _blocks(w) > 1 else ()
    return Source(1, 0, (*opened, chunk))


def online_backward(w: Walk) -> Source:
    R, EB, PK, PV = _widths(w)
    units = 3 if w.problem.writes.momentum else 2
    return Source(1, 2 * R * EB * units * (PK + PV) + 2 * R * R * (PK + PV + 2 * EB))


def online_sums(w: Walk) -> Source:
    R, EB, PK, PV = _widths(w)
    units = 2 * PK + PV + (PK + 2 * PV if w.problem.writes.momentum else 0)
    matrix, inner = _in_blocks(w, 2 * R * EB * units + 4 * R * R * EB)
    return Source(1, 2 * R * R * (3 * PK + 2 * PV) + matrix, inner)


def mix_backward(w: Walk) -> Source:
    PK, PV = w.padded
    return Source(1, 0, (Source(_past(w), 2 * w["BT"] * w["EB"] * (PK + PV)),))


def deep_dq(w: Walk) -> Source:
    PK, PV = w.padded
    alone = w.problem.reads.mixes_parameters and not w.problem.routed
    matrix, inner = _in_blocks(w, 2 * w["BT"] * w["EB"] * (PK if alone else 2 * PK + PV))
    return Source(1, 0, (_read(w, _past(w), matrix, inner, _chosen(w)),))


def deep_dstate(w: Walk) -> Source:
    """A program has a segment's block of hidden units, and the tokens after it."""
    (PK, PV), BT = w.padded, w["BT"]
    ends = [end for _, end in w.problem.spans()]
    tiles = [math.ceil((ends[-1] - end) / BT) for end in ends]
    count = max(tiles) if w.heaviest else sum(tiles) / len(tiles)
    matrix = 2 * BT * w["EB"] * (PK + PV) * (1 if w.problem.reads.mixes_parameters else 2)
    return Source(1, 0, (_read(w, count, matrix, (), _chosen(w)),))


def walk_slices(w: Walk) -> Source:
    R, EB, PK, PV = _widths(w)
    return Source(1, 0, (Source(_lane(w, False), 12 * R * EB * (PK + PV) + 2 * R * R * (PK + PV + 2 * EB)),))


def walk_lanes(w: Walk) -> Source:
    """Of a chunk: all gradients but those through the outputs of titans' own loss, which come in a second loop."""
    R, EB, PK, PV = _widths(w)
    parts = [_in_blocks(w, 18 * R * EB * (PK + PV) + 4 * R * R * EB), _in_blocks(w, 2 * R * EB * (3 * PK + 2 * PV))]
    outside = 2 * R * R * (PK + PV + (PK if w.problem.routed else 0)) + sum(part[0] for part in parts)
    return Source(1, 0, (Source(_lane(w, False), outside, tuple(x for part in parts for x in part[1])),))


# --- decode


def _cached(w: Walk) -> float:
    """Cached states that a split reads."""
    past = max(w.segments - 1, 0)
    return (min(w.problem.top_k, past) if w.problem.top_k else past) / w["SPLITS"]


def deep_prepare(w: Walk) -> Source:
    if not w.problem.routed:
        return Source(1)
    steps = math.ceil(w["PK"] / w["BS"])
    loops = (Source(steps),) if steps > 1 else ()
    return Source(1, 0, (*loops, *((Source(w["top_k"]),) if w.problem.reads.sparse else ())))


def deep_step(w: Walk) -> Source:
    errors = (Source(_blocks(w)),) if w.problem.writes.momentum and _blocks(w) > 1 else ()
    blocks = 1 if w.problem.reads.mixes_parameters else _blocks(w)
    return Source(1, 0, (*errors, Source(_cached(w) * blocks)))


def deep_lower(w: Walk) -> Source:
    return Source(1, 0, (Source(w["SPLITS"] + 1), Source(_cached(w))))


def deep_combine(w: Walk) -> Source:
    return Source(1, 0, (Source(math.ceil(w["PARTS"] / w["BP"])),))


TRIPS: dict[str, Callable[[Walk], Source]] = {
    "rewrite_slices_kernel": rewrite_slices,
    "rewrite_lanes_kernel": rewrite_lanes,
    "online_backward_kernel": online_backward,
    "online_sums_kernel": online_sums,
    "mix_backward_kernel": mix_backward,
    "deep_dq_kernel": deep_dq,
    "deep_dstate_kernel": deep_dstate,
    "walk_slices_kernel": walk_slices,
    "walk_lanes_kernel": walk_lanes,
    "deep_prepare_kernel": deep_prepare,
    "deep_step_kernel": deep_step,
    "deep_lower_kernel": deep_lower,
    "deep_combine_kernel": deep_combine,
}
"""The loops of a kernel, by its name."""
