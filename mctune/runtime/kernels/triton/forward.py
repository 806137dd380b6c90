"""Launch the forward kernels of a Triton package: segment states, gates, the read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...segments import Segments
from ...traits import AGGREGATIONS, RECURRENCES
from ..kept import OF_SEGMENTS, given
from ..tvm.forward import Forward
from ..tvm.loader import KernelError
from .loader import load_parts
from .tables import DEVICE, Shares, Tables, make_tables, share_out

Decays = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""cum, now, after, before: what ``decays`` makes of SWLA's gates; all None for linear."""


class TritonForward:
    """y = memory_caching(q, k, v, u) on a GPU, by the rendered modules of one configuration.

    Args:
        kernel: a file beside the rendered modules.
        record: its entry in the tuned table; ``record["problem"]`` names the operation, ``record["config"]`` the
            configuration, ``record["parts"]`` the modules.
        parts: the modules by operation, instead of those that ``record`` names.

    Attributes:
        gives: names of what it can keep for a backward (:func:`kept.given`).
    """

    device, dtype = DEVICE, None
    """Of the tensors that it reads; the dtype is the call's own, one for q, k, v and u."""

    def __init__(self, kernel: Path, record: Mapping[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        parts = load_parts(kernel.parent, record["parts"]) if parts is None else parts
        problem, self.config = record["problem"], record["config"]
        self.gives = given("triton", problem, self.config)
        self.gated = RECURRENCES[problem["recurrence"]].gated
        self.routed = AGGREGATIONS[problem["aggregation"]].routed
        self.checkpoint = problem["state_init"] == "checkpoint"
        self.states = parts["segment_states"]
        self.gates = parts["gates"].gates if "gates" in parts else None
        self.pair_order = parts["pair_order"].pair_order if "pair_order" in parts else None
        self.grouped_read = parts["grouped_read"].grouped_read if "grouped_read" in parts else None
        self.read_specialized = parts["read_specialized"].read_specialized if "read_specialized" in parts else None
        if self.read_specialized is not None:
            refuse_specialized()
        self.read_forward: Any = parts["read_forward"].read_forward if "read_forward" in parts else None

    def __call__(
        self,
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
        keep: Sequence[str] = (),
    ) -> Forward:
        """y, in q's dtype, from q, k, u ``[B, T, H, Dk]``, v and gates ``[B, T, H]``; and what ``keep`` names."""
        q, k, v, u = (x.contiguous() for x in (q, k, v, u))
        tables = make_tables(segments, self.config["piece"], self.checkpoint, q.device)
        cum, now, after, before = decays(self.states, tables, g, beta, lam, like=q) if self.gated else (None,) * 4
        ends, operand, past, means, sums = states_of(
            self.states, tables, k, v, (cum, now, after, before), exact="states" in keep
        )
        pieces = {"begin": tables.begin, "end": tables.end, "segment": tables.segment}
        spans = {"seg_begin": tables.seg_begin, "seg_first": tables.seg_first, "seg_piece": tables.seg_piece}
        seg_last = None if tables.whole else tables.seg_last
        # More than all segments cannot be chosen.
        top_k = min(max(top_k, 1), segments.count)
        logits = lse = own = chosen = picked = order = starts = runs = None
        heads, T = q.shape[0] * q.shape[2], q.shape[1]
        shares = Shares(heads, heads, T, 1)
        if self.gates is not None:
            tiles = tables.tiles(self.config["gates_BT"])
            logits, lse, own, chosen, picked = self.gates(
                u=u, k=k, means=means, sums=sums, **pieces, **spans, tiles=tiles, top_k=top_k
            )
        if self.pair_order is not None:
            part = top_k * v.shape[-1] * v.element_size()
            shares = share_out(heads, T, part, self.config["group_MIB"] << 20, tables)
            order, starts, of_blocks = self.pair_order(chosen=chosen, N=segments.count, blocks=shares.blocks)
            of_pairs, runs = (starts, None) if of_blocks is None else of_blocks
        read = {
            "q": q, "k": k, "v": v, "states": operand, "logits": logits, "lse": lse, **pieces, "seg_last": seg_last,
            "entering": tables.entering, "scale": float(scale),
        }  # fmt: skip
        if self.read_specialized is not None:
            y = self.read_specialized(**read, tiles=tables.tiles(self.config["read_BT"]), seg_first=tables.seg_first)
        else:
            y, partial = torch.empty_like(v), None
            for first_head, count, block, (begin, end) in shares:
                if self.grouped_read is not None:
                    partial = self.grouped_read(
                        q=q, states=operand, order=order, starts=of_pairs, runs=runs, picked=picked, lse=lse,
                        seg_last=seg_last, N=segments.count, first_head=first_head, heads=count, block=block,
                        blocks=shares.blocks,
                    )  # fmt: skip
                y = self.read_forward(
                    **read, **spans, u=u, past=past, means=means, sums=sums, own=own, picked=picked, partial=partial,
                    cum=cum, now=now, after=after, before=before, y=y, first_head=first_head, heads=count,
                    tiles=tables.tiles(self.config["read_BT"], (begin, end) if shares.blocks > 1 else None),
                    first_token=begin, span=end - begin, top_k=top_k,
                )  # fmt: skip
        made = {
            "states": ends, "operand": operand, "past": past, "means": means, "logits": logits, "lse": lse, "own": own,
            "chosen": chosen, "picked": picked, "order": order, "starts": starts,
        }  # fmt: skip
        return Forward(y, {name: _of_segments(name, made[name], tables) for name in keep})


def _of_segments(name: str, x: torch.Tensor | None, tables: Tables) -> torch.Tensor:
    """An array that is kept: of end states those of segments, a row each."""
    assert x is not None, name
    if name in ("states", "operand") and not tables.whole:
        x = x.index_select(1, tables.seg_last)
    return x.flatten(0, 1) if name in OF_SEGMENTS else x


def refuse_specialized() -> None:
    """Refuse kernels of specialised warps where nothing runs them.

    Raises:
        KernelError: in Triton's interpreter, and on a GPU other than those of sm_90.
    """
    if DEVICE == "cpu":
        raise KernelError(
            "formulation=specialized is Gluon, which Triton's interpreter cannot run: verify it on a GPU of sm_90, or "
            "tune another formulation (a search without --measure has no other)"
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        raise KernelError(
            f"formulation=specialized is for GPUs of sm_90, and {torch.cuda.get_device_name()} is none; tune kernels "
            "for it with `mctune search`"
        )


def decays(
    module: Any,
    tables: Tables,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    lam: torch.Tensor | None,
    *,
    like: torch.Tensor,
) -> Decays:
    """The decays and strengths of SWLA's writes, by the ``segment_states`` module; absent gates are 0, 0, 1."""
    shape = like.shape[:3]
    gates = [
        torch.full(shape, absent, dtype=torch.float32, device=like.device)
        if gate is None
        else gate.to(torch.float32).contiguous()
        for gate, absent in ((g, 0.0), (beta, 0.0), (lam, 1.0))
    ]
    made: Decays = module.decays(*gates, begin=tables.begin, end=tables.end, entering=tables.entering)
    return made


States = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""ends, operand, past, means, sums: what ``segment_states`` returns. A backward may do without means."""


def states_of(module: Any, tables: Tables, k: torch.Tensor, v: torch.Tensor, decayed: Decays, *, exact: bool) -> States:
    """The states of all pieces; ``exact``: whether the end states are wanted in float32."""
    cum, now, after, before = decayed
    made: States
    made = module.segment_states(
        k=k, v=v, cum=cum, now=now, after=after, before=before, begin=tables.begin, end=tables.end,
        segment=tables.segment, entering=tables.entering, seg_begin=tables.seg_begin, seg_end=tables.seg_end,
        seg_piece=tables.seg_piece, seg_last=tables.seg_last, seq_begin=tables.seq_begin, seq_end=tables.seq_end,
        crosses=tables.crosses, exact=exact,
    )  # fmt: skip
    return made
