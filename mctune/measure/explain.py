"""The kernels as compiled for a GPU, present or absent, and what bounds them by arithmetic.

Nothing here is measured. For every launch of a pass: its grid, what it takes of a multiprocessor, the instructions of
its busiest loop, how many cycles each unit of a multiprocessor needs for one pass of it, what ptxas says of it, writes
to shared memory that may come too early, the bytes that it moves, and the time that the cost model predicts.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from mctune.backends import backend_for, get_backend
from mctune.backends.protocol import Launch
from mctune.backends.registry import refuse
from mctune.backends.triton.cost.calibrated import calibration
from mctune.backends.triton.cost.predict import Demand, Part, demands, estimate, source_for
from mctune.backends.triton.cost.walk import Source
from mctune.backends.triton.hazards import hazards
from mctune.backends.triton.resources import CORES, resources
from mctune.core.config import Config, Scalar
from mctune.core.errors import MctuneError
from mctune.core.outcome import TooLarge
from mctune.core.problem import Problem
from mctune.core.space import SearchSpace
from mctune.core.target import Target
from mctune.report.markdown import text_table

CLASSES = {
    "product": ("HGMMA", "HMMA", "UTCHMMA", "QGMMA"),
    "float": ("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX", "HADD2", "HMUL2", "HFMA2", "F2F", "F2FP"),
    "special": ("MUFU",),
    "shared": ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "SHFL", "UTMALDG", "ATOMS"),
    "global": ("LDG", "STG", "LD", "ST", "RED", "ATOMG"),
    "stack": ("LDL", "STL"),
}
"""Opcodes of NVIDIA's assembly by what they occupy; all others are "other"."""
SHARED_BYTES = 128
"""A cycle and multiprocessor."""
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"\(?`?\(?(\.L_x_\d+)\)?")


@dataclass(frozen=True)
class Inner:
    """An innermost loop: instructions of one warp in a pass, by class; of a warp's products the operations, and the
    bytes that they read from shared memory themselves."""

    mix: Counter[str]
    operations: float
    operands: float = 0.0

    @property
    def issued(self) -> int:
        """Instructions."""
        return sum(self.mix.values())


def inner_loops(binary: bytes, name: str) -> list[Inner]:
    """The innermost loops of a kernel of a cubin, in the order of its code."""
    lines: list[tuple[str, str]] = []
    places: dict[str, int] = {}
    for line in _section(disassembled(binary), name).splitlines():
        label, found = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            places[label[1]] = len(lines)
        elif found:
            lines.append((found[2], found[3]))
    spans = []
    for end, (opcode, operands) in enumerate(lines):
        target = _TARGET.search(operands) if opcode.startswith("BRA") else None
        # A jump to itself ends the code; a short one back waits for a copy.
        if target and places.get(target[1], end) < end - 8:
            spans.append((places[target[1]], end + 1))
    inner = [x for x in spans if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in spans)]
    return [_loop(lines[begin:end]) for begin, end in inner]


def _section(assembly: str, name: str) -> str:
    """The code of one of several kernels; all of it where it is not told apart."""
    _, found, rest = assembly.partition(f"\t.section\t.text.{name},")
    return rest.partition("\t.section\t.text.")[0] if found else assembly


def _loop(lines: Sequence[tuple[str, str]]) -> Inner:
    mix: Counter[str] = Counter()
    operations = operands = 0.0
    for opcode, given in lines:
        base, _, rest = opcode.partition(".")
        mix[next((name for name, opcodes in CLASSES.items() if base in opcodes), "other")] += 1
        shape = re.match(r"(\d+)x(\d+)x(\d+)", rest)
        if base == "HGMMA" and shape:
            rows, columns, depth = (int(part) for part in shape.groups())
            operations += 2.0 * rows * columns * depth / 4 * (2 if "TF32" in rest else 1)
            # Rows of 32 bytes; the left factor's are in registers unless it has a descriptor too.
            left = rows if given.partition(",")[2].lstrip().startswith("gdesc") else 0
            operands += 32.0 * (left + columns) / 4
        elif base == "HMMA":
            operations += {"16816": 4096.0, "1688": 2048.0, "1684": 1024.0}[rest.split(".")[0]] * (
                2 if "TF32" in rest else 1
            )
    return Inner(mix, operations, operands)


