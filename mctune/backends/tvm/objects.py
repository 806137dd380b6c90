"""The operations of a pass, each compiled once: object files named by all that they depend on, linked into a library.

Candidates, studies and runs that share a folder share its objects: a candidate that differs from another in one
operation compiles one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mctune.backends.kept import keep, scratch_in
from mctune.backends.protocol import Built, OperationError
from mctune.backends.spaces import load_space
from mctune.backends.tvm.link import link
from mctune.backends.tvm.templates import OPERATIONS, function_of, source_hash
from mctune.backends.tvm.versions import TVM, check_versions
from mctune.core.config import Config
from mctune.core.errors import DeviceError, MctuneError
from mctune.core.problem import Problem
from mctune.core.target import Target
from mctune.runtime.whole import is_whole

_MODULE = "class Module:\n"
_LOWERING: dict[str, Any] = {
    "config": {"tirx.disable_cse_tir": True},
    "disabled_pass": ["s_tir.CompactBufferAllocation"],
}
"""TVM's search for common subexpressions takes a fifth of the compile time of the largest operations, for code
that is as fast without it: LLVM looks for them too. To shrink arrays takes a fifteenth, and templates allocate what
they use: object files have the same size without it."""


@dataclass(frozen=True)
class Compiled:
    """One operation: ``object`` holds its function, ``source`` the TVMScript that it came from."""

    object: Path
    source: Path


def compiled(problem: Problem, config: Config, target: Target, folder: Path) -> tuple[Compiled, ...]:
    """The operations of a pass in ``folder``, in order, without those that ``config`` fuses into others.

    ``problem`` has padded widths.

    Raises:
        OperationError: with TVM's reason, if one does not compile.
        DeviceError: if TVM is missing or is a wrong pair.
    """
    found = []
    space = load_space("tvm", problem.writes.family, problem.pass_)
    for operation in OPERATIONS[problem.writes.family, problem.pass_]:
        try:
            one = _compiled(operation, problem, space.seen_by(operation, config), target, folder)
        except (MctuneError, OSError):
            raise
        except Exception as error:
            raise OperationError(operation) from error
        if one is not None:
            found.append(one)
    return tuple(found)


def _compiled(operation: str, problem: Problem, config: Config, target: Target, folder: Path) -> Compiled | None:
    name = f"{operation}_{_digest(operation, problem, config, target)}"
    found = Compiled(folder / f"{name}.o", folder / f"{name}.py")
    if is_whole(found.object, found.source):
        return found
    check_versions()
    import tvm

    function = function_of(operation, problem, config, target)
    if function is None:
        return None
    module = tvm.IRModule({operation: function})
    with tvm.transform.PassContext(**_LOWERING):
        library = tvm.compile(module, target=llvm(target))
    # Others may compile the same operation into the same folder at the same time.
    with scratch_in(folder, "compile") as scratch:
        text, object_ = Path(scratch, found.source.name), Path(scratch, found.object.name)
        text.write_text(module.script() + "\n", encoding="utf-8")
        write_object(library, object_)
        keep(object_, found.object)
        keep(text, found.source)
    return found


def _digest(operation: str, problem: Problem, config: Config, target: Target) -> str:
    """What an object depends on: the templates, the static part of the problem, what it sees of the rest, the CPU."""
    widths = (problem.Dk, problem.Dv, *((problem.E,) if problem.deep else ()))
    static = (problem.pass_, problem.recurrence, problem.aggregation, problem.state_init, *widths)
    values = {name: value for name, value in config.to_dict().items() if name != "segment_length"}
    identity = json.dumps([operation, source_hash(), static, values, target.arch, TVM, _LOWERING], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def linked(about: str, stem: str, parts: Sequence[Compiled], folder: Path) -> Built:
    """A library of these operations, and beside it their TVMScript, headed by ``about``.

    Raises:
        DeviceError: for whatever goes wrong: LLVM has accepted the candidate before.
    """
    digest = hashlib.sha256(" ".join(part.object.name for part in parts).encode()).hexdigest()[:12]
    built = Built(folder / f"{stem}_{digest}.so", folder / f"{stem}_{digest}.py")
    if is_whole(built.library, built.source):
        return built
    with scratch_in(folder, "link") as scratch:
        text, library = Path(scratch, built.source.name), Path(scratch, built.library.name)
        text.write_text(about + joined([part.source.read_text(encoding="utf-8") for part in parts]), encoding="utf-8")
        link(str(library), [str(part.object) for part in parts])
        keep(library, built.library)
        keep(text, built.source)
    return built


def joined(texts: Sequence[str]) -> str:
    """One module of TVMScript that has the functions of several."""
    head, _, _ = texts[0].partition(_MODULE)
    return head + _MODULE + "\n".join(text.partition(_MODULE)[2] for text in texts)


def write_object(library: Any, path: Path) -> None:
    """Write what was compiled as an object file.

    Raises:
        DeviceError: for whatever goes wrong: LLVM has accepted the candidate before.
    """
    try:
        library.mod.write_to_file(str(path))
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
        raise DeviceError(f"a compiled kernel cannot be written to {path.parent}: {said}") from error


@cache
def _llvm(arch: str) -> Any:
    import tvm

    return tvm.target.Target({"kind": "llvm", "mcpu": arch, "mtriple": "x86_64-linux-gnu"})


def llvm(target: Target) -> Any:
    """The CPU as TVM spells it."""
    return _llvm(target.arch)
