"""What a block of a compiled kernel executes, by class of instruction and by loop, read off its assembly.

The control flow graph is cut into natural loops: those of a back edge, whose target every way to it passes through. A
loop's trip count stands in no assembly; whoever knows the kernel multiplies (:mod:`mctune.search.trips`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import lru_cache

from mctune.search.opcodes import Mix, amd_mix, ptx_mix

_LABEL = re.compile(r"^([$.\w]+):")
_BRANCH = re.compile(r"^(@!?%?\w+\s+)?(bra(?:\.uni)?|s_branch|s_cbranch_\w+)\s+([$.\w]+)")
_STOP = re.compile(r"^(@!?%?\w+\s+)?(ret|exit|trap|s_endpgm|s_setpc_b64)\b")


@dataclass(frozen=True)
class Loop:
    """A loop, or the whole kernel: one pass through ``mix``, then the loops inside, in the order of the text."""

    mix: Mix
    inner: tuple[Loop, ...] = ()

    @property
    def matrix(self) -> bool:
        """Whether a matrix instruction is in it, or in a loop inside it."""
        return self.mix.matrix > 0 or any(loop.matrix for loop in self.inner)


@dataclass(frozen=True)
class _Block:
    first: int
    labels: tuple[str, ...]
    lines: tuple[str, ...]
    targets: tuple[str, ...]
    falls: bool


@lru_cache(maxsize=256)
def loops_of(asm: str, warps: int, warp_size: int) -> Loop:
    """The instructions of a block of ``warps`` warps, from PTX or the assembly of an AMD GPU."""
    blocks = _blocks(asm)
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
    bodies = _natural_loops(_successors(blocks))
    return _nest(frozenset(range(len(blocks))), dict(sorted(bodies.items())), mixes)


def sum_of(mixes: object) -> Mix:
    """The sum of several, field by field."""
    totals = [0.0] * len(fields(Mix))
    for mix in mixes:  # type: ignore[attr-defined]
        for i, field in enumerate(fields(Mix)):
            totals[i] += getattr(mix, field.name)
    return Mix(*totals)


def _blocks(asm: str) -> list[_Block]:
    """Basic blocks in the order of the text, of the first function with a body."""
    blocks: list[_Block] = []
    labels: list[str] = []
    lines: list[str] = []
    targets: list[str] = []
    depth, started = 0, False

    def close(falls: bool) -> None:
        if lines or labels:
            blocks.append(_Block(len(blocks), tuple(labels), tuple(lines), tuple(targets), falls))
        for part in (labels, lines, targets):
            part.clear()

    for raw in asm.splitlines():
        line = raw.strip()
        if line in ("{", "}"):
            depth += 1 if line == "{" else -1
            continue
        if line.startswith(".section") and started and any(block.lines for block in blocks):
            break  # what follows is data and line tables
        if not line or (line.startswith((";", "//", ".")) and not _LABEL.match(line)):
            continue
        # Inside braces of inline assembly: labels are its own, and its loops wait for a copy or a product.
        inline = depth > 1
        label = _LABEL.match(line)
        if label:
            if not inline:
                if lines:
                    close(True)
                labels.append(label[1])
                started = True
            continue
        lines.append(line)
        branch = None if inline else _BRANCH.match(line)
        if branch:
            targets.append(branch[3])
            always = branch[1] is None and branch[2] in ("bra", "bra.uni", "s_branch")
            close(not always)
        elif _STOP.match(line) and not inline:
            close(line.startswith("@"))
    close(False)
    return blocks


def _successors(blocks: list[_Block]) -> list[set[int]]:
    place = {label: block.first for block in blocks for label in block.labels}
    found = []
    for block in blocks:
        after = {place[target] for target in block.targets if target in place}
        if block.falls and block.first + 1 < len(blocks):
            after.add(block.first + 1)
        found.append(after)
    return found


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


def _nest(body: frozenset[int], loops: dict[int, frozenset[int]], mixes: list[Mix]) -> Loop:
    """The blocks of ``body`` as a loop, with those of ``loops`` that lie inside it."""
    inner = {head: other for head, other in loops.items() if other < body}
    outermost = [head for head, other in inner.items() if not any(other < third for third in inner.values())]
    rest = body.difference(*(inner[head] for head in outermost))
    children = tuple(_nest(inner[head], {h: b for h, b in inner.items() if h != head}, mixes) for head in outermost)
    return Loop(sum_of(mixes[block] for block in sorted(rest)), children)
