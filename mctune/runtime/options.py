"""The options of the operation: what is computed, besides the tensors, checked once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .errors import ArgumentError
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
        """These options.

        Raises:
            ArgumentError: on an unknown name, or a size below 1.
        """
        _known("recurrence", self.recurrence, RECURRENCES)
        _known("aggregation", self.aggregation, AGGREGATIONS)
        _known("segmentation", self.segmentation, SEGMENTATIONS)
        _known("state_init", self.state_init, STATE_INITS)
        if self.segmentation != "logarithmic":
            _positive("segment_length", self.segment_length)
        if self.reads.sparse:
            _positive("top_k", self.top_k)
        if self.deep:
            _positive("inner_chunk", self.inner_chunk)
        return self


def _known(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ArgumentError(f"{name}={value!r} is not one of {', '.join(allowed)}")


def _positive(name: str, size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ArgumentError(f"{name}={size!r}: must be an integer of at least 1")
