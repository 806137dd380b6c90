"""Writes to shared memory that a matrix product may still be reading, in the PTX of a compiled kernel.

``wgmma`` reads its operands while the program goes on, and ``wgmma.wait_group`` waits for the products of the warpgroup
that executes it alone. With more than 4 warps another one may be behind, still reading what this one overwrites, unless
a barrier of the block stands between. Triton before 3.9 forgets that barrier where another one stands between product
and wait (triton issue 11047). And it gives an operand one buffer too few where something else reads it too, and
overwrites what a product that nobody has waited for reads (triton issue 6691).

All ways through the kernel are followed, with what is known of addresses (:mod:`mctune.backends.triton.addresses`).
The scan does not know: conditions that depend on arguments or data (it takes both ways, though a kernel may never);
predicates of single instructions (taken to hold); synchronisation other than by barriers of the whole block (mbarriers,
named barriers of some warps): kernels with TMA or warp specialisation are flagged where they are right; layouts of
descriptors that Triton does not make. Every warp is taken to execute the same code, and what cannot be placed in memory
may be anywhere in it. So it finds more than there is. It is about products and writes only, not about loads and stores.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from mctune.backends.triton.addresses import Value, address, operand, result
from mctune.backends.triton.blocks import Block, blocks_of, successors_of

ANYWHERE = (0, 1 << 30)
"""Bytes of an access of which nothing is known."""
_MOST_STATES, _MOST_VALUES, _MOST_GROUPS = 20000, 16, 8
_REGISTER = re.compile(r"%[a-z]+\d+")
_PARTS = re.compile(r"^(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);?$")
_WRITE = re.compile(
    r"^(cp\.async\.c[ag]\.|cp\.async\.bulk(?:\.tensor\.\dd)?\.shared|st\.async|st\.shared|stmatrix|(?:atom|red)\.shared)"
)
_WIDTHS = {1: 128, 2: 64, 3: 32}
"""Bytes of a swizzled row, by the first two bits of a descriptor."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Hazard:
    """A write, the bytes that it may touch, and the bytes that a product may read at that time.

    Attributes:
        write: the opcode of the write; ``line``: its place among the kernel's instructions.
        written, read: [first byte, end) in the block's shared memory, over all threads.
        waited: whether the writer's own warpgroup has waited for the product: only others may still read.
    """

    write: str
    line: int
    written: Span
    read: Span
    waited: bool

    def __str__(self) -> str:
        whose = "another" if self.waited else "its own or another"
        return f"{self.write} to {_bytes(self.written)} while {whose} warpgroup's wgmma may read {_bytes(self.read)}"


def _bytes(span: Span) -> str:
    return "anywhere" if span == ANYWHERE else f"bytes {span[0]} to {span[1]}"


@dataclass(frozen=True)
class _Reads:
    """What products may read: ``open`` ones, groups that are under way (the oldest first), and those of which this
    warpgroup knows the end, but others need not."""

    open: frozenset[Span] = frozenset()
    groups: tuple[frozenset[Span], ...] = ()
    waited: frozenset[Span] = frozenset()

    def asked(self, read: Iterable[Span]) -> _Reads:
        """One more product under way."""
        return replace(self, open=self.open.union(read))

    def ended(self, read: Iterable[Span], alone: bool) -> _Reads:
        """One more product, which this warpgroup has waited for; ``alone``: there is no other."""
        return self if alone else replace(self, waited=self.waited.union(read))

    def committed(self) -> _Reads:
        groups = (*self.groups, self.open)
        if len(groups) > _MOST_GROUPS:
            groups = (groups[0] | groups[1], *groups[2:])
        return replace(self, open=frozenset(), groups=groups)

    def waited_for(self, left: int, alone: bool) -> _Reads:
        done = max(len(self.groups) - left, 0)
        kept = replace(self, groups=self.groups[done:])
        return kept.ended(frozenset[Span]().union(*self.groups[:done]), alone)

    def synchronised(self) -> _Reads:
        return replace(self, waited=frozenset())


