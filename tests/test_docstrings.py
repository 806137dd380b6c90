"""What the API reference shows is complete, and its examples run."""

from __future__ import annotations

import ast
import doctest
import io
import re
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from mctune.core.toml import read_toml

ROOT = Path(__file__).resolve().parent.parent
PAGES = read_toml(ROOT / "docs" / "site" / "api.toml")
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "mctune").rglob("*.py"))}
Definition = ast.FunctionDef | ast.ClassDef


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@cache
def definitions(path: Path) -> list[Definition]:
    """Public classes and functions of a module."""
    nodes = [node for node in ast.parse(SOURCES[path]).body if isinstance(node, Definition)]
    return [node for node in nodes if not node.name.startswith("_")]


def objects() -> list[tuple[str, Definition]]:
    """Where each name of the list is defined, wherever that is now."""
    found = []
    for folder, _, name in (entry.rpartition("/") for page in PAGES.values() for entry in page.get("objects", ())):
        defines = re.compile(rf"^(?:class|def) {name}\b", re.MULTILINE).search
        homes = [path for path, text in SOURCES.items() if ROOT / "mctune" / folder in path.parents and defines(text)]
        found += [(dotted(path), node) for path in homes for node in definitions(path) if node.name == name]
    return found


def shown() -> list[tuple[str, Definition]]:
    """Everything that the reference shows."""
    patterns = [pattern for page in PAGES.values() for pattern in page.get("modules", ())]
    modules = [path for pattern in patterns for path in sorted((ROOT / "mctune").glob(pattern))]
    return objects() + [(dotted(path), node) for path in modules for node in definitions(path)]


def functions(node: Definition) -> list[ast.FunctionDef]:
    """A function, or the methods of a class that are public or make it."""
    if isinstance(node, ast.FunctionDef):
        return [node]
    methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
    return [method for method in methods if not method.name.startswith("_")]


def raised(function: ast.FunctionDef) -> set[str]:
    """The errors that its own statements raise."""
    calls = [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def test_every_name_of_the_list_is_defined_once() -> None:
    wanted = [entry.rpartition("/")[2] for page in PAGES.values() for entry in page.get("objects", ())]
    assert [node.name for _, node in objects()] == wanted


@pytest.mark.parametrize("module", [dotted(path) for path, text in SOURCES.items() if ">>> " in text])
def test_examples_run(module: str) -> None:
    loaded, said = import_module(module), io.StringIO()
    runner = doctest.DocTestRunner()
    with warnings.catch_warnings():
        # The warning that no kernel was tuned for these sizes.
        warnings.simplefilter("ignore")
        for example in doctest.DocTestFinder().find(loaded):
            runner.run(example, out=said.write)
    assert runner.summarize(verbose=False).attempted
    assert not runner.failures, said.getvalue()


@pytest.mark.parametrize(("module", "node"), objects(), ids=lambda x: getattr(x, "name", x))
def test_what_a_model_calls_has_an_example(module: str, node: Definition) -> None:
    assert "Examples:\n" in (ast.get_docstring(node) or "")


@pytest.mark.parametrize(("module", "node"), shown(), ids=lambda x: getattr(x, "name", x))
def test_docstrings_are_complete(module: str, node: Definition) -> None:
    assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"
    for function in functions(node):
        text = ast.get_docstring(function)
        assert text, f"{module}.{node.name}.{function.name} has no docstring"
        told = text.partition("Raises:\n")[2]
        missing = sorted(error for error in raised(function) if not re.search(rf"\b{error}\b", told))
        assert not missing, f"{module}.{node.name}.{function.name} raises {missing}, which its docstring does not say"
