"""Launch the backward kernels of a Triton package: states, gradients of the read, of gates, of states, of writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .segments import Segments
from .triton_forward import decays, states_of
from .triton_loader import load_parts
from .triton_tables import DEVICE, make_tables
from .tvm_backward import Gradients


class TritonBackward:
    """The gradients of y = memory_caching(q, k, v, u) on a GPU, by the rendered modules of one configuration.

    Args:
        kernel: a file beside the rendered modules.
        record: its entry in the tuned table; ``record["problem"]`` names the operation, ``record["config"]`` the
            configuration, ``record["parts"]`` the modules.
        parts: the modules by operation, instead of those that ``record`` names.

    Attributes:
        saves: whether the configuration was tuned for states that the forward has kept.
    """

    device, dtype = DEVICE, None
    """Of the tensors that it reads; the dtype is the call's own, one for dy, q, k, v and u."""

    def __init__(self, kernel: Path, record: Mapping[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        parts = load_parts(kernel.parent, record["parts"]) if parts is None else parts
        problem, self.config = record["problem"], record["config"]
        self.saves = self.config["saved"] == "states"
        self.gated = problem["recurrence"] == "swla"
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
        states: torch.Tensor | None = None,
        means: torch.Tensor | None = None,
    ) -> Gradients:
        """Gradients from dy, v ``[B, T, H, Dv]``, q, k, u ``[B, T, H, Dk]`` and gates ``[B, T, H]``.

        Those of q, k, v, u are in their dtype, the gates' float32. ``states`` and ``means`` are what the forward of the
        same arguments left (:class:`Forward`). They are computed again without them, and where pieces are shorter than
        segments: the forward keeps no states of pieces.
        """
        dy, q, k, v, u = (x.contiguous() for x in (dy, q, k, v, u))
        tables = make_tables(segments, self.config["piece"], self.checkpoint, q.device)
        pieces = {"begin": tables.begin, "end": tables.end, "segment": tables.segment}
        reads = {**pieces, "entering": tables.entering, "seg_first": tables.seg_first}
        seg_last = None if tables.whole else tables.seg_last
        scale = float(scale)
        cum = now = after = before = None
        if self.gated:
            g, beta, lam = (_gate(x, absent, q) for x, absent in ((g, 0.0), (beta, 0.0), (lam, 1.0)))
            cum, now, after, before = decays(self.states, tables, g, beta, lam, like=q)
        decayed = {"cum": cum, "now": now, "after": after, "before": before}
        past = sums = None
        if states is not None and means is not None and tables.whole:
            heads = q.shape[0] * q.shape[2]
            ends = states.view(heads, segments.count, *states.shape[1:])
            means = means.view(heads, segments.count, -1)
            if self.gates is None:
                past = self.states.past_states(
                    ends=ends, like=q, cum=cum, end=tables.end, segment=tables.segment, entering=tables.entering,
                    seg_last=tables.seg_last, seq_begin=tables.seq_begin, seq_end=tables.seq_end,
                )  # fmt: skip
            # States that only their sums are read of are no operands.
            read = self.gates is not None or tables.crosses
            operand = ends.to(q.dtype) if read else torch.empty_like(ends, dtype=q.dtype)
        else:
            ends, operand, past, means, sums = states_of(self.states, tables, k, v, (cum, now, after, before))

        logits = lse = gate = dmeans = pull = pulls = own_logit = order = offsets = partial = dpicked = chosen = None
        # More than all segments cannot be chosen.
        top_k = min(max(top_k, 1), segments.count)
        picks: dict[str, torch.Tensor | None] = {"chosen": None, "picked": None}
        if self.gates is not None:
            tiles = tables.tiles(self.config["gates_BT"])
            logits, lse, own_logit, picks["chosen"], picks["picked"] = self.gates(
                u=u, k=k, means=means, sums=sums, **pieces, seg_begin=tables.seg_begin, seg_first=tables.seg_first,
                seg_piece=tables.seg_piece, tiles=tiles, top_k=top_k,
            )  # fmt: skip
        if self.pair_order is not None and self.grouped is not None:
            order, offsets = self.pair_order(chosen=picks["chosen"], N=segments.count)
            partial, dpicked, chosen = self.grouped(
                q=q, dy=dy, states=operand, order=order, offsets=offsets, picked=picks["picked"], lse=lse,
                seg_last=seg_last, N=segments.count, crosses=tables.crosses, scale=scale,
            )  # fmt: skip
        dq, dgamma, own, delta = self.read_backward(
            q=q, k=k, v=v, dy=dy, states=operand, past=past, logits=logits, lse=lse, own_logit=own_logit,
            picked=picks["picked"], partial=partial, **decayed, **reads, seg_last=seg_last,
            tiles=tables.tiles(self.config["dq_BT"]), scale=scale, top_k=top_k,
        )  # fmt: skip
        del operand, past, partial
        du = None
        if self.gates_backward is not None:
            du, dmeans, gate, pull, pulls = self.gates_backward(
                k=k, u=u, means=means, sums=sums, logits=logits, lse=lse, own_logit=own_logit, **picks,
                order=order, offsets=offsets, dgamma=dgamma if dpicked is None else dpicked, own=own, delta=delta,
                **pieces, seg_begin=tables.seg_begin, seg_end=tables.seg_end, seg_first=tables.seg_first,
                seg_past_end=tables.seg_past_end, seg_piece=tables.seg_piece,
                tiles=tables.tiles(self.config["dgates_BT"]),
            )  # fmt: skip
            # The logits are gates now.
            del dgamma, dpicked, lse
        dends, crossing, dk_lead, dv_lead, dbefore = self.state_backward(
            q=q, k=k, v=v, dy=dy, ends=ends, gammas=logits, gate=gate, chosen=chosen, cum=cum, before=before,
            **reads, seg_end=tables.seg_end, seg_past_end=tables.seg_past_end, seg_last=tables.seg_last,
            seq_begin=tables.seq_begin, seq_end=tables.seq_end, scale=scale, crosses=tables.crosses,
        )  # fmt: skip
        del ends, logits
        dk, dv, dg, dbeta, dlam = self.write_backward(
            q=q, k=k, v=v, u=u, dy=dy, g=g, lam=lam, gate=gate, own=own, **decayed, dends=dends, crossing=crossing,
            dk_lead=dk_lead, dv_lead=dv_lead, dbefore=dbefore, dmeans=dmeans, pull=pull, pulls=pulls, **reads,
            seg_last=tables.seg_last, tiles=tables.tiles(self.config["dkv_BJ"]), scale=scale,
        )  # fmt: skip
        return Gradients(dq, dk, dv, du, dg, dbeta, dlam)


def _gate(gate: torch.Tensor | None, absent: float, like: torch.Tensor) -> torch.Tensor:
    """[B, T, H] float32."""
    if gate is None:
        return torch.full(like.shape[:3], absent, dtype=torch.float32, device=like.device)
    return gate.to(torch.float32).contiguous()
