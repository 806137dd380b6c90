"""The house rules that an import statement can break: arrows between rooms, sizes of modules, what loads when."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Room -> the rooms that it may import; every room may import itself.
ROOMS: dict[str, tuple[str, ...]] = {
    # The axes, which the copied runtime must have and which import nothing.
    "core": ("runtime.traits",),
    "reference": ("core",),
    "runtime": (),
    # What is timed goes through the launcher that ships.
    "backends": ("runtime", "core"),
    "verify": ("backends", "reference", "runtime", "core"),
    # Nothing is timed that was not verified, and what was timed becomes rows.
    "measure": ("verify", "report", "backends", "reference", "runtime", "core"),
    "workers": ("verify", "measure", "backends", "runtime", "core"),
    "study": ("workers", "verify", "measure", "backends", "core"),
    "emit": ("runtime", "core"),
    "report": ("core",),
    "cli": ("study", "workers", "verify", "measure", "emit", "report", "backends", "runtime", "core"),
    # The package itself and ``python -m mctune``.
    "": ("core", "runtime", "cli"),
    "templates": (),
    # The nouns in whose terms a search space is written.
    "search_spaces": ("core.space", "core.config", "core.problem", "core.target"),
}
# Packages of others that a room must do without.
FOREIGN: dict[str, tuple[str, ...]] = {
    "core": ("torch", "tvm", "tvm_ffi", "triton", "optuna", "numpy", "click", "rich"),
    "reference": ("tvm", "tvm_ffi", "triton", "optuna", "click", "rich"),
    # tvm is the compiler; an emitted package has only its ffi.
    "runtime": ("tvm", "optuna", "numpy", "libcst", "click", "rich"),
    "backends": ("optuna", "click", "rich"),
    "verify": ("optuna", "click", "rich"),
    "measure": ("optuna", "click", "rich"),
    "workers": ("optuna", "click", "rich"),
    "study": ("click", "rich"),
    "emit": ("optuna", "click", "rich"),
    "report": ("torch", "tvm", "tvm_ffi", "triton", "optuna", "click", "rich"),
    # What a template's host function launches over is allocated by torch.
    "templates": ("optuna", "click", "rich"),
    "search_spaces": ("torch", "tvm", "tvm_ffi", "triton", "optuna", "numpy"),
}
# What a command may import before it runs.
CLI_TOP = ("click", "mctune")


@dataclass(frozen=True)
class Import:
    """One import: ``module`` in full, ``level`` dots, whether it stands outside every function."""

    path: Path
    line: int
    module: str
    level: int
    top: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {'.' * self.level}{self.module}"

    @property
    def package(self) -> str:
        """The top-level package; empty for a relative import."""
        return "" if self.level else self.module.partition(".")[0]


def room_of(path: Path) -> str:
    """The room that a file belongs to."""
    first, *rest = path.relative_to(ROOT).parts
    if first != "mctune":
        return first
    return rest[0] if len(rest) > 1 else ""


def imports_of(path: Path) -> list[Import]:
    """Every import statement, and every ``importlib.import_module("...")`` with a literal name."""
    found: list[Import] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(path, node.lineno, alias.name, 0, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            # ``from mctune.core import space`` names a module too, so each name counts as one.
            names = [f"{module}.{a.name}" if module else a.name for a in node.names]
            found.extend(Import(path, node.lineno, name, node.level, top) for name in names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                found.append(Import(path, node.lineno, node.args[0].value, 0, top))
        inside = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text()), True)
    return found


def files(*folders: str) -> list[Path]:
    """Python files under these folders of the checkout."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if "_data" not in path.parts)


SOURCES = files("mctune", "templates", "search_spaces")
IMPORTS = [imported for path in SOURCES for imported in imports_of(path)]


