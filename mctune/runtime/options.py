"""The options of the operation: what is computed, besides the tensors, checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .arguments import flag, known, positive
from .traits import AGGREGATIONS, RECURRENCES, SEGMENTATIONS, STATE_INITS, Aggregation, Recurrence

NAMES = (
    "recurrence", "aggregation", "segmentation", "segment_length", "state_init", "top_k", "scale", "memory_residual",
    "inner_chunk",
)  # fmt: skip
"""The options, in the order in which operators take them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Options:
    """The options of ``memory_caching``, which says what each means; :meth:`checked` refuses bad ones."""

    recurrence: str = "linear"
    aggregation: str = "grm"
    segmentation: str = "constant"
    segment_length: int = 256
    state_init: str = "independent"
    top_k: int = 2
    scale: float | None = None
    memory_residual: bool = True
    inner_chunk: int = 16

    @property
    def writes(self) -> Recurrence:
        """What the recurrence is."""
        return RECURRENCES[self.recurrence]

    @property
    def reads(self) -> Aggregation:
        """What the aggregation is."""
        return AGGREGATIONS[self.aggregation]

    @property
    def deep(self) -> bool:
        """Whether the memory is a two-layer MLP."""
        return RECURRENCES[self.recurrence].deep

    @property
    def carried(self) -> bool:
        """Whether a segment starts from the end state of the one before it."""
        return self.state_init == "checkpoint"

    def checked(self) -> Options:
        """These options, with defaults for what is ``None`` and used by nothing in the call.

        Raises:
            ArgumentError: on an unknown name, a size below 1 or beyond 32 bits, or a value of another type.
        """
        known("recurrence", self.recurrence, RECURRENCES)
        known("aggregation", self.aggregation, AGGREGATIONS)
        known("segmentation", self.segmentation, SEGMENTATIONS)
        known("state_init", self.state_init, STATE_INITS)
        # Spelled out: this is on the way of every call.
        deep = self.deep
        unused: list[str] = []
        if self.segment_length is not None or self.segmentation != "logarithmic":
            positive("segment_length", self.segment_length)
        else:
            unused.append("segment_length")
        if self.top_k is not None or self.reads.sparse:
            positive("top_k", self.top_k)
        else:
            unused.append("top_k")
        if self.inner_chunk is not None or deep:
            positive("inner_chunk", self.inner_chunk)
        else:
            unused.append("inner_chunk")
        if self.memory_residual is not None or deep:
            flag("memory_residual", self.memory_residual)
        else:
            unused.append("memory_residual")
        if not unused:
            return self
        defaults: dict[str, Any] = {name: getattr(Options, name) for name in unused}
        return replace(self, **defaults)


given: Callable[..., Options] = Options
"""The options as a caller gives them, before :meth:`Options.checked`: what the call does not use may be ``None``."""
