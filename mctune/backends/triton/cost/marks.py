"""How often loops run whose assembly says so itself: in a comment, which a kernel's source has left there.

    // mctune: NAME NUMBER ..      one pass of a loop; as often in a pass as the compiler has unrolled it

Such kernels need no table of their loops, and it does not matter which of them the compiler has unrolled or removed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mctune.backends.triton.cost.mix import Loop
from mctune.backends.triton.cost.walk import Source, Walk


def _cached(w: Walk, rows: int, together: int) -> float:
    return w.of_tiles(rows, lambda p, t: math.ceil(p.past / together))


def _share(w: Walk, rows: int, together: int) -> float:
    """Segments of a group that are there."""
    groups = _cached(w, rows, together)
    return _cached(w, rows, 1) / groups if groups else 0.0


def _after(w: Walk, together: int) -> float:
    """Tokens after the first of ``together`` segments of a sequence."""
    left = [w.problem.T - end for _, end in w.problem.spans()][::together]
    return max(left) if w.heaviest else sum(left) / len(left)


NAMES: dict[str, Callable[..., float]] = {
    "times": lambda w, count: count,
    "piece": lambda w, rows: w.of_pieces(lambda p: math.ceil(p.length / rows)),
    "pieces": lambda w: len(w.pieces),
    "pieces_of_segment": lambda w: math.ceil(len(w.pieces) / w.segments),
    "online": lambda w, rows, step: w.of_tiles(rows, lambda p, t: math.ceil(min(t + rows, p.length) / step)),
    "before": lambda w, rows: w.of_tiles(rows, lambda p, t: p.before),
    "beyond": lambda w, rows, step: w.of_tiles(rows, lambda p, t: t % step),
    "cached": _cached,
    "later": lambda w, rows, step: w.of_tiles(rows, lambda p, t: math.ceil((p.length - t) / step)),
    "behind": lambda w, rows: w.of_tiles(rows, lambda p, t: p.later),
    "rest": lambda w, rows: w.of_tiles(rows, lambda p, t: max(p.length - t - rows, 0)),
    "after": lambda w, step: math.ceil(_after(w, 1) / step),
    "split": lambda w, together, step: math.ceil(_after(w, together) / w["splits"] / step),
    "share": _share,
    "states": lambda w, step: math.ceil(w.segments / step),
    "share_of_states": lambda w: min(w.problem.top_k or w.segments, w.segments) / w["splits"],
    "splits": lambda w: w["splits"] + 1,
    "top_k": lambda w: min(w.problem.top_k or 1, w.segments),
}
"""Passes of a loop each time that it is entered, by the name in its mark."""


def marked(loop: Loop) -> bool:
    """Whether a loop, or one inside it, says how often it runs."""
    return bool(loop.marks) or any(marked(inner) for inner in loop.inner)


def source_of_marks(compiled: Loop, walk: Walk, trips: float = 1.0) -> Source:
    """The loops of a kernel as they are compiled, with the passes that their marks say.

    A loop's own mark is the first in it; others are of loops inside that the compiler has unrolled altogether.
    """
    heads = [inner.marks[0] if inner.marks else "" for inner in compiled.inner]
    counts = [inner.marks.count(head) for inner, head in zip(compiled.inner, heads, strict=True)]
    found, done = [], set[str]()
    for inner, head, count in zip(compiled.inner, heads, counts, strict=True):
        # Of a loop whose passes are not known when it is unrolled, a second copy does the few that are left over.
        most = max(other for text, other in zip(heads, counts, strict=True) if text == head)
        rest = not head.startswith("times") and (count < most or head in done)
        done.add(head)
        passes = _passes(head, walk) / count if head and not rest else 0.0
        found.append(source_of_marks(inner, walk, passes))
    return Source(trips, compiled.mix.matrix, tuple(found))


def _passes(text: str, walk: Walk) -> float:
    name, *numbers = text.split()
    return NAMES[name](walk, *map(int, numbers))
