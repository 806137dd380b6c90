"""What it takes to forget the newest tokens: snapshots of the online state, and the tokens written since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..call import GATES, Call
from ..eager.decode import decode
from ..memory import LayerMemory
from ..ops.step import advance, tokens

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class _Snapshot:
    """A memory without its cached states, after ``at`` tokens of the history."""

    at: int
    online: tuple[Tensor, ...]
    key_sum: Tensor
    last_key: Tensor
    last_value: Tensor
    start: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    cached: Tensor
    filled: Tensor


@dataclass(frozen=True, eq=False)
class _Lost:
    """What the bound has dropped after ``at`` tokens: see :meth:`LayerMemory.evict`."""

    at: int
    rows: Tensor
    states: tuple[Tensor, ...]


_ABSENT = {"g": 0.0, "beta": 0.0, "lam": 1.0, "eta": 1.0, "mu": 0.0}
"""What a gate is that was not given."""
_KEPT = ("online", "key_sum", "last_key", "last_value", "start", "momentum", "cached", "filled")


@dataclass(eq=False)
class History:
    """At least the newest ``reach`` tokens of every sequence can be taken back; a few times as many are kept.

    A snapshot is taken every ``reach`` tokens; going back restores the last one before the place, and writes the
    tokens between again. Rows are aligned at the present: one that has fewer tokens than the others misses the first
    ``missing`` of the history, int64 [B] on the CPU.
    """

    reach: int
    total: int = 0
    snapshots: list[_Snapshot] = field(default_factory=list)
    records: list[tuple[int, Call]] = field(default_factory=list)
    lost: list[_Lost] = field(default_factory=list)
    missing: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def depths(self) -> list[int]:
        """Tokens of each row that can be taken back now."""
        oldest = self.snapshots[0].at
        return [self.total - max(oldest, missing) for missing in self.missing.tolist()]

    @property
    def even(self) -> bool:
        """Whether all rows can be taken back as one."""
        return len(set(self.depths)) == 1

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [x for shot in self.snapshots for name in _KEPT for x in _flat(getattr(shot, name))]
        for _, call in self.records:
            held += [x for name in ("k", "v", *GATES) if (x := getattr(call, name)) is not None]
        held += [x for lost in self.lost for x in lost.states]
        return sum(x.nbytes for x in held)

    @property
    def room(self) -> int:
        """Tokens until the next snapshot."""
        return self.reach - (self.total - self.snapshots[-1].at)

    def restart(self, memory: LayerMemory) -> None:
        """Nothing before the present state can be restored."""
        self.total, self.records, self.lost = 0, [], []
        self.snapshots, self.missing = [_take(memory, 0)], torch.zeros(memory.rows, dtype=torch.int64)

    def record(self, call: Call) -> None:
        """Keep what is about to be written: at most ``reach`` tokens."""
        k, v = call.k.detach().clone(), call.v.detach().clone()
        gates: dict[str, Any] = {name: getattr(call, name) for name in GATES}
        gates = {name: None if x is None else x.detach().clone() for name, x in gates.items()}
        kept = replace(call, q=k, k=k, v=v, u=None, **gates)
        self.records.append((self.total, kept))
        self.total += k.shape[1]

    def settle(self, memory: LayerMemory, lost: tuple[Tensor, tuple[Tensor, ...]] | None) -> None:
        """Called after the recorded tokens were written; ``lost`` is what the bound then dropped."""
        if lost is not None:
            self.lost.append(_Lost(self.total, *lost))
        if self.total - self.snapshots[-1].at >= self.reach:
            self.snapshots.append(_take(memory, self.total))
        while len(self.snapshots) > 1 and self.snapshots[1].at <= self.total - self.reach:
            del self.snapshots[0]
        oldest = self.snapshots[0].at
        self.records = [(at, call) for at, call in self.records if at + call.k.shape[1] > oldest]
        self.lost = [lost for lost in self.lost if lost.at > oldest]

    def take_back(self, memory: LayerMemory, count: int) -> None:
        """Make ``memory`` what it was ``count`` tokens ago; at most :attr:`depths`, and rows are even."""
        target, missing = self.total - count, int(self.missing.max())
        while self.snapshots[-1].at > target:
            self.snapshots.pop()
        snapshot = self.snapshots[-1]
        while self.lost and self.lost[-1].at > snapshot.at:
            gone = self.lost.pop()
            memory.restore(gone.rows, gone.states)
        for name in _KEPT:
            for now, then in zip(_flat(getattr(memory, name)), _flat(getattr(snapshot, name)), strict=True):
                now.copy_(then)
        again = [(at, call) for at, call in self.records if snapshot.at <= at < target]
        self.records = [(at, call) for at, call in self.records if at < snapshot.at]
        self.total = snapshot.at
        for at, call in again:
            begin, stop = max(missing - at, 0), min(call.k.shape[1], target - at)
            while begin < stop:
                end = stop
                if memory.bound is not None:
                    end = min(stop, begin + call.segment_length - int(memory.filled.max()))
                part, self.total = tokens(call, begin, end), at + begin
                self.record(part)
                decode(part, memory, read=False)
                memory.advance(end - begin, call.segment_length)
                gone_again = memory.evict()
                if gone_again is not None:
                    self.lost.append(_Lost(self.total, *gone_again))
                begin = end
        self.total = target
        self.settle(memory, None)  # what several rows went back to may lie a whole ``reach`` past a snapshot

    def map(self, rowwise: Callable[[Tensor], Tensor], rows: int) -> History:
        """The history of other sequences: ``rowwise`` picks them from a tensor whose axis 0 has ``rows`` rows."""

        snapshots = [_Snapshot(x.at, *(_each(rowwise, getattr(x, name)) for name in _KEPT)) for x in self.snapshots]
        records = []
        for at, call in self.records:
            k = rowwise(call.k)
            gates: dict[str, Any] = {name: getattr(call, name) for name in GATES}
            gates = {name: None if x is None else rowwise(x) for name, x in gates.items()}
            records.append((at, replace(call, q=k, k=k, v=rowwise(call.v), **gates)))
        lost = [_Lost(x.at, *_spread(x, rowwise, rows)) for x in self.lost]
        return History(self.reach, self.total, snapshots, records, lost, rowwise(self.missing))

    @classmethod
    def together(cls, rows: list[History], memory: LayerMemory) -> History:
        """The histories of single rows as one; ``memory`` is that of all of them now."""
        depths = [past.depths[0] for past in rows]
        all_, deepest = cls(rows[0].reach), max(depths)
        all_.restart(memory)
        if deepest == 0:
            return all_
        kept: dict[str, Any] = {}
        for name in _KEPT:
            each = [_flat(getattr(past.snapshots[0], name)) for past in rows]
            parts = tuple(torch.cat(part) for part in zip(*each, strict=True))
            kept[name] = parts if isinstance(getattr(memory, name), tuple) else parts[0]
        all_.total, all_.snapshots = deepest, [_Snapshot(0, **kept)]
        all_.records = [(0, _aligned(rows, depths))]
        all_.missing = deepest - torch.tensor(depths)
        for row, past in enumerate(rows):
            for x in past.lost:
                if len(x.rows):
                    all_.lost.append(_Lost(deepest - past.total + x.at, x.rows + row, x.states))
        all_.lost.sort(key=lambda x: x.at)
        all_.settle(memory, None)
        return all_


def _aligned(rows: list[History], depths: list[int]) -> Call:
    """The tokens that each row can take back, as one call; zeros before those of rows that have fewer."""
    calls = [[call for _, call in past.records] for past in rows]
    like = next(call for each in calls for call in each)

    def joined(name: str, row: int) -> Tensor:
        parts = []
        for call in calls[row]:
            x = getattr(call, name)
            parts.append(call.k.new_full(call.k.shape[:3], _ABSENT[name]) if x is None else x)
        tokens_ = torch.cat(parts, 1)[:, -depths[row] :] if depths[row] else getattr(like, name)[:1, :0]
        room = tokens_.new_zeros(1, max(depths) - depths[row], *tokens_.shape[2:])
        return torch.cat([room, tokens_], 1)

    names = [name for name in GATES if any(getattr(call, name) is not None for each in calls for call in each)]
    like = next(call for each in calls for call in each if all(getattr(call, name) is not None for name in names))
    made: dict[str, Any] = {
        name: torch.cat([joined(name, row) for row in range(len(rows))]) for name in ("k", "v", *names)
    }
    return replace(like, q=made["k"], **made)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def extend_recorded(call: Call, memory: LayerMemory, history: History, backend: str) -> Tensor:
    """:func:`..ops.step.extend`, so that the newest tokens can be taken back."""
    memory.check(call)
    outputs, begin, n = [], 0, call.q.shape[1]
    while begin < n:
        # Tokens that will be out of reach once all are written need no record.
        forgotten = n - begin > history.reach
        end = n - history.reach if forgotten else min(n, begin + history.room)
        if memory.bound is not None:
            # What the bound drops at a segment's end must be gone before the next token reads.
            end = min(end, begin + call.segment_length - int(memory.filled.max()))
        part = tokens(call, begin, end)
        if not forgotten:
            history.record(part)
        outputs.append(advance(part, memory, backend))
        lost = memory.evict()
        if forgotten:
            history.restart(memory)
        else:
            history.settle(memory, lost)
        begin = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _take(memory: LayerMemory, at: int) -> _Snapshot:
    return _Snapshot(at, *(_each(Tensor.clone, getattr(memory, name)) for name in _KEPT))


def _each(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """``function`` of a tensor, or of each of several."""
    return tuple(function(part) for part in x) if isinstance(x, tuple) else function(x)


def _flat(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _spread(lost: _Lost, rowwise: Callable[[Tensor], Tensor], rows: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The rows and states that are lost after ``rowwise`` has picked rows."""
    place = torch.full((rows,), -1, device=lost.rows.device)
    place[lost.rows] = torch.arange(len(lost.rows), device=lost.rows.device)
    picked = rowwise(place)
    return (picked >= 0).nonzero()[:, 0], tuple(x[picked[picked >= 0]] for x in lost.states)
