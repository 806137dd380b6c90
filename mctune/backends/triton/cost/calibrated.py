"""The cost model's parameters for a target, where they were fitted to measured times."""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path

from mctune.backends.triton.cost.parameters import Parameters
from mctune.core.errors import UsageError
from mctune.core.paths import search_spaces_dir
from mctune.core.target import Target
from mctune.core.toml import read_toml

FILE = "calibration.toml"


def calibration(target: Target) -> tuple[Parameters, bool]:
    """The parameters for ``target``, and whether they were fitted: ``results/<target>/calibration.toml``.

    Looked for under the working directory, then in mctune's own checkout.
    """
    for results in (Path("results"), search_spaces_dir().parent / "results"):
        path = results / target.name / FILE
        if path.is_file():
            return read_calibration(path.resolve(), path.stat().st_mtime_ns), True
    return Parameters(), False


@lru_cache(maxsize=16)
def read_calibration(path: Path, version: int = 0) -> Parameters:
    """The parameters of a file; those that it does not name keep their defaults. ``version`` tells states apart.

    Raises:
        UsageError: for a parameter that the cost model does not have, or a value that is not positive.
    """
    values = read_toml(path).get("parameters", {})
    known = {field.name for field in fields(Parameters)}
    for name, value in values.items():
        if name not in known:
            raise UsageError(f"{path}: the cost model has no parameter {name!r}; run mctune calibrate again")
        if not isinstance(value, int | float) or not value > 0:
            raise UsageError(f"{path}: {name} = {value!r} is not a positive number")
    return Parameters(**{name: float(value) for name, value in values.items()})


def write_calibration(path: Path, parameters: Parameters, about: str) -> None:
    """Write the parameters that differ from their defaults; ``about`` is a comment, one line."""
    defaults = asdict(Parameters())
    lines = [f"{name} = {value:.6g}" for name, value in asdict(parameters).items() if value != defaults[name]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f"# {about}", "[parameters]", *lines]) + "\n")
