"""Which Triton templates make a pass, what their parameters are for a problem, and their rendered files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from mctune.backends.kept import write_whole
from mctune.core.config import Config, Scalar
from mctune.core.paths import templates_dir
from mctune.core.problem import Problem

try:
    from mctune.backends.triton.render import render
except ModuleNotFoundError as missing:
    if missing.name != "libcst":
        raise

    def render(source: str, values: Mapping[str, Scalar]) -> str:
        """Stands in for rendering without LibCST: everything else works, and templates run as they are."""
        raise ModuleNotFoundError("libcst is not installed; pip install 'libcst>=1.5'", name="libcst")


PREFIXES = {
    "segment_states": "states",
    "gates": "gates",
    "pair_order": "pairs",
    "grouped_read": "group",
    "read_forward": "read",
    "read_specialized": "read",
    "gates_backward": "dgates",
    "read_backward": "dq",
    "state_backward": "dstates",
    "write_backward": "dkv",
    "grouped_backward": "dgroup",
    "decode_step": "decode",
    "decode_combine": "decode",
    "deep_write": "write",
    "deep_write_lanes": "write",
    "deep_write_rows": "write",
    "deep_rows": "rows",
    "deep_row_output": "rows",
    "deep_read": "read",
    "deep_mix": "read",
    "deep_replay": "replay",
    "deep_online_backward": "online",
    "deep_read_backward": "dq",
    "deep_state_backward": "dstates",
    "deep_write_backward": "dkv",
    "deep_decode_gates": "decode",
    "deep_decode": "decode",
    "deep_decode_mix": "decode",
    "deep_decode_combine": "decode",
}
"""The operations, a template each, and what the names of their parameters begin with in a configuration."""
SHARED = (
    "common", "decode_common", "backward_common", "deep_write_common", "deep_rows_common", "deep_walk_common",
    "deep_backward_common", "deep_decode_common", "deep_common",
)  # fmt: skip
"""Modules that templates import from; without flags, they are copied as they are."""
LEAST, LANES = 16, 16
"""Least width of a block; widths of states in memory are multiples of LANES."""


def operations(problem: Problem, config: Config) -> tuple[str, ...]:
    """The templates that a pass of ``problem`` launches with ``config``, in order."""
    return _deep(problem, config) if problem.deep else _matrix(problem, config)


def _deep(problem: Problem, config: Config) -> tuple[str, ...]:
    mixes = problem.reads.mixes_parameters
    gates, dgates = (("gates",), ("gates_backward",)) if problem.routed else ((), ())
    match problem.pass_:
        case "forward":
            # Segments too long for rows have their states carried.
            by_rows = config["write_FORM"] == "rows"
            rows = ("deep_write_rows", "deep_rows") if by_rows else ()
            write = ("deep_write_lanes", *rows) if problem.writes.momentum else ("deep_write",)
            output = ("deep_row_output",) if by_rows and mixes else ()
            return (*write, *gates, *output, "deep_mix" if mixes else "deep_read")
        case "backward":
            read = ("deep_read_backward", *dgates, "deep_state_backward")
            return ("deep_replay", *gates, "deep_online_backward", *read, "deep_write_backward")
        case _:
            before = ("deep_decode_gates",) if problem.routed or problem.writes.momentum else ()
            return (*before, "deep_decode", *(("deep_decode_mix",) if mixes else ()), "deep_decode_combine")


def _matrix(problem: Problem, config: Config) -> tuple[str, ...]:
    match problem.pass_:
        case "forward":
            gates = ("gates",) if problem.routed and config["gates"] == "precomputed" else ()
            grouped = ("pair_order", "grouped_read") if config["formulation"] == "grouped" else ()
            read = "read_specialized" if config["formulation"] == "specialized" else "read_forward"
            return ("segment_states", *gates, *grouped, read)
        case "backward":
            gates, dgates = (("gates",), ("gates_backward",)) if problem.routed else ((), ())
            grouped = ("pair_order", "grouped_backward") if config["formulation"] == "grouped" else ()
            return ("segment_states", *gates, *grouped, "read_backward", *dgates, "state_backward", "write_backward")
        case _:
            return ("decode_step", "decode_combine") if config.integer("decode_SPLITS") > 1 else ("decode_step",)


def values(operation: str, problem: Problem, config: Config) -> dict[str, Scalar]:
    """The values of a template's parameters: of the problem first, then of the configuration."""
    found: dict[str, Scalar] = {
        "SWLA": problem.writes.gated,
        "ROUTED": problem.reads.routed,
        "SPARSE": problem.reads.sparse,
        "AVERAGES": problem.reads.averages,
        "MIXES": problem.deep and problem.reads.mixes_parameters,
        "SQUARED": problem.writes.momentum,
        "INDEPENDENT": problem.state_init == "independent",
        "HALF": problem.dtype != "float32",
        "GATES": "precomputed",
        "FORMULATION": "per_segment",
        "PRECISION": "ieee",
        "OPERAND": "registers",
    }
    if problem.deep:
        found["INNER"] = problem.inner_chunk or 1
    for letter, width in (("K", problem.Dk), ("V", problem.Dv), *((("E", problem.E),) if problem.deep else ())):
        found[f"D{letter}"] = width
        found[f"P{letter}"] = max(LEAST, 1 << (width - 1).bit_length())
        found[f"S{letter}"] = -(-width // LANES) * LANES
    prefix = f"{PREFIXES[operation]}_"
    for name, value in config.items:
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = value
        elif name in ("piece", "precision", "gates", "formulation"):
            found[name.upper()] = value
    return found


def write_parts(problem: Problem, config: Config, folder: Path) -> tuple[tuple[str, str], ...]:
    """Render the operations of a pass into ``folder``: (operation, file name), in order; then what they import.

    A file's name ends in a digest of its text: equal names are equal files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared: dict[str, str] = {}
    parts = []
    for operation in operations(problem, config):
        text = _rendered(operation, tuple(values(operation, problem, config).items()))
        parts.append((operation, _write(folder, operation, _linked(text, folder, shared))))
    return (*parts, *shared.items())


def _linked(text: str, folder: Path, shared: dict[str, str]) -> str:
    """``text`` with imports of the shared modules' files, which are written first and noted in ``shared``."""
    for name in SHARED:
        if f"from .{name} import" in text:
            shared[name] = _write(folder, name, _linked(_source(name), folder, shared))
            text = text.replace(f"from .{name} import", f"from .{shared[name].removesuffix('.py')} import")
    return text


@cache
def _rendered(operation: str, values: tuple[tuple[str, Scalar], ...]) -> str:
    return specialised(operation, dict(values))


def specialised(operation: str, values: Mapping[str, Scalar]) -> str:
    """The template of an operation, rendered with ``values``."""
    return render(_source(operation), values)


def _write(folder: Path, name: str, text: str) -> str:
    file = f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}.py"
    write_whole(folder / file, text)
    return file


@cache
def _source(name: str) -> str:
    """The text of a template, whose name no other family has."""
    (path,) = (templates_dir() / "triton").glob(f"*/{name}.py")
    return path.read_text(encoding="utf-8")


@cache
def digest() -> str:
    """SHA-256 of every Triton template, so that changing one makes another kernel."""
    found = hashlib.sha256()
    for path in sorted((templates_dir() / "triton").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
