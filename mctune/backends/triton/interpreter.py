"""Triton's interpreter, spared what it repeats: at every call of a device function it patches all of triton.language.

That was more than a third of the time of a deep memory's backward kernels, whose walks call several in each step.
"""

from __future__ import annotations

import inspect
import os
from typing import Any


def quicken() -> None:
    """In a process that interprets, skip the patching of what a launch has patched already.

    Releases that patch otherwise are left as they are.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.language import core
    from triton.runtime import interpreter

    patch, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None or hasattr(patch, "always"):
        return

    def patch_once(fn: Any) -> Any:
        seen = [x for x in fn.__globals__.values() if inspect.ismodule(x) and x in (interpreter.tl, core)]
        # What is patched is no builtin any more; tensors are shared, and restored when a launch ends.
        builtins = [x for lang in seen for x in (lang.load, lang.tensor.__add__) if core.is_builtin(x)]
        return scope() if seen and not builtins else patch_once.always(fn)  # type: ignore[attr-defined]

    patch_once.always = patch  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_once