def disassembled(binary: bytes) -> str:
    """NVIDIA's assembly of a cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def leaves(source: Source | None, entries: float = 1.0) -> Iterator[float]:
    """How often each innermost loop of a source runs in all."""
    for loop in source.inner if source else ():
        if loop.inner:
            yield from leaves(loop, entries * loop.trips)
        else:
            yield entries * loop.trips


class Aside(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators of torch that launch something beside our kernels."""

    FREE = ("empty", "view", "expand", "select", "slice", "alias", "detach", "unsqueeze", "as_strided", "_to_cpu")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        device = getattr(made[0] if isinstance(made, tuple) else made, "device", None)
        if device is not None and device.type == "meta" and not any(free in name for free in self.FREE):
            self.counted[name] += 1
        return made


def row(launch: Launch, demand: Demand, part: Part, source: Source | None, target: Target) -> tuple[str, ...]:
    """One line of the table."""
    taken, core = resources(launch, target), CORES[target.arch]
    loops = (
        inner_loops(launch.binary, launch.name) if target.kind == "cuda" else []
    )  # it is NVIDIA's assembly that is read
    trips = list(leaves(source))
    told = dict(enumerate(trips)) if len(trips) == len(loops) else {}
    weights = [loop.issued * told.get(i, 1.0 + loop.operations) for i, loop in enumerate(loops)]
    traffic = demand.blocks * (demand.mean.loaded + demand.mean.stored) / 2**20
    cells = [
        launch.name.removesuffix("_kernel"), f"{launch.blocks}", f"{launch.num_warps}", f"{launch.registers}",
        f"{launch.spills}", f"{launch.shared / 1024:.0f}", f"{taken.blocks_per_core}",
    ]  # fmt: skip
    if loops:
        place = weights.index(max(weights))
        loop, warps = loops[place], launch.num_warps
        clock = (target.matrix_tflops or 1.0) * 1e12 / target.cores / ((target.clock_ghz or 1.0) * 1e9)
        lanes = warps * launch.warp_size
        cycles = {
            "products": warps * loop.operations / clock,
            "operands": warps * loop.operands / SHARED_BYTES,
            "issue": warps * loop.issued / core.parts,
            "special": lanes * loop.mix["special"] / core.special_lanes,
        }
        most = max(cycles, key=lambda name: cycles[name])
        cells += [
            f"{told[place]:.0f}" if place in told else "",
            *(str(loop.mix[name]) for name in (*CLASSES, "other")),
            f"{cycles['products']:.0f}", f"{cycles['operands']:.0f}", f"{cycles['issue']:.0f}", most,
        ]  # fmt: skip
    else:
        cells += [""] * (len(CLASSES) + 6)
    cells += [", ".join(note.partition(" ")[0] for note in launch.notes), races(launch)]
    ends = (f"{traffic:.0f}", f"{demand.footprint / 2**20:.0f}", f"{part.us:.0f}", part.bound)
    return (*cells, *ends, f"{taken.occupancy:.0%}")


def races(launch: Launch) -> str:
    """How many writes to shared memory may meet a product that still reads there, "" for none."""
    try:
        found = hazards(launch.asm, launch.num_warps, launch.serialized)
    except ValueError:
        return "?"
    return str(len({hazard.line for hazard in found}) or "")


def remarks(launches: Sequence[Launch]) -> Iterator[str]:
    """What the columns ``ptxas`` and ``races`` stand for, once a kernel."""
    for launch in {launch.name: launch for launch in launches}.values():
        yield from (f"{launch.name}: {note}" for note in launch.notes)
        if races(launch) not in ("", "?"):
            yield f"{launch.name}: {hazards(launch.asm, launch.num_warps, launch.serialized)[0]}"


HEADER = (
    "kernel", "blocks", "warps", "regs", "stack", "KiB", "res", "trips", *CLASSES, "other", "cyc MMA", "cyc opnd",
    "cyc issue", "loop bound", "ptxas", "races", "MiB L2", "MiB DRAM", "us", "bound", "occupancy",
)  # fmt: skip


