"""How often the loops of the Triton templates' kernels run, by problem and configuration.

A compiled kernel does not say: that depends on the tokens. ``TRIPS`` does, by the kernel's name: its loops in the order
of the source, with the operations of matrix products that one pass does. Counts are means over the programs of the
grid, or of the program with the most work.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mctune.backends.protocol import Launch
from mctune.backends.triton.cost import trips_deep, trips_deep_backward
from mctune.backends.triton.cost.walk import Source, Walk
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import Target


def _local(w: Walk) -> Source:
    """In linear memories of 16 bits the sum of keys is a product too where products are in flight, of 64 rows."""
    ones = w.in_flight and w.problem.dtype != "float32" and not w.problem.writes.gated
    BT, sums = w["BT"], 64 if ones else 0
    steps = w.of_pieces(lambda p: math.ceil(p.length / BT))
    return Source(1, 0, (Source(steps, 2 * BT * w["BK"] * (w["BV"] + sums)),))


def _means(w: Walk) -> Source:
    return Source(1, 0, (Source(math.ceil(len(w.pieces) / w.segments / 16)),))


def _carry(w: Walk) -> Source:
    return Source(1, 0, (Source(len(w.pieces)),))


def _gates(w: Walk) -> Source:
    BT, BN, (PK, _) = w["BT"], w["BN"], w.padded
    loops = [] if w.whole else [Source(w.of_tiles(BT, lambda p, t: p.before))]
    loops.append(Source(w.of_tiles(BT, lambda p, t: t // BT + 1), 2 * BT * BT * PK))
    cached = w.of_tiles(BT, lambda p, t: math.ceil(p.past / BN))
    loops.append(Source(cached, _twice(w) * 2 * BT * BN * PK))
    if w.problem.reads.sparse:
        loops.append(Source(w["top_k"]))
        if not w.has("formulation", "grouped"):
            loops.append(Source(cached))
    return Source(1, 0, tuple(loops))


def _twice(w: Walk) -> int:
    """Mean keys are two 16-bit numbers each."""
    return 1 if w.problem.dtype == "float32" else 2


def _read(w: Walk) -> Source:
    BT, BJ, BV, (PK, _) = w["BT"], w["BJ"], w["BV"], w.padded
    fused = w.problem.routed and w.has("gates", "fused")
    state = 2 * BT * PK * BV
    loops = [Source(w.of_tiles(BT, lambda p, t: p.before))] if fused and not w.whole else []
    intra = 2 * BT * BJ * (PK + BV) + (2 * BT * BJ * PK if fused else 0)
    loops.append(Source(w.of_tiles(BT, lambda p, t: math.ceil(min(t + BT, p.length) / BJ)), intra))
    outside = state * w.of_tiles(BT, lambda p, t: p.entered)
    past = w.of_tiles(BT, lambda p, t: p.past)
    if not w.problem.routed:
        outside += state * w.of_tiles(BT, lambda p, t: p.past > 0)
    elif w.has("formulation", "grouped"):
        loops.append(Source(w["top_k"]))
    elif not fused:
        loops.append(Source(past, state))
    else:
        BN = w["BN"]
        groups = w.of_tiles(BT, lambda p, t: math.ceil(p.past / BN))
        each = past / groups if groups else 0.0
        loops.append(Source(groups, _twice(w) * 2 * BT * BN * PK, (Source(each, state),)))
    return Source(1, outside, tuple(loops), conditional=(1 if w.problem.routed else 2) * state - outside)


def _grouped(w: Walk) -> Source:
    """Its grid has a program more for every segment than the pairs may fill."""
    BT, rounds, BV, (PK, _) = w["BT"], w["ROUNDS"], w["BV"], w.padded
    pairs = w.problem.T // max(int(w.values.get("blocks", 1)), 1) * min(w.problem.top_k or 1, w.segments)
    grid = math.ceil(pairs / (BT * rounds)) + w.segments + 1
    tiles = rounds if w.heaviest else (pairs / BT + w.segments / 2) / grid
    return Source(1, 0, (Source(math.log2(w.segments + 1)), Source(tiles, 2 * BT * PK * BV)))


def _chosen(w: Walk) -> float:
    """Pairs of a segment. Every later token is as likely to choose it as another: early segments have more."""
    counts = [0.0] * w.segments
    for past, (begin, end) in enumerate(w.problem.spans()):
        for i in range(past):
            counts[i] += (end - begin) * min(1.0, (w.problem.top_k or 1) / past)
    return max(counts) if w.heaviest else sum(counts) / len(counts)


def _chosen_states(w: Walk) -> Source:
    BT, (_, PV) = w["BT"], w.padded
    return Source(1, 0, (Source(_chosen(w) / BT + 0.5, 2 * 2 * BT * w["BK"] * PV),))


def _chosen_descriptors(w: Walk) -> Source:
    return Source(1, 0, (Source(_chosen(w) / w["BT"] + 0.5),))


def _place(w: Walk) -> Source:
    """The first part of a head also writes where its segments begin."""
    rounds = w["rounds"]
    parts = 1 if w.heaviest else math.ceil(w["pairs"] / (64 * rounds))
    starts = Source(math.ceil((w.segments + 2) / 64) / parts)
    return Source(1, 0, (starts, Source(rounds, 0, (Source((rounds - 1) / 2),))))


def _read_backward(w: Walk) -> Source:
    BT, BJ, BK, (_, PV) = w["BT"], w["BJ"], w["BK"], w.padded
    state = 2 * BT * PV * BK
    loops = [
        Source(w.of_tiles(BT, lambda p, t: math.ceil(min(t + BT, p.length) / BJ)), 2 * BT * BJ * (PV + BK)),
    ]
    outside = state * w.of_tiles(BT, lambda p, t: p.entered)
    if w.problem.routed and w.has("formulation", "grouped"):
        loops.append(Source(w["top_k"]))
    elif w.problem.routed:
        loops.append(Source(w.of_tiles(BT, lambda p, t: p.past), state))
    else:
        outside += state * w.of_tiles(BT, lambda p, t: p.past > 0)
    return Source(1, outside, tuple(loops), conditional=(1 if w.problem.routed else 2) * state - outside)


def _wide(w: Walk) -> float:
    """Time of a float32 product in a problem of 16 bits, over that of one of 16 bits."""
    if w.problem.dtype == "float32":
        return 1.0
    precision = str(w.config["precision"]) if "precision" in w.config else ""
    return {"bf16x3": 3.0, "bf16x6": 6.0, "tf32": 2.0, "tf32x3": 6.0}.get(precision, 0.0)


def _after_segments(w: Walk, together: int) -> float:
    """Tokens after the first of ``together`` segments of a sequence."""
    left = [w.problem.T - end for _, end in w.problem.spans()][::together]
    return max(left) if w.heaviest else sum(left) / len(left)


def _cached(w: Walk) -> Source:
    """The gradient of the states of some cached segments: the tokens of later ones."""
    BT, segments = w["BT"], int(w.values.get("SEGMENTS", 1))
    tokens = _after_segments(w, segments)
    return Source(1, 0, (Source(math.ceil(tokens / BT), 2 * segments * w["BK"] * BT * w["BV"]),))


def _piece_product(w: Walk) -> Source:
    BT = w["BT"]
    return Source(1, 0, (Source(w.of_pieces(lambda p: math.ceil(p.length / BT)), 2 * BT * w["BK"] * w["BV"]),))


def _piece_tokens(w: Walk) -> Source:
    """One loop over the tokens of a piece, without products."""
    BT = w["BT"]
    return Source(1, 0, (Source(w.of_pieces(lambda p: math.ceil(p.length / BT))),))


def _lead(w: Walk) -> Source:
    """The row before a piece: its tokens, then the rows of its state; nothing for a piece that is not entered."""
    BT = w["BT"]
    tokens = Source(w.of_pieces(lambda p: math.ceil(p.length / BT) if p.entered else 0))
    rows = math.ceil(w.padded[0] / int(w.values.get("BR", 16)))
    return Source(1, 0, (tokens, Source(w.of_pieces(lambda p: rows if p.entered else 0))))


def _writes(w: Walk) -> Source:
    """From a block of tokens of a piece to its end; then, for the keys, what pulls at them."""
    BJ, BT, BS, (PK, PV) = w["BJ"], w["BT"], w["BS"], w.padded
    whole, loops = 0, list[Source]()
    for width, padded, other in ((w.problem.Dk, PK, PV), (w.problem.Dv, PV, PK)):
        parts, step = math.ceil(width / BS), 2 * BJ * min(BS, padded) * other
        # A state that is read in one piece has no loop.
        if parts > 1:
            loops.append(Source(parts, step))
        else:
            whole += step
    loops.append(Source(w.of_tiles(BJ, lambda p, t: math.ceil((p.length - t) / BT)), 2 * 2 * BJ * BT * (PK + PV)))
    if w.problem.routed:
        if not w.whole:
            loops.append(Source(w.of_tiles(BJ, lambda p, t: p.later)))
        aside = -(-BJ // BT) * BT
        near = w.of_tiles(BJ, lambda p, t: math.ceil(min(aside, p.length - t) / BT))
        # 16-bit inputs take one TF32 product instead of three.
        loops.append(Source(near, min(_wide(w), 2.0) * 2 * BJ * BT * PK))
        loops.append(Source(w.of_tiles(BJ, lambda p, t: math.ceil(max(p.length - t - aside, 0) / BT))))
    return Source(1, whole, tuple(loops))


def _connectors(w: Walk) -> Source:
    BT, BI, parts, (PK, _) = w["BT"], int(w.values.get("BI", 1)), int(w.values.get("PARTS", 1)), w.padded
    cached = w.of_tiles(BT, lambda p, t: math.ceil(p.past / BI))
    # A single part makes the trip count a constant, so the compiler removes the loop.
    each = (Source(parts),) if parts > 1 else ()
    if w.has("formulation", "grouped"):
        loops = [*each, Source(w["top_k"]), Source(w["top_k"])]
    else:
        loops = [*each, *each, Source(cached, _wide(w) * 2 * BT * BI * PK, each)]
    if not w.whole:
        loops.append(Source(w.of_tiles(BT, lambda p, t: p.before)))
    loops.append(Source(w.of_tiles(BT, lambda p, t: t // BT)))
    return Source(1, 2 * BT * BT * PK, tuple(loops))


def _descriptors(w: Walk) -> Source:
    BT, BI, splits, (PK, _) = w["BT"], w["BI"], int(w.values.get("SPLITS", 1)), w.padded
    tokens = _after_segments(w, BI)
    return Source(1, 0, (Source(math.ceil(tokens / splits / BT), _wide(w) * 2 * BI * BT * PK),))


def _decode_read(w: Walk) -> Source:
    """A program has a share of the cached states; one more a block of columns writes the online state."""
    past = max(w.segments - 1, 0)
    read = min(w.problem.top_k, past) if w.problem.top_k else past
    splits, n, BK = w["SPLITS"], w["n"], w["BK"]
    share = read / splits
    group = min(16.0, share)
    blocks = math.ceil(w["DK"] / BK)
    # For a single token the compiler removes the writer's loop.
    loops = [Source(n, 0, (Source(1),))] if n > 1 else []
    if w.problem.reads.sparse:
        loops += [Source(share * (splits - 1) / 2)] if splits > 1 else []
        cached: tuple[Source, ...] = (Source(group), Source(group * blocks))
    elif w.problem.routed:
        steps = math.ceil(w["PK"] / w["BS"])
        cached = (*((Source(steps),) if steps > 1 else ()), Source(group * blocks))
    else:
        cached = (Source(group * blocks),)
    loops.append(Source(math.ceil(share / 16), 0, cached))
    return Source(1, 0, tuple(loops))


def _decode_logits(w: Walk) -> Source:
    return Source(1, 0, (Source(w["n"]),) if w["n"] > 1 else ())


def _decode_combine(w: Walk) -> Source:
    parts = math.ceil((w["SPLITS"] + 1) / w["BP"])
    return Source(1, 0, (*((Source(parts),) if parts > 1 else ()), *((Source(w["n"]),) if w["n"] > 1 else ())))


TRIPS: dict[str, Callable[[Walk], Source]] = {
    "local_kernel": _local,
    "means_kernel": _means,
    "carry_kernel": _carry,
    "gates_kernel": _gates,
    "read_summed_kernel": _read,
    "read_gated_kernel": _read,
    "read_fused_kernel": _read,
    "read_pairs_kernel": _read,
    "count_kernel": lambda walk: Source(1),
    "place_kernel": _place,
    "grouped_read_kernel": _grouped,
    "chosen_kernel": _chosen_states,
    "chosen_descriptor_kernel": _chosen_descriptors,
    "read_backward_kernel": _read_backward,
    "cached_kernel": _cached,
    "piece_kernel": _piece_product,
    "write_kernel": _writes,
    "lead_kernel": _lead,
    "pulls_kernel": _piece_tokens,
    "connector_kernel": _connectors,
    "descriptor_kernel": _descriptors,
    "step_kernel": _decode_read,
    "logits_kernel": _decode_logits,
    "combine_kernel": _decode_combine,
    **trips_deep.TRIPS,
    **trips_deep_backward.TRIPS,
}
"""The loops of a kernel, by its name; a kernel that is not listed has loops of ``Parameters.unknown_trips`` passes."""

UNCOUNTED = ("read_specialized_kernel",)
"""Kernels whose warps do different work: the model counts an instruction for all warps of a block."""


def source_of(
    launch: Launch, problem: Problem, config: Config, target: Target, heaviest: bool = False
) -> Source | None:
    """The loops of a launch's kernel, ``None`` where nothing is known of it."""
    count = TRIPS.get(launch.name)
    if count is None:
        return None
    try:
        return count(Walk(problem, config, dict(launch.values), heaviest, target.products_in_flight))
    except KeyError:  # a template with other parameters than these functions know
        return None
