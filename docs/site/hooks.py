"""What the site shows besides ``docs/*.md``: the repository's other pages, the API reference, commands, results.

MkDocs calls ``on_config``, ``on_files`` and ``on_page_markdown``. Links from page to page are written as they work on
GitHub, between files of the repository; here they are turned into links within the site.
"""

from __future__ import annotations

import ast
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import mctune
from mctune.cli._main import group
from mctune.core.toml import read_toml
from mctune.report.page.write import pages
from mctune.study.importance import importance

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages outside ``docs`` that have a place in the menu."""
_LINK = re.compile(r"(?P<before>\]\()(?P<path>[^)#\s:]+)(?P<after>(?:#[^)\s]*)?\))")
_log = logging.getLogger("mkdocs.hooks.mctune")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The menu of the reference follows its list."""
    pages = [{page["title"]: f"reference/{name}.md"} for name, page in read_toml(HERE / "api.toml").items()]
    assert config.nav is not None
    config.nav.insert(-2, {"Reference": [*pages, {"Command line": "reference/cli.md"}]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and every file of the repository that a page links to."""
    for name, page in read_toml(HERE / "api.toml").items():
        files.append(File.generated(config, f"reference/{name}.md", content=_reference(page)))
    files.append(File.generated(config, "reference/cli.md", content=_command_line()))
    for path, page in pages(ROOT / "results", importance).items():
        files.append(File.generated(config, f"results/{path}", content=page))
    waiting = [*PAGES, *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    seen = set(waiting)
    while waiting:
        origin = waiting.pop()
        if not origin.startswith("docs/"):
            files.append(File.generated(config, _in_site(origin), content=_content(origin)))
        if not origin.endswith(".md"):
            continue
        for found in _LINK.finditer((ROOT / origin).read_text(encoding="utf-8")):
            target = _repository_path(origin, found["path"])
            if (ROOT / target).is_file() and target not in seen:
                seen.add(target)
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository as links between pages."""
    uri = page.file.src_uri
    if uri.startswith("reference/") or uri.endswith(".py.md"):
        return markdown
    origin = next((path for path, place in PAGES.items() if place == uri), None)
    origin = origin or (uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}")

    def place(found: re.Match[str]) -> str:
        target = _repository_path(origin, found["path"])
        if not (ROOT / target).is_file():
            return found[0]
        path = os.path.relpath(_in_site(target), PurePosixPath(uri).parent)
        return f"{found['before']}{path}{found['after']}"

    return _LINK.sub(place, markdown)


def _repository_path(origin: str, link: str) -> str:
    """Where a link of the file ``origin`` leads, from the repository's root."""
    return os.path.normpath(PurePosixPath(origin).parent / link)


def _in_site(path: str) -> str:
    """Where a file of the repository stands in the site: code as a page that shows it, ``docs`` at the root."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}.md" if path.endswith(".py") else f"repository/{path}"


def _content(path: str) -> str | bytes:
    file = ROOT / path
    if path.endswith(".py"):
        return f"# `{path}`\n\n````python\n{file.read_text(encoding='utf-8')}````\n"
    return file.read_bytes()


def _reference(page: dict[str, Any]) -> str:
    """One page of the API reference, from its entry in ``api.toml``."""
    parts = [f"# {page['title']}", page["text"]]
    for entry in page.get("objects", ()):
        module, name = _module_of(entry), PurePosixPath(entry).name
        short = "mctune" if name in mctune.__all__ else module
        options = "    options:\n      show_root_full_path: false"
        parts += [f"::: {module}.{name}\n{options}", f"`from {short} import {name}`"]
    for pattern in page.get("modules", ()):
        found = [path for path in sorted((ROOT / "mctune").glob(pattern)) if _public(path)]
        if not found:
            _log.warning("api.toml: no module with public names matches mctune/%s", pattern)
        parts += [f"::: {_dotted(path)}" for path in found]
    return "\n\n".join(parts) + "\n"


def _module_of(name: str) -> str:
    """The dotted name of the one module that defines ``name`` at its top level."""
    folder, short = PurePosixPath(name).parent, PurePosixPath(name).name
    found = [path for path in sorted((ROOT / "mctune" / folder).rglob("*.py")) if short in _defined(path)]
    if len(found) != 1:
        where = ", ".join(map(_dotted, found)) or "no module"
        _log.warning('api.toml: %s is defined by %s; write "folder/%s"', name, where, short)
    return _dotted(found[0]) if found else "mctune"


def _defined(path: Path) -> set[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _public(path: Path) -> bool:
    return any(not name.startswith("_") for name in _defined(path))


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _command_line() -> str:
    """What every command says under ``--help``."""
    parts = ["# Command line", "`mctune COMMAND --help` prints the same."]
    context = click.Context(group, info_name="mctune", terminal_width=100, **group.context_settings)
    for name in ("", *group.list_commands(context)):
        command = group.get_command(context, name) if name else group
        assert command is not None
        own = click.Context(command, info_name=name, parent=context) if name else context
        parts.append(f"## mctune {name}".rstrip() + f"\n\n```text\n{command.get_help(own)}\n```")
    return "\n\n".join(parts) + "\n"
