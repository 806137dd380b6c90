"""Launch the backward kernels of a Triton package: states, gradients of the read, of gates, of states, of writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .kept import CHOICE, LOGITS, wanted
from .segments import Segments
from .triton_forward import decays, states_of
from .triton_loader import load_parts
from .triton_tables import DEVICE, Tables, make_tables
from .tvm_backward import Gradients


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
    """Of the tensors that it reads; the dtype is the call's own, one for dy, q, k, v and u."""

    def __init__(self, kernel: Path, record: Mapping[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        parts = load_parts(kernel.parent, record["parts"]) if parts is None else parts
        problem, self.config = record["problem"], record["config"]
        self.wants = wanted("triton", problem, self.config)
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
        pieces = {"begin": tables.begin, "end": tables.end, "segment": tables.segment}
        reads = {**pieces, "entering": tables.entering, "seg_first": tables.seg_first}
        seg_last = None if tables.whole else tables.seg_last
        scale = float(scale)
        cum = now = after = before = made = None
        if self.gated:
            g, beta, lam = (_gate(x, absent, q) for x, absent in ((g, 0.0), (beta, 0.0), (lam, 1.0)))
            made = cum, now, after, before = decays(self.states, tables, g, beta, lam, like=q)
        decayed = {"cum": cum, "now": now, "after": after, "before": before}
        # More than all segments cannot be chosen.
        top_k = min(max(top_k, 1), segments.count)
        ends, operand, past, means, sums = self._states(tables, k, v, made, kept)
        gates = self._gates(tables, k, u, means, sums, top_k, kept)
        gammas = gates["gammas"]
        partial = dpicked = chosen_ends = None
        if self.grouped is not None:
            partial, dpicked, chosen_ends = self.grouped(
                q=q, dy=dy, states=operand, order=gates["order"], starts=gates["starts"], picked=gates["picked"],
                lse=gates["lse"], seg_last=seg_last, N=segments.count, crosses=tables.crosses,
                scale=scale,
            )  # fmt: skip
        dq, dgamma, own, delta = self.read_backward(
            q=q, k=k, v=v, dy=dy, states=operand, past=past, logits=gates["logits"], lse=gates["lse"],
            own_logit=gates["own"], picked=gates["picked"], partial=partial, **decayed, **reads, seg_last=seg_last,
            tiles=tables.tiles(self.config["dq_BT"]), scale=scale, top_k=top_k,
        )  # fmt: skip
        del operand, past, partial
        du = dmeans = gate = pull = pulls = None
        if self.gates_backward is not None:
            du, dmeans, gate, pull, pulls = self.gates_backward(
                k=k, u=u, means=means, sums=sums, logits=gates["logits"], gammas=gammas, lse=gates["lse"],
                own_logit=gates["own"], chosen=gates["chosen"], picked=gates["picked"], order=gates["order"],
                starts=gates["starts"], dgamma=dgamma if dpicked is None else dpicked, own=own, delta=delta, **pieces,
                seg_begin=tables.seg_begin, seg_end=tables.seg_end, seg_first=tables.seg_first,
                seg_past_end=tables.seg_past_end, seg_piece=tables.seg_piece,
                tiles=tables.tiles(self.config["dgates_BT"]),
            )  # fmt: skip
        del dgamma, dpicked, gates
        dends, crossing, dk_lead, dv_lead, dbefore = self.state_backward(
            q=q, k=k, v=v, dy=dy, ends=ends, gammas=gammas, gate=gate, chosen=chosen_ends, cum=cum, before=before,
            **reads, seg_end=tables.seg_end, seg_past_end=tables.seg_past_end, seg_last=tables.seg_last,
            seq_begin=tables.seq_begin, seq_end=tables.seq_end, scale=scale, crosses=tables.crosses,
        )  # fmt: skip
        del ends, gammas
        dk, dv, dg, dbeta, dlam = self.write_backward(
            q=q, k=k, v=v, u=u, dy=dy, g=g, lam=lam, gate=gate, own=own, **decayed, dends=dends, crossing=crossing,
            dk_lead=dk_lead, dv_lead=dv_lead, dbefore=dbefore, dmeans=dmeans, pull=pull, pulls=pulls, **reads,
            seg_last=tables.seg_last, tiles=tables.tiles(self.config["dkv_BJ"]), scale=scale,
        )  # fmt: skip
        return Gradients(dq, dk, dv, du, dg, dbeta, dlam)

    def _states(
        self,
        tables: Tables,
        k: torch.Tensor,
        v: torch.Tensor,
        decayed: Any,
        kept: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor | None, ...]:
        """What the forward has kept of its states, and the rest: ends, operand, past, means, sums."""
        if not tables.whole or kept.keys().isdisjoint(("states", "operand", "past")):
            exact = self.gated and tables.crosses
            return tuple(states_of(self.states, tables, k, v, decayed, exact=exact))
        heads = k.shape[0] * k.shape[2]
        ends, operand, past, means = (
            None if (x := kept.get(name)) is None else x.view(heads, -1, *x.shape[1:])
            for name in ("states", "operand", "past", "means")
        )
        if self.gates is None and past is None:
            cum = None if decayed is None else decayed.cum
            past = self.states.past_states(ends=ends, like=k, cum=cum, tables=tables)
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
    ) -> dict[str, torch.Tensor | None]:
        """Logits and their sums, or choice and order of ssc: as the forward has kept them, or again.

        And where the gates go: to the logits' place, but for logits that another backward may read.
        """
        absent: dict[str, torch.Tensor | None] = dict.fromkeys((*LOGITS, *CHOICE, "gammas"))
        if self.gates is None:
            return absent
        names = LOGITS if self.pair_order is None else CHOICE
        if kept.keys() >= set(names):
            gammas = torch.empty_like(kept["logits"]) if "logits" in names else None
            return absent | {name: kept[name] for name in names} | {"gammas": gammas}
        logits, lse, own, chosen, picked = self.gates(
            u=u, k=k, means=means, sums=sums, tables=tables, tiles=tables.tiles(self.config["gates_BT"]), top_k=top_k
        )
        made = absent | {
            "logits": logits, "gammas": logits, "lse": lse, "own": own, "chosen": chosen, "picked": picked,
        }  # fmt: skip
        if self.pair_order is not None:
            made["order"], made["starts"], _ = self.pair_order(chosen=chosen, N=tables.seg_begin.shape[0], blocks=1)
        return made


def _gate(gate: torch.Tensor | None, absent: float, like: torch.Tensor) -> torch.Tensor:
    """[B, T, H] float32."""
    if gate is None:
        return torch.full(like.shape[:3], absent, dtype=torch.float32, device=like.device)
    return gate.to(torch.float32).contiguous()
