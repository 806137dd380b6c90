"""What a block of a compiled kernel executes, by class of instruction and by loop, read off its assembly.

The control flow graph is cut into natural loops: those of a back edge, whose target every way to it passes through. A
loop's trip count stands in no assembly; whoever knows the kernel multiplies (:mod:`mctune.backends.triton.cost.trips`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import lru_cache

from mctune.backends.triton.blocks import MARK, blocks_of, successors_of
from mctune.backends.triton.cost.opcodes import Mix, amd_mix, ptx_mix


@dataclass(frozen=True)
class Loop:
    """A loop, or the whole kernel: one pass through ``mix``, then the loops inside, in the order of the text.

    ``marks``: what comments say of it, each as often as the loop was unrolled.
    """

    mix: Mix
    inner: tuple[Loop, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def matrix(self) -> bool:
        """Whether a matrix instruction is in it, or in a loop inside it."""
        return self.mix.matrix > 0 or any(loop.matrix for loop in self.inner)


@lru_cache(maxsize=256)
def loops_of(asm: str, warps: int, warp_size: int) -> Loop:
    """The instructions of a block of ``warps`` warps, from PTX or the assembly of an AMD GPU."""
    blocks = blocks_of(asm)
    if not blocks:
        return Loop(Mix())
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", asm))
    arch = re.search(r"^\.target\s+sm_(\d+)", asm, re.MULTILINE)
    constants["arch"] = arch[1] if arch else ""
    mixes = [
        sum_of(
            ptx_mix(line, warps, warp_size, constants) if warp_size == 32 else amd_mix(line, warps, warp_size)
            for line in block.lines
        )
        for block in blocks
    ]
    marks = [tuple(line.removeprefix(MARK) for line in block.lines if line.startswith(MARK)) for block in blocks]
    bodies = _natural_loops(successors_of(blocks))
    return _nest(frozenset(range(len(blocks))), dict(sorted(bodies.items())), mixes, marks)


def sum_of(mixes: object) -> Mix:
    """The sum of several, field by field."""
    totals = [0.0] * len(fields(Mix))
    for mix in mixes:  # type: ignore[attr-defined]
        for i, field in enumerate(fields(Mix)):
            totals[i] += getattr(mix, field.name)
    return Mix(*totals)


def _natural_loops(successors: list[set[int]]) -> dict[int, frozenset[int]]:
    """Blocks of the loops by the block that they begin with."""
    count = len(successors)
    before: list[set[int]] = [set() for _ in range(count)]
    for block, after in enumerate(successors):
        for other in after:
            before[other].add(block)
    everything = set(range(count))
    dominators = [{0}] + [set(everything) for _ in range(count - 1)]
    changed = True
    while changed:
        changed = False
        for block in range(1, count):
            ways = [dominators[other] for other in before[block]]
            new = {block} | (set.intersection(*ways) if ways else set())
            if new != dominators[block]:
                dominators[block], changed = new, True
    loops: dict[int, set[int]] = {}
    for block, after in enumerate(successors):
        for head in after & dominators[block]:
            body = loops.setdefault(head, {head})
            todo = [block]
            while todo:
                other = todo.pop()
                if other not in body:
                    body.add(other)
                    todo += before[other]
    return {head: frozenset(body) for head, body in loops.items()}


def _nest(
    body: frozenset[int], loops: dict[int, frozenset[int]], mixes: list[Mix], marks: list[tuple[str, ...]]
) -> Loop:
    """The blocks of ``body`` as a loop, with those of ``loops`` that lie inside it."""
    inner = {head: other for head, other in loops.items() if other < body}
    outermost = [head for head, other in inner.items() if not any(other < third for third in inner.values())]
    rest = body.difference(*(inner[head] for head in outermost))
    children = tuple(
        _nest(inner[head], {h: b for h, b in inner.items() if h != head}, mixes, marks) for head in outermost
    )
    own = tuple(mark for block in sorted(rest) for mark in marks[block])
    return Loop(sum_of(mixes[block] for block in sorted(rest)), children, own)
