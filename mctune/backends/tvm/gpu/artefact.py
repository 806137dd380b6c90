"""The files of one operation: machine code, what launches it, its CUDA C, and its PTX for the cost model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mctune.backends.kept import write_whole
from mctune.backends.tvm.gpu.nvrtc import Compiled
from mctune.backends.tvm.gpu.source import Source

ENDINGS = ("", ".cubin", ".cu")
"""What a package gets: of the operation ``NAME`` the parts ``NAME``, ``NAME.cubin`` and ``NAME.cu``."""


@dataclass(frozen=True)
class Artefact:
    """Files in a folder, of one name: ``.json`` last, so that whoever finds it finds all."""

    folder: Path
    stem: str

    def path(self, ending: str) -> Path:
        """One of them, by its ending."""
        return self.folder / f"{self.stem}{ending or '.json'}"

    @property
    def whole(self) -> bool:
        """Whether they are all there."""
        return self.path(".json").is_file()

    def parts(self, operation: str) -> Iterator[tuple[str, str]]:
        """(part, file name) of what a package gets."""
        for ending in ENDINGS:
            yield f"{operation}{ending}", self.path(ending).name

    def write(
        self, source: Source, compiled: Compiled, shared: dict[str, int], arch: str, about: dict[str, Any]
    ) -> None:
        """Write them, each whole."""
        kernels = [
            {
                "symbol": entry.symbol,
                "parameters": [list(parameter) for parameter in entry.parameters],
                "threads": entry.threads,
                "shared": shared[entry.symbol],
                "registers": compiled.resources[entry.symbol].registers,
                "stack": compiled.resources[entry.symbol].stack,
            }
            for entry in source.entries
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.path(".cubin").with_name(f"{self.stem}.cubin.new")
        scratch.write_bytes(compiled.cubin)
        scratch.replace(self.path(".cubin"))
        write_whole(self.path(".cu"), source.text)
        write_whole(self.path(".ptx"), compiled.ptx)
        write_whole(self.path(".json"), json.dumps({"arch": arch, **about, "kernels": kernels}, indent=1) + "\n")

    def record(self) -> dict[str, Any]:
        """What the JSON says."""
        found: dict[str, Any] = json.loads(self.path(".json").read_text(encoding="utf-8"))
        return found
