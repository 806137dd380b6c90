"""How often loops run whose assembly says so itself: in a comment, which a kernel's source has left there.

    // mctune: NAME NUMBER ..      one pass of a loop; as often in a pass as the compiler has unrolled it

Such kernels need no table of their loops, and it does not matter which of them the compiler has unrolled or removed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from mctune.backends.triton.cost.mix import Loop
from mctune.backends.triton.cost.walk import Source, Walk


def _cached(w: Walk, rows: int, together: int) -> float:
    return w.of_tiles(rows, lambda p, t: math.ceil(p.past / together))


def _share(w: Walk, rows: int, together: int) -> float:
    """Segments of a group that are there."""
    groups = _cached(w, rows, together)
    return _cached(w, rows, 1) / groups if groups else 0.0


NAMES: dict[str, Callable[..., float]] = {
    "times": lambda w, count: count,
    "piece": lambda w, rows: w.of_pieces(lambda p: math.ceil(p.length / rows)),
    "pieces": lambda w: len(w.pieces),
    "pieces_of_segment": lambda w: math.ceil(len(w.pieces) / w.segments),
    "online": lambda w, rows, step: w.of_tiles(rows, lambda p, t: math.ceil(min(t + rows, p.length) / step)),
    "before": lambda w, rows: w.of_tiles(rows, lambda p, t: p.before),
    "beyond": lambda w, rows, step: w.of_tiles(rows, lambda p, t: t % step),
    "cached": _cached,
    "share": _share,
    "top_k": lambda w: min(w.problem.top_k or 1, w.segments),
}
"""Passes of a loop each time that it is entered, by the name in its mark."""


def marked(loop: Loop) -> bool:
    """Whether a loop, or one inside it, says how often it runs."""
    return bool(loop.marks) or any(marked(inner) for inner in loop.inner)


def source_of_marks(compiled: Loop, walk: Walk, trips: float = 1.0) -> Source:
    """The loops of a kernel as they are compiled, with the passes that their marks say."""
    # Of a loop that was unrolled, a second copy does what is left over.
    most: dict[str, int] = {}
    counts = [Counter(inner.marks) for inner in compiled.inner]
    for count in counts:
        for text, times in count.items():
            most[text] = max(most.get(text, 0), times)
    found = []
    for inner, count in zip(compiled.inner, counts, strict=True):
        passes = 0.0
        for text, times in count.items():
            if times == most[text]:
                passes = max(passes, _passes(text, walk) / times)
                most[text] = times + 1  # only once
        found.append(source_of_marks(inner, walk, passes))
    return Source(trips, compiled.mix.matrix, tuple(found))


def _passes(text: str, walk: Walk) -> float:
    name, *numbers = text.split()
    return NAMES[name](walk, *map(int, numbers))
