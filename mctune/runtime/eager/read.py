"""Reading the cached states (arXiv:2602.24281, Eq. 6-17): dense in blocks that skip the future, sparse by segment.

Arrays carry one leading axis G = B * H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import gelu

from ..modes import fake_mode
from .gates import Gate, best
from .masked import mix, pairs, sound
from .plan import Block, Layout

Tensor = torch.Tensor
DENSE_STATES = 4
"""ssc reads token by segment (sparse) once there are more than this many cached states for each one it chooses."""


class Memories(Protocol):
    """Cached states that can be read."""

    def read(self, x: Tensor, past: Tensor, seen: Tensor | None, block: Block) -> Tensor:
        """sum_i past_i M_i(x) over what is seen: x [G, t, D], past and seen [G or 1, t, n] as :meth:`Gate.weights`
        gives them of ``block`` -> [G, t, D']."""

    def split(self) -> list[tuple[Tensor, ...]]:
        """The parameters of each of the G * N states."""

    def read_one(self, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """One state on rows x [R, D] -> [R, D']."""


@dataclass(frozen=True, eq=False)
class Linear:
    """Memories y = x M; ``states`` [G, N, D, D']."""

    states: Tensor

    def read(self, x: Tensor, past: Tensor, seen: Tensor | None, block: Block) -> Tensor:
        """One long-K product: the gated x times the stacked states."""
        return weigh(past, x[:, :, None], seen, self.states[:, block.lo : block.hi])

    def split(self) -> list[tuple[Tensor, ...]]:
        return [(state,) for state in self.states.flatten(0, 1).unbind(0)]

    def read_one(self, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        return x @ state[0]


@dataclass(frozen=True, eq=False)
class Deep:
    """Memories y = gelu(x W_up) W_down (+ x); ``up`` [G, N, Dk, E], ``down`` [G, N, E, Dv]."""

    up: Tensor
    down: Tensor
    residual: bool

    def read(self, x: Tensor, past: Tensor, seen: Tensor | None, block: Block) -> Tensor:
        up, down = (W[:, block.lo : block.hi] for W in (self.up, self.down))
        hidden = pairs(x, up.mT.flatten(1, 2), seen)
        z = gelu(hidden, approximate="tanh").view(*hidden.shape[:2], up.shape[1], up.shape[3])
        y = weigh(past, z, seen, down)
        return y + past.sum(-1, keepdim=True) * x if self.residual else y

    def split(self) -> list[tuple[Tensor, ...]]:
        return list(zip(self.up.flatten(0, 1).unbind(0), self.down.flatten(0, 1).unbind(0), strict=True))

    def read_one(self, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        y = gelu(x @ state[0], approximate="tanh") @ state[1]
        return y + x if self.residual else y


def weigh(past: Tensor, rows: Tensor, seen: Tensor | None, states: Tensor) -> Tensor:
    """sum_i past_i rows_i W_i over what is seen: rows [G, t, n or 1, D], states [G, n, D, D'] -> [G, t, D']."""
    gated = past[..., None] * rows
    if seen is not None and not sound(rows):
        gated = gated.masked_fill(~seen[..., None], 0)
    return mix(gated.flatten(2), states.flatten(1, 2), seen)


def read(x: Tensor, online: Tensor, memories: Memories, gate: Gate, layout: Layout) -> Tensor:
    """gamma_s online + sum over the cached states that the gate chooses, [G, T, D'].

    Args:
        x: [G, T, D], what the memories are read with.
        online: [G, T, D'], the reads of the online memory.
    """
    if gate.reads.sparse and layout.count - 1 > DENSE_STATES * gate.top_k and fake_mode() is None:
        return _read_sparse(x, online, memories, gate, layout)
    parts = []
    # Not slices: Inductor (torch 2.13, CPU) generates wrong code for the sum of four of their gradients.
    sizes = [block.end - block.begin for block in layout.blocks]
    for block, rows, own in zip(layout.blocks, torch.split(x, sizes, 1), torch.split(online, sizes, 1), strict=True):
        past, share, seen = gate.weights(block)
        y = share * own
        if block.hi > block.lo:
            y = y + memories.read(rows, past, seen, block)
        parts.append(y)
    return torch.cat(parts, 1)


def _read_sparse(x: Tensor, online: Tensor, memories: Memories, gate: Gate, layout: Layout) -> Tensor:
    """ssc: every state reads the tokens that chose it, and only those."""
    (G, T, _), N = x.shape, layout.count
    row, group, share, shares = [], [], [], []
    lane = torch.arange(G, device=x.device)[:, None, None]
    for block in layout.blocks:
        past, own = gate.logits(block)
        index, keep = best(past, min(gate.top_k, past.shape[-1]))
        past = past.gather(-1, index).masked_fill(~keep, float("-inf"))
        gamma = torch.cat([past, own], -1).softmax(-1)
        shares.append(gamma[..., -1:])
        token = torch.arange(block.begin, block.end, device=x.device)[:, None]
        row.append((lane * T + token).expand_as(index)[keep])
        group.append((lane * N + block.lo + index)[keep])
        share.append(gamma[..., :-1][keep])
    rows, groups, weights = torch.cat(row), torch.cat(group), torch.cat(share)
    y = (torch.cat(shares, 1) * online).flatten(0, 1)
    order = groups.argsort(stable=True)
    rows, weights = rows[order], weights[order]
    counts = torch.bincount(groups, minlength=G * N).tolist()
    chosen = x.flatten(0, 1).index_select(0, rows).split_with_sizes(counts)
    reads = [
        memories.read_one(part, state) for part, state in zip(chosen, memories.split(), strict=True) if part.shape[0]
    ]
    if reads:
        y = y.index_add(0, rows, weights[:, None] * torch.cat(reads))
    return y.view(G, T, -1)
