"""Basic blocks of PTX, or of the assembly of an AMD GPU, and how control goes from one to the next."""

from __future__ import annotations

import re
from dataclasses import dataclass

MARK = "// mctune: "
"""Begins a comment that says how often a loop runs (:mod:`mctune.backends.triton.cost.marks`); it is kept."""
_LABEL = re.compile(r"^([$.\w]+):(?!:)")
_BRANCH = re.compile(r"^(@!?%?\w+\s+)?(bra(?:\.uni)?|s_branch|s_cbranch_\w+)\s+([$.\w]+)")
_STOP = re.compile(r"^(@!?%?\w+\s+)?(ret|exit|trap|s_endpgm|s_setpc_b64)\b")


@dataclass(frozen=True)
class Block:
    """A basic block: instructions that run one after the other.

    Attributes:
        first: its place among the blocks.
        labels: that it begins with.
        lines: instructions.
        targets: labels that it jumps to; ``falls``: whether control may go on to the next block.
    """

    first: int
    labels: tuple[str, ...]
    lines: tuple[str, ...]
    targets: tuple[str, ...]
    falls: bool


def blocks_of(asm: str) -> list[Block]:
    """Basic blocks in the order of the text, of the first function with a body."""
    blocks: list[Block] = []
    labels: list[str] = []
    lines: list[str] = []
    targets: list[str] = []
    depth, started = 0, False

    def close(falls: bool) -> None:
        if lines or labels:
            blocks.append(Block(len(blocks), tuple(labels), tuple(lines), tuple(targets), falls))
        for part in (labels, lines, targets):
            part.clear()

    for raw in asm.splitlines():
        line = raw.strip()
        if line in ("{", "}"):
            depth += 1 if line == "{" else -1
            continue
        if line.startswith(".section") and started and any(block.lines for block in blocks):
            break  # what follows is data and line tables
        note = line.startswith(MARK)
        if not line or (line.startswith((";", "//", ".")) and not note and not _LABEL.match(line)):
            continue
        # Inside the braces of inline assembly labels are local, and loops wait for a copy or a product.
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


def successors_of(blocks: list[Block]) -> list[set[int]]:
    """The blocks that may follow each."""
    place = {label: block.first for block in blocks for label in block.labels}
    found = []
    for block in blocks:
        after = {place[target] for target in block.targets if target in place}
        if block.falls and block.first + 1 < len(blocks):
            after.add(block.first + 1)
        found.append(after)
    return found
