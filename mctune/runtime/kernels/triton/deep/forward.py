"""Launch the forward kernels of a Triton package for deep memories: writes, gates, the read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ....segments import Segments
from ....traits import AGGREGATIONS, RECURRENCES
from ...kept import given
from ...results import Forward
from ..loader import load_parts
from ..tables import DEVICE, Tables, make_tables

LONGEST_ROWS = 1024
"""Tokens of the longest segment whose states are not formed: every chunk reads the rows of all before it, and each
token keeps a weight for each of them."""


class TritonDeepForward:
    """y = memory_caching(q, k, v, u) of a deep memory on a GPU, by the rendered modules of one configuration.

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
        self.checkpoint = problem["state_init"] == "checkpoint"
        self.mixes = AGGREGATIONS[problem["aggregation"]].mixes_parameters
        squared = RECURRENCES[problem["recurrence"]].momentum
        self.write = parts["deep_write_lanes"].deep_write_lanes if squared else parts["deep_write"].deep_write
        self.rows = parts["deep_rows"].deep_rows if "deep_rows" in parts else None
        self.write_rows = parts["deep_write_rows"].deep_write_rows if "deep_rows" in parts else None
        self.row_output = parts["deep_row_output"].deep_row_output if "deep_row_output" in parts else None
        self.gates = parts["gates"].gates if "gates" in parts else None
        self.read: Any = parts["deep_mix"].deep_mix if self.mixes else parts["deep_read"].deep_read
        self.replay = parts["deep_mix"].mix_replay if self.mixes else None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        u: torch.Tensor,
        *,
        g: torch.Tensor | None,
        eta: torch.Tensor | None,
        mu: torch.Tensor | None,
        W_up: torch.Tensor,
        W_down: torch.Tensor,
        memory_residual: bool,
        inner_chunk: int,
        scale: float,
        top_k: int,
        segments: Segments,
        keep: Sequence[str] = (),
    ) -> Forward:
        """y, in q's dtype, from q, k, u ``[B, T, H, Dk]``, v, gates ``[B, T, H]`` or None, W_up ``[H, Dk, E]`` and
        W_down ``[H, E, Dv]``; and what ``keep`` names. The kernels are compiled for ``inner_chunk``."""
        q, k, v, u = (x.contiguous() for x in (q, k, v, u))
        first = tuple(W.to(torch.float32).contiguous() for W in (W_up, W_down))
        strengths = tuple(None if x is None else x.to(torch.float32).contiguous() for x in (g, eta, mu))
        # A segment is one piece.
        tables = make_tables(segments, segments.longest, self.checkpoint, q.device)
        options: dict[str, Any] = {"tables": tables, "scale": float(scale), "memory_residual": memory_residual}
        written: dict[str, Any] = {"first": first, "strengths": strengths, "exact": bool(keep), **options}
        if self.rows is None or segments.longest > LONGEST_ROWS:
            made, online = self.write(q=q, k=k, v=v, **written), None
        else:
            made, online = self._by_rows(q, k, v, longest=segments.longest, **written)
        gates = None
        if self.gates is not None:
            tiles = tables.tiles(self.config["gates_BT"])
            # More than all segments cannot be chosen.
            chosen = min(max(top_k, 1), segments.count)
            gates = self.gates(u=u, k=k, means=made.means, sums=None, tables=tables, tiles=tiles, top_k=chosen)
        read = {"q": q, "states": (made.up_operand, made.down_operand), "gates": gates, **options}
        if self.replay is not None:
            walked = {"z": made.z, "error": made.error, "v": v, "W_down": first[1], "strengths": strengths}
            read["hidden"], read["online"] = made.hidden, online or partial(self.replay, tables=tables, **walked)
        else:
            read["partials"] = made.partials
        y = self.read(**read, tiles=tables.tiles(self.config["read_BT"]))
        return Forward(y, {name: getattr(made, name).flatten(0, 1) for name in keep})

    def _by_rows(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        first: tuple[torch.Tensor, ...],
        strengths: tuple[torch.Tensor | None, ...],
        tables: Tables,
        longest: int,
        memory_residual: bool,
        **read: Any,
    ) -> Any:
        """What the writes leave, where no state is formed before a segment's end; and what reads the own segment's
        second layer, where parameters are mixed."""
        assert self.rows is not None and self.write_rows is not None
        first = tuple(W.to(k.dtype) for W in first)
        left, weights = self.write_rows(
            k=k, v=v, first=first, strengths=strengths, tables=tables, span=longest, memory_residual=memory_residual
        )
        kept: dict[str, Any] = {"left": left, "weights": weights, "tables": tables}
        kept["tiles"] = tables.tiles(self.config["rows_BT"])
        output = None if self.row_output is None else partial(self.row_output, W_down=first[1], **kept)
        return self.rows(q=q, k=k, first=first, **kept, **read), output


LAUNCHER = TritonDeepForward
