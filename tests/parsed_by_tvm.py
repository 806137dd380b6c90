"""Templates as TVM's own parser reads them: what their translation must give the same IR as."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tvm.script import from_source
from tvm.script import tirx as T
from tvm.script.parser._core import scan_macro, utils
from tvm.tirx.script.parser.entry import TIRInline

from mctune.backends.tvm import templates

_NAME = "mctune_templates"
_parsed: dict[str, Any] = {}


@contextmanager
def parsed_by_tvm() -> Iterator[None]:
    """Whatever is rendered inside goes through TVM's parser."""
    ours = _taken()
    sys.modules.update(_parsed)
    try:
        templates.templates_package()
        kernel = templates.importlib.import_module(f"{_NAME}.tvm.kernel")
        kernel.inline, kernel.emit, kernel.built = inline, lambda function: inline(function)(), built
        yield
    finally:
        _parsed.update(_taken())
        sys.modules.update(ours)


def _taken() -> dict[str, Any]:
    """The modules of templates that are loaded, which from now on are not."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == _NAME}


class _Inline(TIRInline):
    """``T.inline``, which finds the parser at work without the source of every frame on the stack."""

    def _find_parser_def(self) -> Any:
        frame: FrameType | None = sys._getframe()
        while frame is not None and self.parser_object_name not in frame.f_globals:
            frame = frame.f_back
        assert frame is not None
        return frame.f_globals[self.parser_object_name]


def inline(function: Callable[..., None]) -> Callable[..., None]:
    source, closed_over = scan_macro(function, utils.inspect_function_capture(function))
    found = _Inline(source, closed_over, function)

    def call(*arguments: Any, **named: Any) -> None:
        found(*arguments, **named)

    return call


def built(
    name: str, types: dict[str, Any], body: Callable[[dict[str, Any]], None], schedulable: bool, noalias: bool = True
) -> Any:
    def start(**named: Any) -> None:
        body(named)

    source = f"""
@script.prim_func(s_tir={schedulable})
def {name}({", ".join(f"{key}: types[{key!r}]" for key in types)}):
    script.func_attr({{"global_symbol": {name!r}, "tirx.noalias": {noalias}}})
    start({", ".join(f"{key}={key}" for key in types)})
"""
    return from_source(source, extra_vars={"script": T, "types": types, "start": start})
