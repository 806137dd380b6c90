"""What ptxas reports about a kernel's performance, for example that its matrix products are serialized.

Triton throws the assembler's log away. Here it is read while a kernel is compiled, which costs nothing, and kept beside
the kernel in Triton's cache. For one that was compiled by something else ptxas runs once more, on the PTX in the cache.
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
"""In the folder of a kernel's files, named by a digest of all that they depend on, ptxas's version included."""
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
    """While this is active, what ptxas says of every kernel that Triton compiles is kept with the kernel.

    Triton's hook for stages would do, but where it is set kernels get other keys.
    """
    from triton.backends.nvidia.compiler import CUDABackend

    make = CUDABackend.make_cubin

    def make_cubin(self: Any, ptx: str, metadata: Any, *rest: Any) -> bytes:
        if "wgmma" not in ptx:
            cubin: bytes = make(self, ptx, metadata, *rest)
            return cubin
        cubin, notes = _logged(lambda: make(self, ptx, metadata, *rest))
        _keep(metadata["hash"], notes)
        return cubin

    CUDABackend.make_cubin = make_cubin
    try:
        yield
    finally:
        CUDABackend.make_cubin = make


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
        backend, options = make_backend(metadata.target), metadata._asdict()
        stages: dict[str, Callable[[str, Any], bytes]] = {}
        backend.add_stages(stages, backend.parse_options(options), Language.TRITON)
        _, kept = _logged(lambda: stages["cubin"](ptx, options))
        _keep(digest, kept)
    return kept


def _logged(make: Callable[[], bytes]) -> tuple[bytes, tuple[str, ...]]:
    """The cubin, and what is said of it. The log is still printed for who asks Triton for it, and where ptxas fails."""
    from triton import knobs

    said, shown = io.StringIO(), True
    try:
        with knobs.nvidia.scope(), contextlib.redirect_stdout(said):
            asked, knobs.nvidia.dump_ptxas_log = knobs.nvidia.dump_ptxas_log, True
            cubin = make()
        shown = asked
    finally:
        if shown:
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
