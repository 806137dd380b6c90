"""What is to be computed: one Memory Caching operation at one shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from mctune.core.errors import UsageError
from mctune.runtime.traits import (
    AGGREGATIONS,
    FAMILIES,
    PASSES,
    RECURRENCES,
    SEGMENTATIONS,
    STATE_INITS,
    Aggregation,
    Recurrence,
    any_of,
)

__all__ = ["AGGREGATIONS", "DTYPES", "FAMILIES", "PASSES", "RECURRENCES", "SEGMENTATIONS", "STATE_INITS", "Problem"]

DTYPES = ("float32", "bfloat16", "float16")

_CHOICES: dict[str, Collection[str]] = {
    "recurrence": RECURRENCES,
    "aggregation": AGGREGATIONS,
    "segmentation": SEGMENTATIONS,
    "state_init": STATE_INITS,
    "pass_": PASSES,
    "dtype": DTYPES,
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One operation at one shape, validated when it is made.

    Args:
        recurrence, aggregation, segmentation, state_init, pass_: which operation (paper sections 3 and 4).
        B, T, H: batch, tokens, heads. Under ``packed`` B is 1 and T counts all sequences together.
        Dk, Dv: key and value head widths.
        segment_length: C, tokens a segment; ``None`` under ``logarithmic``, whose spans follow from T.
        top_k: cached segments that ssc reads per token; 2 for ssc unless given, ``None`` otherwise.
        expansion: E / Dk of a deep memory; 4 for dla and titans unless given, ``None`` otherwise.
        inner_chunk: tokens that share one gradient state in a deep memory; 16 for dla and titans unless given.
        dtype: of q, k, v, u and y. States, gates, logits and accumulators are float32.

    Raises:
        UsageError: naming the field, the limit and the remedy.

    Examples:
        >>> problem = Problem(T=4096, H=8, Dk=64, Dv=64, segment_length=256)
        >>> print(problem)
        forward linear grm constant independent B1 T4096 H8 D64 C256 float32
        >>> len(problem.spans())
        16
        >>> print(problem.replace(recurrence="dla"))
        forward dla grm constant independent B1 T4096 H8 D64 E256 C256 b16 float32
    """

    recurrence: str = "linear"
    aggregation: str = "grm"
    segmentation: str = "constant"
    state_init: str = "independent"
    pass_: str = "forward"
    B: int = 1
    T: int
    H: int
    Dk: int
    Dv: int
    segment_length: int | None = None
    top_k: int | None = None
    expansion: int | None = None
    inner_chunk: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name.rstrip('_')}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("B", "T", "H", "Dk", "Dv"):
            self._positive(name)
        self._check_segments()
        self._only("top_k", self.reads.sparse, f"aggregation={any_of('sparse', AGGREGATIONS)}", 2)
        layers = f"recurrence={any_of('deep', RECURRENCES)}"
        self._only("expansion", self.deep, layers, 4)
        self._only("inner_chunk", self.deep, layers, 16)

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name}={value!r}: must be an integer of at least 1")

    def _check_segments(self) -> None:
        if self.segmentation == "logarithmic":
            if self.segment_length is not None:
                raise UsageError(
                    f"segment_length={self.segment_length} with segmentation='logarithmic': spans are the powers of "
                    "two of T; leave segment_length out or take segmentation='constant'"
                )
            if self.pass_ == "decode":
                raise UsageError(
                    "pass='decode' with segmentation='logarithmic': the spans need T in advance; use "
                    "segmentation='constant'"
                )
        elif self.segment_length is None:
            raise UsageError(f"segmentation={self.segmentation!r} needs segment_length (for example 256)")
        else:
            self._positive("segment_length")
        if self.segmentation == "packed" and self.pass_ == "decode":
            raise UsageError(
                "pass='decode' with segmentation='packed': a step has one row a sequence; use segmentation='constant'"
            )
        if self.segmentation == "packed" and self.B != 1:
            raise UsageError(
                f"B={self.B} with segmentation='packed': the sequences stand in one row, so B is 1; put the batch "
                "into cu_seqlens"
            )

    def _only(self, name: str, applies: bool, where: str, default: int) -> None:
        value = getattr(self, name)
        if not applies and value is not None:
            raise UsageError(f"{name}={value} has a meaning only with {where}; leave it out")
        if applies and value is None:
            object.__setattr__(self, name, default)
        elif applies:
            self._positive(name)

    @property
    def deep(self) -> bool:
        """Whether the memory is a two-layer MLP."""
        return self.writes.deep

    @property
    def reads(self) -> Aggregation:
        """What the aggregation is."""
        return AGGREGATIONS[self.aggregation]

    @property
    def writes(self) -> Recurrence:
        """What the recurrence is."""
        return RECURRENCES[self.recurrence]

    @property
    def routed(self) -> bool:
        """Whether gates compare u with the segments' mean keys."""
        return self.reads.routed

    @property
    def E(self) -> int:
        """Hidden width of a deep memory; 0 for a linear one."""
        return (self.expansion or 0) * self.Dk

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the matrices that a state is made of."""
        return ((self.Dk, self.E), (self.E, self.Dv)) if self.deep else ((self.Dk, self.Dv),)

    @property
    def widths(self) -> str:
        """The widths as tables show them: ``D64``, ``Dk64 Dv32``, and of a deep memory ``D64 E256``."""
        heads = f"D{self.Dk}" if self.Dk == self.Dv else f"Dk{self.Dk} Dv{self.Dv}"
        return f"{heads} E{self.E}" if self.deep else heads

    def spans(self) -> tuple[tuple[int, int], ...]:
        """Start and end of each segment of one sequence of T tokens (Eq. 4); a packed row counts as one sequence.

        Examples:
            >>> Problem(T=37, H=1, Dk=8, Dv=8, segmentation="logarithmic").spans()
            ((0, 32), (32, 36), (36, 37))
        """
        lengths: list[int] = []
        if self.segmentation == "logarithmic":
            lengths = [1 << bit for bit in reversed(range(self.T.bit_length())) if self.T >> bit & 1]
        else:
            assert self.segment_length is not None
            full, rest = divmod(self.T, self.segment_length)
            lengths = [self.segment_length] * full + [rest] * (rest > 0)
        ends = list(accumulate(lengths))
        return tuple((end - length, end) for end, length in zip(ends, lengths, strict=True))

    def replace(self, **changes: Any) -> Problem:
        """A copy with some fields changed, validated again.

        Raises:
            UsageError: naming the field, the limit and the remedy.
        """
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Fields by their public names (``pass``, not ``pass_``); absent ones left out."""
        given = ((name.rstrip("_"), getattr(self, name)) for name in self.__dataclass_fields__)
        return {name: value for name, value in given if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Problem:
        """The inverse of :meth:`to_dict`.

        Raises:
            UsageError: naming a field that is unknown or missing, or whose value is out of range.
        """
        known = {field.name.rstrip("_"): field.name for field in fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UsageError(f"unknown problem field {unknown[0]!r}; the fields are {', '.join(known)}")
        missing = sorted({"T", "H", "Dk", "Dv"} - set(values))
        if missing:
            raise UsageError(f"problem field {missing[0]!r} is missing")
        return cls(**{known[name]: value for name, value in values.items()})

    def to_json(self) -> str:
        """The canonical JSON form: sorted names, no spaces."""
        return self._json

    @cached_property
    def _json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """The inverse of :meth:`to_json`.

        Raises:
            UsageError: as :meth:`from_dict` does.
        """
        return cls.from_dict(json.loads(text))

    @cached_property
    def key(self) -> str:
        """Twelve hexadecimal digits of the SHA-256 of the canonical form."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def __str__(self) -> str:
        segments = "log" if self.segment_length is None else f"C{self.segment_length}"
        top_k = f" top{self.top_k}" if self.top_k else ""
        inner = f" b{self.inner_chunk}" if self.deep else ""
        return (
            f"{self.pass_} {self.recurrence} {self.aggregation}{top_k} {self.segmentation} {self.state_init} "
            f"B{self.B} T{self.T} H{self.H} {self.widths} {segments}{inner} {self.dtype}"
        )