@dataclass
class _Scan:
    warps: int
    serialized: bool
    wanted: set[str]
    found: dict[tuple[int, Span], Hazard] = field(default_factory=dict)

    def run(self, begin: int, values: dict[str, Value | None], reads: _Reads, block: Block) -> _Reads:
        """Through one block, whose first instruction is the kernel's ``begin``-th; ``values`` are changed."""
        for line, text in enumerate(block.lines, begin):
            parts = _PARTS.match(text)
            if parts:
                reads = self._step(line, parts[1] == "!", parts[2], parts[3], parts[4], values, reads)
        return reads

    def _step(
        self, line: int, unless: bool, predicate: str | None, opcode: str, rest: str,
        values: dict[str, Value | None], reads: _Reads,
    ) -> _Reads:  # fmt: skip
        threads = 32 * self.warps
        if opcode.startswith("wgmma."):
            if opcode.startswith("wgmma.mma_async"):
                spans = list(_operands(opcode, rest, values))
                return reads.ended(spans, self.warps <= 4) if self.serialized else reads.asked(spans)
            if opcode.startswith("wgmma.commit_group"):
                return reads.committed()
            if opcode.startswith("wgmma.wait_group"):
                return reads.waited_for(int(rest), self.warps <= 4)
            return reads
        if opcode.startswith(("bar.", "barrier.")):
            return reads.synchronised() if _whole(opcode, rest, threads) else reads
        if _WRITE.match(opcode):
            held = values.get(predicate) if predicate else None
            if held is None or bool(held.low) != unless:
                self._check(line, opcode, _written(opcode, rest, values, threads), reads)
            return reads
        self._assign(predicate, opcode, rest, values, threads)
        return reads

    def _check(self, line: int, opcode: str, written: Span, reads: _Reads) -> None:
        under_way = reads.open.union(*reads.groups)
        for read in under_way | reads.waited:
            if written[0] < read[1] and read[0] < written[1]:
                hazard = Hazard(".".join(opcode.split(".")[:2]), line, written, read, read not in under_way)
                if hazard.waited:
                    self.found.setdefault((line, read), hazard)
                else:
                    self.found[line, read] = hazard

    def _assign(
        self, predicate: str | None, opcode: str, rest: str, values: dict[str, Value | None], threads: int
    ) -> None:
        if rest.startswith("{"):
            targets, given = _REGISTER.findall(rest.partition("}")[0]), ""
        else:
            first, _, given = rest.partition(",")
            targets = _REGISTER.findall(first)
        for target in targets:
            if target in self.wanted:
                made = result(opcode, [operand(part, values, threads) for part in given.split(",")]) if given else None
                values[target] = made if predicate is None and len(targets) == 1 else None


def hazards(ptx: str, warps: int, serialized: bool = False) -> tuple[Hazard, ...]:
    """The hazards in a kernel of ``warps`` warps, in the order of its instructions; each write with each operand once.

    Args:
        serialized: whether ptxas lets each product's warpgroup wait for it, more than the PTX says.

    Raises:
        ValueError: for a kernel with more ways through it than can be followed.
    """
    if "wgmma.mma_async" not in ptx:
        return ()
    blocks = blocks_of(ptx)
    after = successors_of(blocks)
    begins = [0]
    for block in blocks:
        begins.append(begins[-1] + len(block.lines))
    lines = [line for block in blocks for line in block.lines]
    scan = _Scan(warps, serialized, _wanted(lines))
    seen: list[set[object]] = [set() for _ in blocks]
    tried: dict[tuple[int, str], set[Value | None]] = defaultdict(set)
    todo: list[tuple[int, dict[str, Value | None], _Reads]] = [(0, {}, _Reads())]
    states = 0
    while todo:
        place, values, reads = todo.pop()
        _widened(place, values, tried)
        state = (frozenset(values.items()), reads)
        if state in seen[place]:
            continue
        seen[place].add(state)
        states += 1
        if states > _MOST_STATES:
            raise ValueError(f"more than {_MOST_STATES} ways through the kernel")
        reads = scan.run(begins[place], values, reads, blocks[place])
        todo += [(other, dict(values), reads) for other in _next(blocks[place], after[place], values, blocks)]
    return tuple(scan.found[key] for key in sorted(scan.found))


def _widened(place: int, values: dict[str, Value | None], tried: dict[tuple[int, str], set[Value | None]]) -> None:
    """A register that comes to a block with ever other values is unknown there."""
    for name, value in values.items():
        known = tried[place, name]
        if len(known) < _MOST_VALUES:
            known.add(value)
        elif value not in known:
            values[name] = None


