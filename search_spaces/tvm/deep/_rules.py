"""What the spaces of deep memories share: tiles stay in registers and divide what they tile."""

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import Constraint
from mctune.core.target import Target


def width(value: int) -> int:
    """Widths are padded to whole vectors of 16 floats."""
    return -(-value // 16) * 16


def fits_registers(rows: str, cols: str) -> Constraint:
    """Accumulators, one row of B and one broadcast of A stay in the vector registers."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        vectors = -(-config.integer(cols) // target.vector_floats)
        registers = 32 if target.vector_floats == 16 else 16
        return config.integer(rows) * vectors + vectors + 1 <= registers

    return Constraint(f"{rows} registers", holds, f"the tile of {rows} and {cols} would spill")


def covers(rows: str, whole: str | None = None) -> Constraint:
    """Tiles of ``rows`` rows, or of that and one row less, are 16 rows and so all widths; or they divide ``whole``."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        height = config.integer(rows)
        fits = 16 % height == 0 or -(-16 // height) * (height - 1) <= 16
        return fits or (whole is not None and config.integer(whole) % height == 0)

    return Constraint(rows, holds, f"no tiles of {rows} rows, or of one less, make 16" + (f" or {whole}" * bool(whole)))


def divides(part: str, *wholes: str) -> Constraint:
    """``part`` divides each of ``wholes``: a width of the problem, padded to 16, or another parameter."""

    def holds(config: Config, problem: Problem, target: Target) -> bool:
        found = config.to_dict()
        sizes = [config.integer(name) if name in found else width(getattr(problem, name)) for name in wholes]
        return all(size % config.integer(part) == 0 for size in sizes)

    return Constraint(part, holds, f"{part} must divide {' and '.join(wholes)}, widths padded to 16")