def markdown(rows: Sequence[Sequence[str]], pass_: str) -> str:
    """The table of docs/performance.md, with a line of sums."""
    lines = []
    for cells in rows:
        of = dict(zip(HEADER[:8], cells[:8], strict=True)) | dict(zip(HEADER[15:], cells[15:], strict=True))
        mix = dict(zip((*CLASSES, "rest"), cells[8:15], strict=True))
        other = sum(int(mix[name] or 0) for name in ("global", "stack", "rest"))
        counts = ", ".join((*(mix[name] or "0" for name in ("product", "float", "special", "shared")), str(other)))
        cycles = ", ".join(of[name] or "0" for name in ("cyc MMA", "cyc opnd", "cyc issue"))
        bound = "products" if of["bound"] == "matrix units" else of["bound"]
        taken = (of[name] for name in ("kernel", "blocks", "warps", "regs", "stack", "KiB", "res"))
        lines.append([*taken, counts, cycles, of["ptxas"], of["MiB L2"], of["MiB DRAM"], f"{of['us']} ({bound})"])
    sums = [sum(int(line[place].split()[0]) for line in lines) for place in (10, 11, 12)]
    lines.append([f"**{pass_}**", *[""] * 9, f"{sums[0]}", f"{sums[1]}", f"**{sums[2]}**"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("|  ", "| ")


@dataclass(frozen=True)
class Explained:
    """What the compiler says of one pass: a row of cells a launch, in the order of :data:`HEADER`."""

    problem: Problem
    config: Config
    rows: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...]
    predicted_us: float
    beside: Mapping[str, int]
    """Launches of torch beside them, by operator."""

    def text(self) -> str:
        """For a terminal."""
        beside = ", ".join(f"{name} x{count}" for name, count in self.beside.items()) or "none"
        last = f"predicted {self.predicted_us:.0f} us; launches of torch beside them: {beside}"
        return "\n".join((str(self.problem), text_table(HEADER, self.rows), *self.remarks, last))

    def markdown(self) -> str:
        """The rows of a page."""
        return markdown(self.rows, self.problem.pass_)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "problem": self.problem.to_dict(),
            "config": self.config.to_dict(),
            "launches": [dict(zip(HEADER, cells, strict=True)) for cells in self.rows],
            "remarks": list(self.remarks),
            "predicted_us": self.predicted_us,
            "beside": dict(self.beside),
        }


def explain(problem: Problem, config: Config, target: Target, maker: str = "triton") -> Explained:
    """Compile every launch of a pass and say what the compiler made of it; ``maker``: what compiles.

    Raises:
        MctuneError: if the target cannot hold a kernel.
    """
    backend = get_backend(maker)
    with tempfile.TemporaryDirectory() as folder, Aside() as aside:
        built = backend.build(problem, config, target, Path(folder))
        launches = backend.compile(problem, config, built, target)
    if isinstance(launches, TooLarge):
        raise MctuneError(launches.message)
    parameters, _ = calibration(target)
    asked = demands(launches, problem, config, target, parameters)
    parts = estimate(asked, target, parameters)
    rows = tuple(
        row(launch, demand, part, source_for(launch, problem, config, target), target)
        for launch, demand, part in zip(launches, asked, parts, strict=True)
    )
    total = sum(part.us for part in parts)
    return Explained(problem, config, rows, tuple(remarks(launches)), total, aside.counted)


def value_of(space: SearchSpace, name: str, given: Scalar) -> Scalar:
    """The value of a parameter that prints like the one given."""
    values = space.param(name).values
    found = [value for value in values if str(value) == str(given)]
    if not found:
        raise MctuneError(f"{name}={given}: it may be {', '.join(map(str, values))}")
    return found[0]


def chosen_config(problem: Problem, target: Target, chosen: Mapping[str, Scalar], maker: str | None = None) -> Config:
    """The first default of the problem's space that is valid with the parameters ``chosen``.

    Raises:
        MctuneError: for a CPU, a parameter or a value that the space does not have, or if no default is valid.
    """
    if target.on_cpu:
        raise MctuneError(f"{target.name} is a CPU; give --gpu the name of a GPU (`mctune targets`)")
    backend = get_backend(maker or backend_for(target))
    refuse(backend.supports(problem, target))
    space = backend.space(problem)
    typed = {name: value_of(space, name, text) for name, text in chosen.items()}
    configs = [config.replace(**typed) for config in (space.default, *space.fallbacks)]
    nearest = min(configs, key=lambda config: len(space.broken(config, problem, target)))
    if broken := space.broken(nearest, problem, target):
        wanted = " ".join(f"{name}={value}" for name, value in typed.items())
        raise MctuneError(f"no default of the space is valid with {wanted or 'this problem'}: {broken[0].reason}")
    return nearest
