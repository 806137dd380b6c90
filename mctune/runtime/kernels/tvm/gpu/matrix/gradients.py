"""Gradients of the read, of learned gates, of states and of writes: the kernels of a backward pass on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ....triton.tables import Tables
from ..functions import blocks
from .operation import Operation

Tensor = torch.Tensor
_BLOCK = 256
"""Elements of a state that a block of ``carry_backward`` has."""
_DESCRIPTORS = 16
"""Segments that a block of ``descriptor`` has."""


class ReadGradients(NamedTuple):
    """dq ``[B, T, H, DK]``; to be added up over blocks dgamma ``[blocks, B*H, N, T]``, own and delta, without the N."""

    dq: Tensor
    dgamma: Tensor | None
    own: Tensor
    delta: Tensor | None


class GateGradients(NamedTuple):
    """du ``[B, T, H, DK]``; float32: dmeans ``[B*H, N, SK]``; gate and pull ``[B*H, T]``; pulls ``[B*H, P, SK]``."""

    du: Tensor
    dmeans: Tensor
    gate: Tensor
    pull: Tensor
    pulls: Tensor | None


class StateGradients(NamedTuple):
    """dends ``[B*H, P, SK, SV]`` in q's dtype; of swla, where pieces are entered, float32: crossing and dbefore
    ``[B*H, P]``, dk_lead ``[B*H, P, 2, SK]``, dv_lead ``[B*H, P, SV]``."""

    dends: Tensor
    crossing: Tensor | None = None
    dk_lead: Tensor | None = None
    dv_lead: Tensor | None = None
    dbefore: Tensor | None = None


class ReadBackward(Operation):
    """The operation ``read_backward``."""

    def read_backward(
        self, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, states: Tensor, past: Tensor | None, partial: None,
        gates: Any, decays: Any, *, tables: Tables, scale: float, top_k: int,
    ) -> ReadGradients:  # fmt: skip
        """Gradients of q and of the gates, but for their softmax."""
        B, T, H, _ = q.shape
        parts = blocks(self.DK, min(self.config["dq_BK"], self.SK))
        N, P = tables.seg_first.shape[0], tables.begin.shape[0]
        own = q.new_empty((parts, B * H, T), dtype=torch.float32)
        made = ReadGradients(torch.empty_like(q), None, own, None)
        if self.routed:
            dgamma = own.new_empty((parts, B * H, N, T))
            made = made._replace(dgamma=dgamma, delta=torch.empty_like(own))
            gamma = {"logits": gates.logits, "lse": gates.lse, "dgamma": dgamma, "delta": made.delta}
        else:
            gamma = {"past": past}
        tiles = tables.tiles(self.config["dq_warps"] * self.config["dq_rows"])
        self.launch(
            "read_backward", (tiles.shape[0] * parts, B * H, 1), q, q=q, k=k, v=v, dy=dy, operand=states, dq=made.dq,
            own=own, **self.of_swla(decays, "cum", "now", "after", "before"), **gamma, begin=tables.begin,
            end=tables.end, segment=tables.segment, entering=tables.entering, seg_first=tables.seg_first,
            seg_last=tables.seg_last, tiles=tiles, scale=scale, heads=B * H, T=T, H=H, N=N, P=P,
        )  # fmt: skip
        return made


class GatesBackward(Operation):
    """The operation ``gates_backward``."""

    def gates_backward(
        self, k: Tensor, u: Tensor, means: Tensor, sums: Any, gates: Any, dpicked: None, reads: ReadGradients,
        *, tables: Tables,
    ) -> GateGradients:  # fmt: skip
        """Gradients of the connectors u and of mean keys, and the gates that other gradients are made of.

        ``reads.dgamma`` is overwritten.
        """
        B, T, H, _ = u.shape
        heads, N, P = B * H, tables.seg_first.shape[0], tables.begin.shape[0]
        assert reads.dgamma is not None and reads.delta is not None
        pieces, running = (None, None) if sums is None else sums
        made = GateGradients(torch.empty_like(u), means, torch.empty_like(gates.lse), torch.empty_like(gates.lse), None)
        tiles = tables.tiles(self.config["dgates_warps"] * 16)
        self.launch(
            "connector", (tiles.shape[0], heads, 1), means, k=k, du=made.du, means=means, sums=pieces, running=running,
            logits=gates.logits, gammas=gates.gammas, lse=gates.lse, dgamma=reads.dgamma, own=reads.own,
            delta=reads.delta, gate=made.gate, pull=made.pull, begin=tables.begin, end=tables.end,
            segment=tables.segment, seg_begin=tables.seg_begin, seg_first=tables.seg_first, seg_piece=tables.seg_piece,
            tiles=tiles, many=int(pieces is not None), ahead=int(running is not None), parts=reads.own.shape[0],
            heads=heads, T=T, H=H, N=N, P=P,
        )  # fmt: skip
        splits = self.config["dgates_splits"]
        parts = means.new_empty((splits, heads, N, self.SK))
        self.launch(
            "descriptor", (splits * blocks(N, _DESCRIPTORS), heads, 1), means, u=u, dr=reads.dgamma, dmeans=parts,
            seg_begin=tables.seg_begin, seg_end=tables.seg_end, seg_past_end=tables.seg_past_end, splits=splits,
            heads=heads, T=T, H=H, N=N,
        )  # fmt: skip
        pulls = None
        if P > N:
            pulls = means.new_empty((heads, P, self.SK))
            self.launch(
                "pulls", (P, heads, 1), u, u=u, pull=made.pull, pulls=pulls, begin=tables.begin, end=tables.end,
                T=T, H=H, P=P,
            )  # fmt: skip
        return made._replace(dmeans=parts[0] if splits == 1 else parts.sum(0), pulls=pulls)


class StateBackward(Operation):
    """The operation ``state_backward``."""

    def state_backward(
        self, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, ends: Tensor | None, gammas: Tensor | None,
        gate: Tensor | None, chosen: None, decays: Any, *, tables: Tables, scale: float,
    ) -> StateGradients:  # fmt: skip
        """dEnd; for swla, of pieces that are entered, what it says of what enters."""
        B, T, H, _ = q.shape
        heads, N, P, crosses = B * H, tables.seg_first.shape[0], tables.begin.shape[0], tables.crosses
        keys = self.config["dstates_warps"] * self.config["dstates_rows"]
        count = blocks(self.SK, keys) * blocks(self.SV, min(self.config["dstates_BV"], self.SV))
        dends = q.new_empty((heads, P, self.SK, self.SV))
        dstates = products = dentered = None
        rows: dict[str, Any] = {"q": q, "dy": dy, "scale": scale, "T": T, "H": H, "P": P}
        if self.routed:
            # What is carried on has float32; what is left is an operand of products.
            dstates = torch.empty_like(dends, dtype=torch.float32) if crosses else None
            self.launch(
                "cached", (count * N, heads, 1), q, **rows, dends=dends, gammas=gammas, dstates=dstates, N=N,
                seg_end=tables.seg_end, seg_past_end=tables.seg_past_end, seg_last=tables.seg_last,
                to_dstates=int(crosses), to_dends=int(not crosses),
            )  # fmt: skip
        else:
            products = self._products(rows, count * P, None, None, tables)
            if not self.gated:
                dentered = products  # what enters a piece is read as a cached state is
        if crosses and dentered is None:
            dentered = self._products(rows, count * P, gate, decays.cum, tables)
        if not self.routed and not self.gated and not crosses:
            dentered = None
        if not (crosses or products is not None):
            return StateGradients(dends)
        across = blocks(self.SK * self.SV, _BLOCK)
        crossing = dends.new_empty((heads, P, across), dtype=torch.float32) if self.gated and crosses else None
        of_swla = {"ends": ends, "cum": decays.cum, "crossing": crossing} if self.gated else {}
        self.launch(
            "carry_backward", (across, tables.seq_begin.shape[0], heads), tables.end, dends=dends,
            dentered=dentered, products=products, dstates=dstates, **of_swla, end=tables.end, segment=tables.segment,
            entering=tables.entering, seg_last=tables.seg_last, seq_begin=tables.seq_begin, seq_end=tables.seq_end,
            with_products=int(products is not None), with_dstates=int(dstates is not None),
            with_entered=int(crosses), blocks=across, T=T, P=P,
        )  # fmt: skip
        if crossing is None:
            return StateGradients(dends)
        made = StateGradients(
            dends, crossing.sum(-1), crossing.new_empty((heads, P, 2, self.SK)),
            crossing.new_empty((heads, P, self.SV)), crossing.new_empty((heads, P)),
        )  # fmt: skip
        self.launch(
            "lead", (P, heads, 1), k, **rows, k=k, v=v, **made._asdict(), gate=gate, cum=decays.cum,
            before=decays.before, begin=tables.begin, end=tables.end, segment=tables.segment,
            entering=tables.entering, seg_first=tables.seg_first,
        )  # fmt: skip
        return made

    def _products(
        self, rows: Mapping[str, Any], count: int, gate: Tensor | None, cum: Tensor | None, tables: Tables
    ) -> Tensor:
        """``[B*H, P, SK, SV]``, float32: the sum of q_t^T dy_t over every piece, with gates and decays where given."""
        q, heads = rows["q"], rows["q"].shape[0] * rows["H"]
        products: Tensor = q.new_empty((heads, rows["P"], self.SK, self.SV), dtype=torch.float32)
        self.launch(
            "piece", (count, heads, 1), q, **rows, gate=gate, cum=cum, products=products, begin=tables.begin,
            end=tables.end, segment=tables.segment, seg_first=tables.seg_first, with_gate=int(gate is not None),
            with_cum=int(cum is not None),
        )  # fmt: skip
        return products


class WriteBackward(Operation):
    """The operation ``write_backward``."""

    def write_backward(
        self, q: Tensor, k: Tensor, v: Tensor, u: Tensor, dy: Tensor, g: Tensor | None, lam: Tensor | None,
        own: Tensor, decays: Any, gates: GateGradients | None, states: StateGradients, *, tables: Tables, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """dk ``[B, T, H, DK]``, dv ``[B, T, H, DV]``, and float32 dg, dbeta and dlam ``[B, T, H]``, None for linear."""
        B, T, H, _ = k.shape
        heads, N, P = B * H, tables.seg_first.shape[0], tables.begin.shape[0]
        dk, dv, lead = torch.empty_like(k), torch.empty_like(v), states.dv_lead is not None
        more: dict[str, Any] = {}
        sums = {name: own.new_empty((heads, T)) for name in ("diagonal", "tail", "ending")} if self.gated else {}
        if self.gated:
            more = self.of_swla(decays, "cum", "now", "after") | sums
            more |= {"dk_lead": states.dk_lead, "dv_lead": states.dv_lead, "with_lead": int(lead)}
        if gates is not None:
            more |= {"u": u, "gate": gates.gate, "pull": gates.pull, "pulls": gates.pulls, "dmeans": gates.dmeans}
            more |= {"many": int(gates.pulls is not None)}
        tiles = tables.tiles(self.config["dkv_warps"] * self.config["dkv_rows"])
        self.launch(
            "write", (tiles.shape[0], heads, 1), q, q=q, k=k, v=v, dy=dy, dends=states.dends, dk=dk, dv=dv, **more,
            begin=tables.begin, end=tables.end, segment=tables.segment, entering=tables.entering,
            seg_first=tables.seg_first, seg_last=tables.seg_last, tiles=tiles, scale=scale, T=T, H=H, N=N, P=P,
        )  # fmt: skip
        if g is None or lam is None:
            return dk, dv, None, None, None
        found = {name: torch.empty_like(g) for name in ("dg", "dbeta", "dlam")}
        self.launch(
            "strength", (P, heads, 1), g, gate=None if gates is None else gates.gate, own=own.sum(0), g=g, lam=lam,
            **self.of_swla(decays, "cum", "now", "after", "before"), **sums, dbefore=states.dbefore,
            crossing=states.crossing, **found, begin=tables.begin, end=tables.end, segment=tables.segment,
            entering=tables.entering, seg_first=tables.seg_first, with_lead=int(lead), T=T, H=H, P=P,
        )  # fmt: skip
        return dk, dv, found["dg"], found["dbeta"], found["dlam"]
