"""Launch the forward kernels of a Triton package: segment states, gates, the read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ....errors import KernelError
from ....segments import Segments
from ....traits import AGGREGATIONS, RECURRENCES
from ...kept import OF_SEGMENTS, given
from ...results import Forward
from ..loader import load_parts
from ..tables import DEVICE, Tables, make_tables, share_out


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
    """What the tensors that it reads are on and in; the dtype is the call's own, one for q, k, v and u."""

    def __init__(self, kernel: Path, record: Mapping[str, Any], parts: Mapping[str, Any] | None = None) -> None:
        parts = load_parts(kernel.parent, record["parts"]) if parts is None else parts
        problem, self.config = record["problem"], record["config"]
        self.gives = given("cuda", problem, self.config)
        self.gated = RECURRENCES[problem["recurrence"]].gated
        self.routed = AGGREGATIONS[problem["aggregation"]].routed
        self.checkpoint = problem["state_init"] == "checkpoint"
        self.states = parts["segment_states"]
        self.gates = parts["gates"].gates if "gates" in parts else None
        self.pair_order = parts["pair_order"].pair_order if "pair_order" in parts else None
        self.grouped_read: Any = parts["grouped_read"].grouped_read if "grouped_read" in parts else None
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
        decayed = decays(self.states, tables, g, beta, lam, like=q) if self.gated else None
        states = states_of(self.states, tables, k, v, decayed, exact="states" in keep)
        # More than all segments cannot be chosen.
        top_k = min(max(top_k, 1), segments.count)
        gates = order = starts = None
        if self.gates is not None:
            tiles = tables.tiles(self.config["gates_BT"])
            gates = self.gates(u=u, k=k, means=states.means, sums=states.sums, tables=tables, tiles=tiles, top_k=top_k)
        read = {"q": q, "k": k, "v": v, "states": states, "gates": gates, "tables": tables, "scale": float(scale)}
        if self.read_specialized is not None:
            y = self.read_specialized(**read, tiles=tables.tiles(self.config["read_BT"]))
        else:
            read |= {"u": u, "decays": decayed, "top_k": top_k, "y": torch.empty_like(v)}
            y, order, starts = self._read(read, tables)
        made = {
            "states": states.ends, "operand": states.operand, "past": states.past, "means": states.means,
            "order": order, "starts": starts, **(gates._asdict() if gates is not None else {}),
        }  # fmt: skip
        return Forward(y, {name: _of_segments(name, made[name], tables) for name in keep})

    def _read(
        self, read: Mapping[str, Any], tables: Tables
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """y; and where pairs are grouped by their segments, in shares of heads and tokens, their order and starts."""
        q, v, y, states, gates = (read[name] for name in ("q", "v", "y", "states", "gates"))
        heads, T, rows = q.shape[0] * q.shape[2], q.shape[1], self.config["read_BT"]
        if self.pair_order is None:
            y = self.read_forward(
                **read, partial=None, first_head=0, heads=heads, first_token=0, span=T, tiles=tables.tiles(rows)
            )
            return y, None, None
        part = read["top_k"] * v.shape[-1] * v.element_size()
        shares = share_out(heads, T, part, self.config["group_MIB"] << 20, tables)
        order, starts, of_blocks = self.pair_order(
            chosen=gates.chosen, N=tables.seg_begin.shape[0], blocks=shares.blocks
        )
        of_pairs, runs = (starts, None) if of_blocks is None else of_blocks
        for first_head, count, block, (begin, end) in shares:
            partial = self.grouped_read(
                q=q, states=states, order=order, starts=of_pairs, runs=runs, gates=gates, tables=tables,
                first_head=first_head, heads=count, block=block, blocks=shares.blocks,
            )  # fmt: skip
            y = self.read_forward(
                **read, partial=partial, first_head=first_head, heads=count, first_token=begin, span=end - begin,
                tiles=tables.tiles(rows, (begin, end) if shares.blocks > 1 else None),
            )  # fmt: skip
        return y, order, starts


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
) -> Any:
    """The decays and strengths of SWLA's writes, by the ``segment_states`` module; absent gates are 0, 0, 1."""
    shape = like.shape[:3]
    gates = [
        torch.full(shape, absent, dtype=torch.float32, device=like.device)
        if gate is None
        else gate.to(torch.float32).contiguous()
        for gate, absent in ((g, 0.0), (beta, 0.0), (lam, 1.0))
    ]
    return module.decays(*gates, tables=tables)


def states_of(module: Any, tables: Tables, k: torch.Tensor, v: torch.Tensor, decayed: Any, *, exact: bool) -> Any:
    """The states of all pieces; ``exact``: whether the end states are wanted in float32."""
    return module.segment_states(k=k, v=v, decayed=decayed, tables=tables, exact=exact)


LAUNCHER = TritonForward
