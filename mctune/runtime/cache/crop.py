"""Take a memory back to an earlier place: by its history, or to the end of a cached segment."""

from __future__ import annotations

from functools import partial

import torch

from ..errors import ArgumentError
from ..memory import LayerMemory
from ..traits import RECURRENCES
from .rewind import History

Tensor = torch.Tensor


def check_crop(memory: LayerMemory, history: History | None, targets: Tensor) -> None:
    """Refuse targets, int64 [B], tokens to keep of each sequence, that cannot be restored.

    Raises:
        ArgumentError: naming the sequence, the places that can be restored, and the remedy.
    """
    assert memory.rules is not None
    lengths, C = memory.lengths, memory.rules.segment_length
    depths = [0] * memory.rows if history is None else history.depths
    for row, (length, target, depth) in enumerate(zip(lengths.tolist(), targets.tolist(), depths, strict=True)):
        if length - target <= depth or target == 0:
            continue
        reason = _why_not_boundary(memory, row, target)
        if reason is None:
            continue
        places = "0"
        if depth:
            places += f", {length - depth} to {length}"
        dropped = int(memory.dropped[row])
        first = dropped + max(int(memory.cached[row]), int(memory.rules.carried)) if dropped else 1
        ends = range(first * C, length, C)
        if ends and _why_not_boundary(memory, row, ends[0]) is None:
            step = "" if len(ends) == 1 else f" to {ends[-1]} in steps of {C}"
            places += f", {ends[0]}{step}"
        raise ArgumentError(
            f"crop of sequence {row} from {length} tokens to {target}: {reason}. It can go to {places}; "
            f"{remedy(length - target, 0 if history is None else history.reach)}"
        )


def remedy(count: int, reach: int) -> str:
    """What lets the newest ``count`` tokens be dropped, for a message; ``reach`` is the cache's ``rewind``."""
    if count > reach:
        return f"to go back further, pass MemoryCache(rewind={count}) before the prompt"
    return (
        f"the window of rewind={reach} begins anew where a cache was loaded, and an earlier crop has used it up as far "
        f"as it went: run the prompt again, or pass MemoryCache(rewind={reach + count}) before it"
    )


def _why_not_boundary(memory: LayerMemory, row: int, target: int) -> str | None:
    """Why the cached states do not give back the memory after ``target`` tokens; ``None`` if they do."""
    rules = memory.rules
    assert rules is not None
    if target % rules.segment_length:
        return f"states are cached only at the ends of segments, every {rules.segment_length} tokens"
    writes = RECURRENCES[rules.recurrence]
    for carries, what in ((writes.momentum, "momentum"), (writes.convolves, "last key")):
        if rules.carried and carries:
            return (
                f"under state_init='checkpoint' {writes.name} carries its {what} into the next segment, and it is not "
                "cached"
            )
    dropped, cached = int(memory.dropped[row]), int(memory.cached[row])
    kept = target // rules.segment_length - dropped
    if dropped and (kept < cached or (rules.carried and kept < 1)):
        return f"max_states={memory.bound} has dropped {dropped} states that it needs"
    return None


def crop_layer(memory: LayerMemory, history: History | None, targets: Tensor) -> History | None:
    """Restore targets that :func:`check_crop` has passed, in place; the history from then on."""
    before = memory.cached.tolist()
    history = _restore(memory, history, targets)
    # What lies past the states in use weighs nothing where it is read beside those of longer rows: it must be finite.
    for row, (used, now) in enumerate(zip(before, memory.cached.tolist(), strict=True)):
        for store in (*memory.states, memory.descriptors):
            store[row, :, now:used] = 0
    return history


def _restore(memory: LayerMemory, history: History | None, targets: Tensor) -> History | None:
    removed = (memory.lengths - targets).tolist()
    if history is not None and history.even and len(set(removed)) == 1 and removed[0] <= history.depths[0]:
        history.take_back(memory, removed[0])
        return history
    pasts = []
    for row, (target, count) in enumerate(zip(targets.tolist(), removed, strict=True)):
        alone = memory.map(partial(_row, row))
        past = None if history is None else history.map(partial(_row, row), memory.rows)
        if past is not None and 0 < count <= past.depths[0]:
            past.take_back(alone, count)
        elif count:
            _to_boundary(alone, target)
            if past is not None:
                past.restart(alone)
        if past is not None:
            pasts.append(past)
    return History.together(pasts, memory) if pasts else None


def _row(row: int, x: Tensor) -> Tensor:
    return x[row : row + 1]


def _to_boundary(memory: LayerMemory, target: int) -> None:
    """The only sequence of ``memory`` to the end of a segment, as the next one starts.

    Under checkpoint ``online`` becomes what is cached, and keeps its rounding if that is of 16 bits.
    """
    rules = memory.rules
    assert rules is not None
    kept = target // rules.segment_length - int(memory.dropped[0])
    if target == 0:
        kept = 0
        memory.dropped.zero_()
    for number, online in enumerate(memory.online):
        if rules.carried and target:
            online.copy_(memory.states[number][:, :, kept - 1])
        elif memory.initial:
            online.copy_(memory.initial[number])
        else:
            online.zero_()
    for x in (memory.key_sum, memory.last_key, memory.last_value, *memory.momentum):
        x.zero_()
    memory.cached.fill_(kept)
    memory.filled.zero_()