def allowed(imported: Import) -> bool:
    """Whether the arrow that this import draws is one of the house's."""
    room = room_of(imported.path)
    if imported.level:
        # A relative import must not climb out of its room.
        return imported.level < len(imported.path.relative_to(ROOT).parts) - 1
    if imported.package == "mctune":
        if imported.module in ("mctune", "mctune.__version__"):
            return room == "cli"
        target = imported.module.removeprefix("mctune.")
        return any(target == ok or target.startswith(ok + ".") for ok in (*ROOMS[room], *([room] if room else [])))
    if imported.package in ("templates", "search_spaces"):
        return imported.package == room
    return imported.package not in FOREIGN.get(room, ())


def assert_none(wrong: list[Import]) -> None:
    assert not wrong, "\n" + "\n".join(str(imported) for imported in wrong)


def test_every_source_is_in_a_room() -> None:
    assert len(SOURCES) > 30
    assert {room_of(path) for path in SOURCES} <= set(ROOMS)


def test_imports_follow_the_arrows() -> None:
    assert_none([imported for imported in IMPORTS if not allowed(imported)])


def test_the_runtime_can_be_copied() -> None:
    absolute = [i for i in IMPORTS if room_of(i.path) == "runtime" and i.package == "mctune"]
    assert_none(absolute)


def test_only_what_is_loaded_from_elsewhere_imports_relatively() -> None:
    relative = [i for i in IMPORTS if i.level and room_of(i.path) not in ("runtime", "templates", "search_spaces")]
    assert_none(relative)


def test_own_imports_stand_at_the_top_outside_cli() -> None:
    lazy = [i for i in IMPORTS if not i.top and room_of(i.path) != "cli" and (i.level or i.package == "mctune")]
    assert_none(lazy)


def test_a_command_imports_only_click_before_it_runs() -> None:
    foreign = [
        i
        for i in IMPORTS
        # The moving bar is itself imported by the command that shows it.
        if room_of(i.path) == "cli" and i.path.name != "_progress.py" and i.top
        if i.package not in CLI_TOP and i.package not in sys.stdlib_module_names
    ]
    assert_none(foreign)


def test_modules_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long, long


def test_importing_mctune_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'tvm', 'tvm_ffi', 'triton', 'optuna', 'numpy'}"
    code = f"import sys, mctune, mctune.cli; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("where", "statement", "fine"),
    [
        ("mctune/core/x.py", "from mctune.core.problem import Problem", True),
        ("mctune/core/x.py", "from mctune.report.rows import Row", False),
        ("mctune/core/x.py", "import torch", False),
        ("mctune/backends/x.py", "from mctune.runtime.kernels.tvm.matrix.forward import TvmForward", True),
        ("mctune/backends/x.py", "from mctune.reference import memory_caching", False),
        ("mctune/runtime/x.py", "from mctune.backends import get_backend", False),
        ("mctune/study/x.py", "from mctune.emit import package", False),
        ("mctune/study/x.py", "from mctune import emit", False),
        ("mctune/workers/x.py", "from mctune.backends import get_backend", True),
        ("mctune/emit/x.py", "import mctune.study.study", False),
        ("mctune/runtime/x.py", "from .segments import Segments", True),
        ("mctune/runtime/x.py", "from ..core import problem", False),
        ("mctune/runtime/x.py", "import tvm", False),
        ("mctune/cli/x.py", "from mctune.emit import package", True),
        ("mctune/report/x.py", "import importlib\nimportlib.import_module('mctune.study.run')", False),
        ("templates/tvm/matrix/x.py", "from tvm.script import tirx", True),
        ("templates/tvm/matrix/x.py", "from mctune.core.config import Config", False),
        ("search_spaces/tvm/matrix/x.py", "from mctune.core.space import Pow2", True),
        ("search_spaces/tvm/matrix/x.py", "from mctune.core.work import work", False),
    ],
)  # fmt: skip
def test_the_rules_themselves(
    where: str, statement: str, fine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / where
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert all(allowed(imported) for imported in imports_of(path)) is fine
