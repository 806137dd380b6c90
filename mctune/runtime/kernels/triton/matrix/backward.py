"""Launch the backward kernels of a Triton package: states, gradients of the read, of gates, of states, of writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ....segments import Segments
from ....traits import RECURRENCES
from ...kept import CHOICE, LOGITS, wanted
from ...results import Gradients
from ..loader import load_parts
from ..tables import DEVICE, Tables, make_tables
from .forward import decays, states_of


class Decays(NamedTuple):
    """Of SWLA's writes: cum, now and after ``[B*H, T]``, before ``[B*H, P]``, float32; all None for linear."""

    cum: torch.Tensor | None = None
    now: torch.Tensor | None = None
    after: torch.Tensor | None = None
    before: torch.Tensor | None = None


class Gates(NamedTuple):
    """Learned gates: what :mod:`kept` names, and where those of cached segments go; all None where they are equal."""

    logits: torch.Tensor | None = None
    gammas: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    own: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    picked: torch.Tensor | None = None
    order: torch.Tensor | None = None
    starts: torch.Tensor | None = None


class TritonBackward:
    """The gradients of y = memory_caching(q, k, v, u) on a GPU, by the rendered modules of one configuration.

    Args:
        kernel: a file beside the rendered modules.
        record: its entry in the tuned table; ``record["problem"]`` names the operation, ``record["config"]`` the
            configuration, ``record["parts"]`` the modules.
        parts: the modules by operation, instead of those that ``record`` names.

    Attributes:
        wants: names of what the forward should keep (:func:`kept.wanted`).
    """

    device, dtype = DEVICE, None
    """What the tensors that it reads are on and in; the dtype is the call's own, one for dy, q, k, v and u."""

    def __init__(self, kernel: Path, record: Mapping[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        parts = load_parts(kernel.parent, record["parts"]) if parts is None else parts
        problem, self.config = record["problem"], record["config"]
        self.wants = wanted("cuda", problem, self.config)
        self.gated = RECURRENCES[problem["recurrence"]].gated
        self.checkpoint = problem["state_init"] == "checkpoint"
        self.states = parts["segment_states"]
        self.gates = parts["gates"].gates if "gates" in parts else None
        self.pair_order = parts["pair_order"].pair_order if "pair_order" in parts else None
        self.grouped = parts["grouped_backward"].grouped_backward if "grouped_backward" in parts else None
        self.gates_backward = parts["gates_backward"].gates_backward if "gates_backward" in parts else None
        self.read_backward = parts["read_backward"].read_backward
        self.state_backward = parts["state_backward"].state_backward
        self.write_backward = parts["write_backward"].write_backward

    def __call__(
        self,
        dy: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        u: torch.Tensor,
        *,
        g: torch.Tensor | None,
        beta: torch.Tensor | None,
        lam: torch.Tensor | None,
        scale: float,
        top_k: int,
        segments: Segments,
        kept: Mapping[str, torch.Tensor] | None = None,
    ) -> Gradients:
        """Gradients from dy, v ``[B, T, H, Dv]``, q, k, u ``[B, T, H, Dk]`` and gates ``[B, T, H]``.

        Those of q, k, v, u are in their dtype, the gates' float32. ``kept``: what the forward of the same arguments has
        kept (:mod:`kept`), which is only read. What it has not is computed again, and states where pieces are shorter
        than segments: the forward keeps none of pieces.
        """
        kept = kept or {}
        dy, q, k, v, u = (x.contiguous() for x in (dy, q, k, v, u))
        tables = make_tables(segments, self.config["piece"], self.checkpoint, q.device)
        decayed = Decays()
        if self.gated:
            g, beta, lam = (_gate(x, absent, q) for x, absent in ((g, 0.0), (beta, 0.0), (lam, 1.0)))
            decayed = Decays(*decays(self.states, tables, g, beta, lam, like=q))
        # More than all segments cannot be chosen.
        top_k = min(max(top_k, 1), segments.count)
        ends, operand, past, means, sums = self._states(tables, k, v, decayed, kept)
        gates = self._gates(tables, k, u, means, sums, top_k, kept)
        partial = dpicked = chosen_ends = None
        if self.grouped is not None:
            partial, dpicked, chosen_ends = self.grouped(
                q=q, dy=dy, states=operand, gates=gates, tables=tables, scale=float(scale)
            )
        reads = self.read_backward(
            q=q, k=k, v=v, dy=dy, states=operand, past=past, partial=partial, gates=gates, decays=decayed,
            tables=tables, scale=float(scale), top_k=top_k,
        )  # fmt: skip
        del operand, past, partial
        dgates = None
        if self.gates_backward is not None:
            dgates = self.gates_backward(
                k=k, u=u, means=means, sums=sums, gates=gates, dpicked=dpicked, reads=reads, tables=tables
            )
        dq, own, gammas = reads.dq, reads.own, gates.gammas
        del dpicked, reads, gates  # dgamma and the choice take much memory
        dstates = self.state_backward(
            q=q, k=k, v=v, dy=dy, ends=ends, gammas=gammas, gate=None if dgates is None else dgates.gate,
            chosen=chosen_ends, decays=decayed, tables=tables, scale=float(scale),
        )  # fmt: skip
        del ends, gammas
        dk, dv, dg, dbeta, dlam = self.write_backward(
            q=q, k=k, v=v, u=u, dy=dy, g=g, lam=lam, own=own, decays=decayed, gates=dgates, states=dstates,
            tables=tables, scale=float(scale),
        )  # fmt: skip
        return Gradients(dq, dk, dv, None if dgates is None else dgates.du, dg, dbeta, dlam)

    def _states(
        self,
        tables: Tables,
        k: torch.Tensor,
        v: torch.Tensor,
        decayed: Decays,
        kept: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor | None, ...]:
        """What the forward has kept of its states, and the rest: ends, operand, past, means, sums."""
        if not tables.whole or kept.keys().isdisjoint(("states", "operand", "past")):
            exact = self.gated and tables.crosses
            return tuple(states_of(self.states, tables, k, v, decayed if self.gated else None, exact=exact))
        heads = k.shape[0] * k.shape[2]
        ends, operand, past, means = (
            None if (x := kept.get(name)) is None else x.view(heads, -1, *x.shape[1:])
            for name in ("states", "operand", "past", "means")
        )
        if self.gates is None and past is None:
            past = self.states.past_states(ends=ends, like=k, cum=decayed.cum, tables=tables)
        if operand is None:
            # Where only sums are read, some array stands for what is not.
            read = self.gates is not None or tables.crosses
            operand = ends.to(k.dtype) if read and ends is not None else past
        assert operand is not None
        return ends, operand, past, means, None

    def _gates(
        self,
        tables: Tables,
        k: torch.Tensor,
        u: torch.Tensor,
        means: torch.Tensor | None,
        sums: torch.Tensor | None,
        top_k: int,
        kept: Mapping[str, torch.Tensor],
    ) -> Gates:
        """Logits and their sums, or choice and order of ssc: as the forward has kept them, or again.

        And where the gates go: to the logits' place, but for logits that another backward may read.
        """
        if self.gates is None:
            return Gates()
        names = LOGITS if self.pair_order is None else CHOICE
        if kept.keys() >= set(names):
            gammas = torch.empty_like(kept["logits"]) if "logits" in names else None
            return Gates(**{name: kept[name] for name in names}, gammas=gammas)
        logits, lse, own, chosen, picked = self.gates(
            u=u, k=k, means=means, sums=sums, tables=tables, tiles=tables.tiles(self.config["gates_BT"]), top_k=top_k
        )
        order = starts = None
        if self.pair_order is not None:
            order, starts, _ = self.pair_order(chosen=chosen, N=tables.seg_begin.shape[0], blocks=1)
        return Gates(logits, logits, lse, own, chosen, picked, order, starts)


def _gate(gate: torch.Tensor | None, absent: float, like: torch.Tensor) -> torch.Tensor:
    """[B, T, H] float32."""
    if gate is None:
        return torch.full(like.shape[:3], absent, dtype=torch.float32, device=like.device)
    return gate.to(torch.float32).contiguous()


LAUNCHER = TritonBackward
