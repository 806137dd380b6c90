"""Triton's interpreter, spared what it does for nothing.

At every call of a device function it patches all of triton.language: more than a third of the time of a deep memory's
backward kernels, whose walks call several in each step. At every sum and product of integers it computes whether they
overflow, for an assertion that it drops: a third of a decode step. For every value it makes the table of what NumPy
calls each type.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from functools import lru_cache
from typing import Any


def quicken() -> None:
    """In a process that interprets, skip all that. Releases that go about it otherwise are left as they are."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    _patch_once(interpreter)
    _name_once(interpreter)
    _ask_nothing(getattr(interpreter, "interpreter_builder", None))


def _ask_nothing(builder: Any) -> None:
    """Do not compute whether integers overflow where nobody would be told."""
    options: Any = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _patch_once(interpreter: Any) -> None:
    """Skip the patching of what a launch has patched already."""
    from triton.language import core

    patch, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None or hasattr(patch, "always"):
        return

    @lru_cache(maxsize=1024)
    def languages(fn: Any) -> list[Any]:
        """The modules of triton.language that a function sees."""
        return [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (interpreter.tl, core)]

    def patch_once(fn: Any) -> Any:
        seen = languages(fn)
        # What is patched is no builtin any more; tensors are shared, and restored when a launch ends.
        builtins = [x for lang in seen for x in (lang.load, lang.tensor.__add__) if core.is_builtin(x)]
        return scope() if seen and not builtins else patch_once.always(fn)  # type: ignore[attr-defined]

    patch_once.always = patch  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_once


def _name_once(interpreter: Any) -> None:
    """Keep what NumPy calls a type."""
    name_of = getattr(interpreter, "_get_np_dtype", None)
    if name_of is None or hasattr(name_of, "always"):
        return
    known: dict[str, Any] = {}

    def name_once(type_: Any) -> Any:
        scalar = type_.scalar.name  # of a block, that of its elements
        if scalar not in known:
            known[scalar] = name_of(type_)
        return known[scalar]

    name_once.always = name_of  # type: ignore[attr-defined]
    interpreter._get_np_dtype = name_once
