"""What ptxas says of a kernel's performance, for example that its matrix products are serialized.

Triton throws the assembler's log away. Here it is read while a kernel is compiled, and kept beside the kernel in
Triton's cache. For a kernel that was compiled elsewhere, ptxas runs once more on the PTX that is kept there.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = "ptxas_notes.json"
"""In the folder of a kernel's files, which are kept by a digest of all that they depend on, ptxas's version included."""
_NOTE = re.compile(r"\((C\d+)\) Potential Performance Loss: (.+)")
_WHERE = re.compile(r" (?:in|for) the function '[^']*'(?: in line \d+)?\s*$")


def notes_in(log: str) -> tuple[str, ...]:
    """The remarks in a log of ptxas, each once: the number, then the text without the function's name.

    Among them: C7503 to C7507, ``setmaxnreg`` ignored; C7509 to C7520, ``wgmma`` serialized.
    """
    found = [f"{code} {_WHERE.sub('', text).strip()}" for code, text in _NOTE.findall(log)]
    return tuple(dict.fromkeys(" ".join(note.split()) for note in found))


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """While this is active, what ptxas says of every kernel that Triton compiles is kept with the kernel."""
    from triton import knobs

    before = knobs.runtime.add_stages_inspection_hook

    def hook(*given: Any) -> tuple[str, str] | None:
        if not given:  # what it adds to the key of a kernel: nothing
            return before() if before is not None else ("", "")
        if before is not None:
            before(*given)
        stages = given[1]
        if "cubin" in stages:
            stages["cubin"] = _keeping(stages["cubin"])
        return None

    knobs.runtime.add_stages_inspection_hook = hook
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before


def notes_of(digest: str, ptx: str, metadata: Any) -> tuple[str, ...]:
    """What ptxas says of a kernel that Triton has in its cache as ``digest``; it need not run for one without wgmma.

    Args:
        metadata: the compiled kernel's, which has the options that it was compiled with.
    """
    from triton.backends.compiler import Language
    from triton.compiler.compiler import make_backend

    if "wgmma" not in ptx:
        return ()
    kept = _kept(digest)
    if kept is None:
        backend, stages = make_backend(metadata.target), {}
        backend.add_stages(stages, backend.parse_options(metadata._asdict()), Language.TRITON)
        _, kept = _logged(stages["cubin"], ptx, metadata._asdict())
        _keep(digest, kept)
    return kept


def _keeping(stage: Callable[[Any, Any], bytes]) -> Callable[[Any, Any], bytes]:
    """The stage that makes a cubin from PTX, and keeps what is said of it."""

    def keeping(ptx: Any, metadata: Any) -> bytes:
        if "wgmma" not in ptx:
            return stage(ptx, metadata)
        cubin, notes = _logged(stage, ptx, metadata)
        _keep(metadata["hash"], notes)
        return cubin

    return keeping


def _logged(stage: Callable[[Any, Any], bytes], ptx: Any, metadata: Any) -> tuple[bytes, tuple[str, ...]]:
    """The cubin, and what is said of it. Triton prints the log if it is told to."""
    from triton import knobs

    said, asked = io.StringIO(), knobs.nvidia.dump_ptxas_log
    done = False
    try:
        with knobs.nvidia.scope(), contextlib.redirect_stdout(said):
            knobs.nvidia.dump_ptxas_log = True
            cubin = stage(ptx, metadata)
        done = True
    finally:
        if asked or not done:
            print(said.getvalue(), end="")
    return cubin, notes_in(said.getvalue())


def _keep(digest: str, notes: tuple[str, ...]) -> None:
    """Atomically, as Triton writes its own files. Where the cache cannot be written, ptxas is asked again next time."""
    from triton.runtime.cache import get_cache_manager

    with contextlib.suppress(OSError):
        get_cache_manager(digest).put(json.dumps(notes), FILE, binary=False)


def _kept(digest: str) -> tuple[str, ...] | None:
    from triton.runtime.cache import get_cache_manager

    try:
        path = get_cache_manager(digest).get_file(FILE)
        return None if path is None else tuple(str(note) for note in json.loads(Path(path).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
