"""Kernels that are recorded instead of launched: what a call launches on a GPU, with what the assembler says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mctune.backends.protocol import Launch
from mctune.backends.triton.device import REGISTERS_PER_BLOCK, DoesNotFit
from mctune.backends.tvm.gpu.artefact import Artefact
from mctune.core.target import Target
from mctune.runtime.kernels.tvm.gpu.functions import Signature

_KINDS = {"ushort*": "fp16", "float*": "fp32", "int*": "i32"}
_ENTRY = re.compile(r"^\.visible \.entry (\w+)\(", re.MULTILINE)


@dataclass
class Recorder:
    """A kernel whose launches are appended to ``launches``; one that the target cannot hold is refused."""

    signature: Signature
    registers: int
    stack: int
    asm: str
    binary: bytes
    target: Target
    launches: list[Launch]
    operation: str = ""

    def __call__(self, grid: tuple[int, int, int], values: Mapping[str, Any]) -> None:
        """Record a launch.

        Raises:
            DoesNotFit: if a block takes more shared memory or registers than one of the target has.
        """
        threads, shared = self.signature.threads, self.signature.shared
        what = f"{self.signature.symbol} with {threads // 32} warps"
        if shared > self.target.shared_bytes:
            raise DoesNotFit(what, shared, self.target.shared_bytes, "B of shared memory").at(self.operation)
        if self.registers * threads > REGISTERS_PER_BLOCK:
            raise DoesNotFit(what, self.registers * threads, REGISTERS_PER_BLOCK, "registers").at(self.operation)
        numbers = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        self.launches.append(
            Launch(
                name=self.signature.symbol,
                grid=grid,
                num_warps=threads // 32,
                num_stages=1,
                warp_size=32,
                shared=shared,
                registers=self.registers,
                spills=self.stack,
                asm=self.asm,
                binary=self.binary,
                arguments=tuple(self._arguments(numbers)),
                values=tuple((name, value) for name, value in numbers.items()),
                operation=self.operation,
            )
        )

    def _arguments(self, numbers: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for name, kind in self.signature.parameters:
            if numbers.get(f"to_{name}", 1) == 0:
                continue  # something stands for what is not written
            yield name, f"*{_KINDS[kind]}" if kind.endswith("*") else {"int": "i32", "float": "fp32"}[kind]


def recorders(
    folder: Path, stems: Mapping[str, str], target: Target, launches: list[Launch]
) -> dict[str, dict[str, Recorder]]:
    """The kernels of each operation by name; ``stems``: the names of the operations' files."""
    found = {}
    for operation, stem in stems.items():
        artefact = Artefact(folder, stem)
        ptx = _functions(artefact.path(".ptx").read_text(encoding="utf-8"))
        binary = artefact.path(".cubin").read_bytes()
        found[operation] = {
            kernel["symbol"]: Recorder(
                Signature.of(kernel),
                kernel["registers"],
                kernel["stack"],
                ptx[kernel["symbol"]],
                binary,
                target,
                launches,
                operation,
            )
            for kernel in artefact.record()["kernels"]
        }
    return found


def _functions(ptx: str) -> dict[str, str]:
    """The PTX of each kernel, with what all of them begin with."""
    starts = list(_ENTRY.finditer(ptx))
    ends = [*(match.start() for match in starts[1:]), len(ptx)]
    head = ptx[: starts[0].start()] if starts else ""
    return {match[1]: head + ptx[match.start() : end] for match, end in zip(starts, ends, strict=True)}
