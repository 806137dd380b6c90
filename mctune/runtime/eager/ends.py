"""What segments leave: end states, and of a deep memory what the last inner chunk of a sequence began with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..call import Call
from .deep import DeepWalk
from .forward import deep_walk, swla_gates
from .matrix import run_linear
from .plan import Layout

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Ends:
    """By layer: a matrix memory has one, a deep one two.

    Attributes:
        states: end states of the segments, [G, N, ...].
        momentum, start: S at each sequence's end, and the state that entered its last inner chunk, [G, S, ...]; empty
            of a matrix memory.
    """

    states: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...] = ()
    start: tuple[Tensor, ...] = ()


def sequence_lengths(call: Call) -> list[int]:
    """Tokens of each sequence: of each row, or as ``cu_seqlens`` says."""
    if call.cu_seqlens is None:
        return [call.q.shape[1]] * call.q.shape[0]
    return [int(length) for length in call.cu_seqlens.diff()]


def end_states(call: Call, layout: Layout, k: Tensor, v: Tensor) -> Ends:
    """What the segments of ``call`` leave, from their writes alone; k, v [G, T, ...] by head."""
    if not call.deep:
        return Ends((run_linear(k, k, v, layout.states, swla_gates(call))[1],))
    walk = deep_walk(call, layout, k, v)
    if call.writes.momentum and walk.mu is None:
        # An absent mu is 0: S must be right in case a later call passes one.
        walk = replace(walk, mu=torch.zeros_like(walk.eta))
    return _deep_ends(call, layout, walk)


def _deep_ends(call: Call, layout: Layout, walk: DeepWalk) -> Ends:
    plan = layout.states
    # The chunk that a sequence ends with is the last one, by steps, of its last segment.
    lengths = sequence_lengths(call) if call.cu_seqlens is not None else [call.q.shape[1]]
    finals = []
    if call.segmentation == "logarithmic":
        finals = [plan.final[-1]]
    else:
        segments = 0
        for length in lengths:
            segments += -(-length // call.segment_length)
            finals.append(plan.final[segments - 1] if segments else 0)
    ups, downs = [], []
    layers = (walk.W_up, walk.W_down)
    ends = [torch.zeros_like(W)[:, None].repeat(1, len(lengths), 1, 1) for W in (*layers, *layers)]
    for chunk in walk:
        ups.append(chunk.closed_up)
        downs.append(chunk.closed_down)
        for sequence, final in enumerate(finals):
            if chunk.start <= final < chunk.stop:
                lane = final - chunk.start
                for end, left in zip(ends, (chunk.up.state, chunk.down.state, *chunk.momentum), strict=False):
                    end[:, sequence] = left[:, lane]
    return Ends((plan.gather(ups), plan.gather(downs)), tuple(ends[2:]), tuple(ends[:2]))