def _next(block: Block, after: set[int], values: dict[str, Value | None], blocks: list[Block]) -> Iterator[int]:
    """The blocks that may come after one: of a condition that is known, the one."""
    parts = _PARTS.match(block.lines[-1]) if block.lines else None
    held = values.get(parts[2]) if parts and parts[2] and parts[3].startswith("bra") else None
    if held is None or len(block.targets) != 1:
        yield from sorted(after)
        return
    jumps = bool(held.low) != (parts is not None and parts[1] == "!")
    for other in sorted(after):
        if (block.targets[0] in blocks[other].labels) == jumps:
            yield other


def _wanted(lines: list[str]) -> set[str]:
    """The registers that addresses of writes and operands of products come from."""
    sources: dict[str, set[str]] = defaultdict(set)
    todo: list[str] = []
    for line in lines:
        parts = _PARTS.match(line)
        if parts is None:
            continue
        registers = _REGISTER.findall(parts[4])
        if parts[3].startswith("wgmma.mma_async"):
            todo += _REGISTER.findall(parts[4].partition("}")[2])
        elif _WRITE.match(parts[3]):
            todo += _REGISTER.findall(parts[4].partition("]")[0])
        elif not parts[3].startswith(("st.", "ld.")) and not parts[4].startswith("{"):
            sources[registers[0] if registers else ""].update(registers[1:])
    wanted: set[str] = set()
    while todo:
        register = todo.pop()
        if register not in wanted:
            wanted.add(register)
            todo += sources[register]
    return wanted


def _whole(opcode: str, rest: str, threads: int) -> bool:
    """Whether a barrier is one of all threads: ``bar.sync 0``, or with their number."""
    if ".sync" not in opcode or ".warp" in opcode:
        return opcode.startswith(("bar.red", "barrier.red"))
    count = rest.split(",")[1:]
    return not count or count[0].strip() == str(threads)


def _written(opcode: str, rest: str, values: dict[str, Value | None], threads: int) -> Span:
    """The bytes that a write may touch."""
    found = re.search(r"\[([^\]]+)\]", rest)
    where = address(found[1].replace(" ", ""), values, threads) if found else None
    if where is None or where.where != "address" or "bulk" in opcode:
        return ANYWHERE
    return where.low, where.high + _size(opcode, rest)


def _size(opcode: str, rest: str) -> int:
    if opcode.startswith("cp.async"):
        size = re.search(r",\s*(0x[0-9a-fA-F]+|\d+)\b", rest.rpartition("]")[2])
        return int(size[1], 0) if size else 16
    if opcode.startswith("stmatrix"):
        return 16
    bits, vector = re.search(r"[.][a-z]+(\d+)$", opcode), re.search(r"[.]v(\d)", opcode)
    return int(bits[1] if bits else 32) // 8 * int(vector[1] if vector else 1)


def _operands(opcode: str, rest: str, values: dict[str, Value | None]) -> Iterator[Span]:
    """The bytes that one product may read: of the left factor where a descriptor says so, and of the right one."""
    shape = re.search(r"[.]m(\d+)n(\d+)k(\d+)[.]", opcode)
    inputs = rest.partition("}")[2].lstrip(", ")
    in_registers = inputs.startswith("{")
    parts = [part.strip() for part in (inputs.partition("}")[2].lstrip(", ") if in_registers else inputs).split(",")]
    flags = [part == "1" for part in parts[-1 if in_registers else -2 :]]
    # Only 16-bit types have flags for transposed operands.
    across = flags if opcode.endswith(("f16", "bf16")) else [False] * len(flags)
    assert shape is not None
    rows, columns, depth = (int(part) for part in shape.groups())
    sides = [columns] if in_registers else [rows, columns]
    for name, side, along in zip(parts, sides, across, strict=False):
        yield _span(values.get(name), side, depth, along)


def _span(descriptor: Value | None, rows: int, depth: int, across: bool) -> Span:
    """First byte and end of ``rows`` rows of 32 bytes in a layout of shared memory; ``across``: of columns of rows."""
    if descriptor is None or descriptor.where != "descriptor":
        return ANYWHERE
    layout = descriptor.layout
    leading, stride = ((layout >> bit & (1 << 14) - 1) * 16 for bit in (16, 32))
    width = _WIDTHS.get(layout >> 62 & 3, 16)
    if across:
        reach = (max(rows * 2 // width, 1) - 1) * leading + (depth // 8 - 1) * stride
    else:
        reach = (rows // 8 - 1) * stride + (leading if width == 16 else 0)
    return descriptor.low // width * width, descriptor.high // width * width + reach + 8 * width
