"""A configuration in a form that avoids a known hazard of Triton's (:data:`mctune.backends.triton.versions.HAZARDS`).

    safe(config, space, problem, target, ("warps", "stages"))            # all of its kernels
    safe(config, space, problem, target, ("operand",), ("dstates",))     # those whose parameters begin with dstates_

The forms "mma" and "ptxas" change no configuration: they are environment variables, read when a kernel is compiled.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from mctune.backends.triton.versions import HOPPER, numbers
from mctune.core.config import Config, Scalar
from mctune.core.problem import Problem
from mctune.core.space import SearchSpace
from mctune.core.target import Target

WARPS = 4
"""Warps of one warpgroup, which multiplies by itself."""
FORMS = {
    "warps": "at most 4 warps, tiles cut down to what they hold",
    "stages": "num_stages=1: nothing is in flight",
    "operand": "OPERAND=shared: gated rows wait for their product in shared memory",
    "mma": "DISABLE_MMA_V3=1: products by mma.sync",
    "ptxas": "TRITON_PTXAS_PATH: the newest other ptxas of the machine",
}
ENVIRONMENT = {"mma": "DISABLE_MMA_V3", "ptxas": "TRITON_PTXAS_PATH"}
_TILES = re.compile(r"_(B[A-Z]|SEGMENTS)$")


def prefixes(config: Config) -> tuple[str, ...]:
    """What the names of the parameters of each of its kernels begin with."""
    return tuple(name.removesuffix("_num_warps") for name in config if name.endswith("_num_warps"))


def safe(
    config: Config,
    space: SearchSpace,
    problem: Problem,
    target: Target,
    forms: Sequence[str],
    only: Sequence[str] | None = None,
) -> Config | None:
    """``config`` with the kernels whose prefixes are in ``only``, or all, in these forms; ``None`` if none is valid.

    A configuration that is in these forms already comes back as it is.
    """
    chosen = []
    for prefix in prefixes(config) if only is None else only:
        changed = config.replace(**_changes(config, problem, target, prefix, forms))
        # Parameters of a kernel that the configuration does not use must keep their values.
        if f"{prefix}_*" not in {constraint.name for constraint in space.broken(changed, problem, target)}:
            config = changed
            chosen.append(prefix)
    return _cut_down(config, space, problem, target, tuple(chosen))


def _changes(config: Config, problem: Problem, target: Target, prefix: str, forms: Sequence[str]) -> dict[str, Scalar]:
    changes: dict[str, Scalar] = {}
    # The gated rows are those of a state's gradient; equal gates have none.
    grouped = "formulation" in config and config["formulation"] == "grouped"
    warps, stages = f"{prefix}_num_warps", f"{prefix}_num_stages"
    if "warps" in forms and config.integer(warps) > WARPS:
        changes[warps] = WARPS
    if "stages" in forms and stages in config:
        changes[stages] = 1
    waiting = "dgroup" if grouped else "dstates"
    if "operand" in forms and target.arch in HOPPER and problem.routed and prefix == waiting:
        changes[f"{prefix}_OPERAND"] = "shared"
    return changes


def _cut_down(
    config: Config, space: SearchSpace, problem: Problem, target: Target, chosen: tuple[str, ...]
) -> Config | None:
    """With tiles of these kernels so much smaller that every constraint holds, each step the one that mends most."""
    while True:
        broken = len(space.broken(config, problem, target))
        if not broken:
            return config
        smaller = []
        for param in space.params:
            if param.name.partition("_")[0] in chosen and _TILES.search(param.name):
                at = param.values.index(config[param.name])
                if at > 0:
                    less = config.replace(**{param.name: param.values[at - 1]})
                    smaller.append((len(space.broken(less, problem, target)), -at, param.name, less))
        if not smaller:
            return None
        config = min(smaller, key=lambda step: step[:3])[3]


def environment(form: str, beside: str | None = None) -> Mapping[str, str] | None:
    """The variables of a form, {} for one of configurations; ``None`` where the machine has no other ptxas.

    Args:
        beside: the ptxas that Triton takes by itself.
    """
    if form not in ENVIRONMENT:
        return {}
    if form == "mma":
        return {ENVIRONMENT[form]: "1"}
    found = newest_ptxas(beside)
    return None if found is None else {ENVIRONMENT[form]: str(found)}


def newest_ptxas(beside: str | None) -> Path | None:
    """The newest ptxas of the machine that is newer than the one given: Triton's own for later GPUs, or CUDA's."""
    own = Path(beside) if beside else None
    places = [own.with_name("ptxas-blackwell")] if own else []
    places += sorted(Path("/usr/local").glob("cuda*/bin/ptxas"))
    dated = {path: ptxas_version(path) for path in places}
    oldest = ptxas_version(own) if own else ()
    newer = [path for path, dated_as in dated.items() if dated_as > oldest]
    return max(newer, key=lambda path: dated[path], default=None)


def ptxas_version(path: Path) -> tuple[int, ...]:
    """(12, 8, 93); empty where there is none."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    return numbers(found[1]) if found else ()
