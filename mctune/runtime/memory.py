"""What one layer remembers of B sequences between two calls: the storage under ``MemoryCache``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from .call import Call
from .errors import ArgumentError
from .modes import in_ordinary_mode, kept
from .traits import RECURRENCES

Tensor = torch.Tensor
FIRST_CAPACITY = 4
"""States that an empty memory has room for; it doubles when they are used up."""


@dataclass(frozen=True)
class Rules:
    """How a memory is written: the same for its whole life."""

    recurrence: str
    state_init: str
    segment_length: int
    inner_chunk: int
    memory_residual: bool

    @property
    def deep(self) -> bool:
        """Whether the memory is a two-layer MLP."""
        return RECURRENCES[self.recurrence].deep

    @property
    def carried(self) -> bool:
        """Whether a segment starts from the end state of the one before it."""
        return self.state_init == "checkpoint"


_RULES = tuple(field.name for field in fields(Rules))


@dataclass(eq=False)
class LayerMemory:
    """The cache of one layer, one row a sequence; sequences may be at different places.

    Everything is float32 (float64 for a float64 model), except that ``states`` may be bfloat16 or float16: decoding is
    bound by their bytes, and each is rounded once, since nothing is added to it after its segment has ended. They are
    widened where they are read.

    Where a segment has just ended, ``filled`` is 0 and the memory is already as the next one starts: ``key_sum`` is 0
    and, under independent, ``online`` is the initial state, ``momentum``, ``last_key`` and ``last_value`` are 0.

    Attributes:
        states: cached end states of segments (Eq. 4): ``(M,)`` with M [B, H, capacity, Dk, Dv] for a matrix memory,
            ``(W_up, W_down)``, [B, H, capacity, Dk, E] and [B, H, capacity, E, Dv], for a deep one. Their dtype is that
            of the states to come too. What lies past ``cached`` has no meaning, but is finite.
        descriptors: mean key of each cached segment, [B, H, capacity, Dk] (Eq. 10).
        online: the state of the segment under way, shaped as ``states`` without the capacity axis.
        key_sum: sum of the keys of the segment under way, [B, H, Dk].
        last_key, last_value: of the newest token, [B, H, Dk] and [B, H, Dv] (swla, Eq. 26-27); zero before a first one,
            and at an independent segment's start.
        start, momentum: of a deep memory, shaped as ``online``: the state that entered the inner chunk under way, and S
            (Eq. 34); empty for a matrix memory.
        cached: int32 [B] on the CPU, states in use of each sequence.
        filled: int32 [B] on the CPU, tokens of the segment under way, less than the segment length.
        rules: how it is written; ``None`` leaves that to the calls.
        initial: what a deep memory's segments start from, [H, Dk, E] and [H, E, Dv].
        bound: most states to keep of a sequence; the oldest goes first.
        dropped: int32 [B] on the CPU, states that the bound has cost each sequence.
    """

    states: tuple[Tensor, ...]
    descriptors: Tensor
    online: tuple[Tensor, ...]
    key_sum: Tensor
    last_key: Tensor
    last_value: Tensor
    start: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    cached: Tensor
    filled: Tensor
    rules: Rules | None = None
    initial: tuple[Tensor, ...] = ()
    bound: int | None = None
    dropped: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32, device="cpu"))

    def __post_init__(self) -> None:
        if len(self.dropped) != len(self.cached):
            with kept():
                self.dropped = torch.zeros_like(self.cached)

    @classmethod
    @in_ordinary_mode
    def empty(
        cls, call: Call, rows: int, bound: int | None = None, state_dtype: torch.dtype | None = None
    ) -> LayerMemory:
        """A memory of ``rows`` sequences that have no token yet, for the tokens of ``call`` and those after them.

        ``state_dtype`` is that of the cached states, ``None`` the call's compute dtype, as all else has.
        """
        H, Dk, Dv, like = call.q.shape[2], call.q.shape[3], call.v.shape[3], call.q

        def zeros(*shape: int, dtype: torch.dtype = call.compute_dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=like.device)

        initial: tuple[Tensor, ...] = ()
        online: tuple[Tensor, ...] = (zeros(rows, H, Dk, Dv),)
        if call.W_up is not None and call.W_down is not None:
            initial = tuple(W.detach().to(call.compute_dtype).clone() for W in (call.W_up, call.W_down))
            online = tuple(W.repeat(rows, 1, 1, 1) for W in initial)  # a copy, also of one row
        deep = call.deep
        return cls(
            tuple(zeros(rows, H, FIRST_CAPACITY, *x.shape[2:], dtype=state_dtype or x.dtype) for x in online),
            zeros(rows, H, FIRST_CAPACITY, Dk),
            online,
            zeros(rows, H, Dk),
            zeros(rows, H, Dk),
            zeros(rows, H, Dv),
            tuple(x.clone() for x in online) if deep else (),
            tuple(torch.zeros_like(x) for x in online) if deep else (),
            torch.zeros(rows, dtype=torch.int32, device="cpu"),
            torch.zeros(rows, dtype=torch.int32, device="cpu"),
            rules_of(call),
            initial,
            bound,
        )

    @property
    def capacity(self) -> int:
        """States that there is room for."""
        return self.descriptors.shape[2]

    @property
    def rows(self) -> int:
        """B, the number of sequences."""
        return self.descriptors.shape[0]

    @property
    def lengths(self) -> Tensor:
        """int64 [B] on the CPU: tokens of each sequence so far."""
        assert self.rules is not None
        return (self.dropped.long() + self.cached) * self.rules.segment_length + self.filled

    def advance(self, tokens: int, segment_length: int) -> None:
        """Count ``tokens`` more tokens of every sequence."""
        total = self.filled + tokens
        self.cached += total // segment_length
        self.filled.copy_(total % segment_length)

    def needed(self, tokens: int, segment_length: int) -> int:
        """How many states a sequence has at most after ``tokens`` more.

        Raises:
            ArgumentError: if a count is out of bounds: a kernel would write outside the memory.
        """
        room, most = self.capacity, 0
        for cached, filled in zip(self.cached.tolist(), self.filled.tolist(), strict=True):
            if not (0 <= cached <= room and 0 <= filled < segment_length):
                raise ArgumentError(
                    f"a memory with cached={cached}, filled={filled}: they must be from 0 to {room}, its capacity, and "
                    f"less than segment_length={segment_length}; start with an empty memory"
                )
            most = max(most, cached + (filled + tokens) // segment_length)
        return most

    def reserve(self, tokens: int) -> None:
        """Make room for the states that ``tokens`` more tokens of every sequence add; room at least doubles."""
        assert self.rules is not None
        needed = self.needed(tokens, self.rules.segment_length)
        # Tokens come at most a segment at a time where there is a bound, and it drops one state for each new one.
        self.make_room(needed if self.bound is None else min(needed, self.bound + 1))

    @in_ordinary_mode
    def make_room(self, needed: int) -> None:
        """Have room for ``needed`` states of every sequence; room at least doubles."""
        if needed > self.capacity:
            self._grow(needed)

    def _grow(self, needed: int) -> None:
        capacity = max(needed, 2 * self.capacity)

        def grown(x: Tensor) -> Tensor:
            room = x.new_zeros(*x.shape[:2], capacity, *x.shape[3:])
            room[:, :, : x.shape[2]] = x
            return room

        self.states = tuple(grown(x) for x in self.states)
        self.descriptors = grown(self.descriptors)

    def evict(self) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Drop the oldest state of the sequences that hold more than the bound.

        Returns:
            int64 [R], the rows, and what they lost: each of ``states`` and ``descriptors``, [R, H, ...].
        """
        if self.bound is None or not bool((self.cached > self.bound).any()):
            return None
        rows = (self.cached > self.bound).nonzero()[:, 0]
        stores = (*self.states, self.descriptors)
        lost = tuple(store[rows, :, 0].clone() for store in stores)
        for store in stores:
            store[rows, :, :-1] = store[rows, :, 1:]
        self.cached[rows] -= 1
        self.dropped[rows] += 1
        return rows, lost

    def restore(self, rows: Tensor, lost: tuple[Tensor, ...]) -> None:
        """Undo an :meth:`evict`."""
        for store, oldest in zip((*self.states, self.descriptors), lost, strict=True):
            store[rows, :, 1:] = store[rows, :, :-1].clone()
            store[rows, :, 0] = oldest
        self.cached[rows] += 1
        self.dropped[rows] -= 1

    def check(self, call: Call) -> None:
        """Refuse tokens that this memory cannot take.

        Raises:
            ArgumentError: if the call writes by other rules, or its shapes are others.
        """
        given = rules_of(call)
        for name in _RULES:  # by name: torch 2.11 does not trace `vars` of a dataclass
            now = getattr(given, name)
            was = getattr(self.rules, name, now)
            if now != was and (name != "inner_chunk" or call.deep):
                raise ArgumentError(f"{name}={now!r} on a memory written with {was!r}: start with an empty memory")
        B, _, H, Dk = call.q.shape
        new, here = (B, H, Dk, call.v.shape[3]), (*self.key_sum.shape, self.last_value.shape[2])
        if new != here:
            raise ArgumentError(f"tokens of [B, H, Dk, Dv] = {list(new)} on a memory of {list(here)}; these must agree")
        if call.deep and call.W_up is not None and call.W_up.shape[2] != self.online[0].shape[3]:
            raise ArgumentError(
                f"W_up is {list(call.W_up.shape)} on a memory of E={self.online[0].shape[3]}; these must agree"
            )
        if call.q.device != self.key_sum.device:
            raise ArgumentError(f"q is on {call.q.device} and the memory on {self.key_sum.device}; move the memory")

    @in_ordinary_mode
    def map(self, rowwise: Callable[[Tensor], Tensor], shared: Callable[[Tensor], Tensor] | None = None) -> LayerMemory:
        """A memory with ``rowwise`` applied to every tensor that has a row a sequence, ``shared`` to ``initial``."""

        def each(name: str, x: Any) -> Any:
            function = shared if name == "initial" else rowwise
            if function is None:
                return x
            if isinstance(x, tuple):
                return tuple(function(part) for part in x)
            return function(x) if isinstance(x, Tensor) else x

        # Written in place later, perhaps in another mode than this one.
        with torch.inference_mode(False), torch.no_grad():
            return replace(self, **{f.name: each(f.name, getattr(self, f.name)) for f in fields(self)})

    def writable(self) -> LayerMemory:
        """Itself; or a copy of what ``torch.inference_mode`` has made, outside of which that cannot be written."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not self.key_sum.is_inference():
            return self
        return self.map(torch.clone, torch.clone)

    def to(self, device: torch.device | str) -> LayerMemory:
        """The same on a device. Counts stay on the CPU."""

        def move(x: Tensor) -> Tensor:
            return x if x.dtype in (torch.int32, torch.int64) else x.to(device)

        return self.map(move, move)

    def stores(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name; those of a tuple are numbered."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                yield f.name, value
            elif isinstance(value, tuple):
                yield from ((f"{f.name}.{number}", part) for number, part in enumerate(value))


def rules_of(call: Call) -> Rules:
    """How a call writes."""
    return Rules(call.recurrence, call.state_init, call.segment_length, call.inner_chunk, call.memory_residual)
