"""A kernel that is watched: called on copies between fences, it must leave its inputs and what is beside them alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from mctune.backends.protocol import Kernel
from mctune.runtime.memory import LayerMemory
from mctune.verify.fences import FencedAllocations, Fences, map_tensors, named_tensors

Tensor = torch.Tensor
_COUNTS = ("cached", "filled", "dropped")
"""What a decode kernel leaves of a memory; all else of it is written in place."""


class Fault(Exception):
    """A kernel did what none may do, whatever it computes."""


@dataclass(frozen=True, eq=False)
class Arguments:
    """What one call of a kernel is given: by position (``names`` are theirs) and by keyword."""

    names: tuple[str, ...]
    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def run(self, kernel: Kernel) -> Any:
        """What ``kernel`` returns for them."""
        return kernel(*self.positional, **self.keywords)

    def named(self) -> dict[str, Any]:
        """All of them, by name."""
        return {**dict(zip(self.names, self.positional, strict=True)), **self.keywords}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by where it is."""
        return named_tensors(self.named())

    @cached_property
    def written(self) -> dict[str, Tensor]:
        """The tensors that a kernel may write to: those of a memory, its counts apart."""
        memories = {name for name, value in self.named().items() if isinstance(value, LayerMemory)}
        parts = {name: name.split(".") for name in self.tensors}
        names = [name for name, part in parts.items() if part[0] in memories and part[1] not in _COUNTS]
        return {name: self.tensors[name] for name in names}

    def copied(self, fences: Fences) -> Arguments:
        """Copies of them, each tensor between fences."""
        positional = tuple(
            map_tensors(fences.around, value, name) for name, value in zip(self.names, self.positional, strict=True)
        )
        keywords = {name: map_tensors(fences.around, value, name) for name, value in self.keywords.items()}
        return Arguments(self.names, positional, keywords)

    def restore(self, copy: Arguments) -> None:
        """Give what may have been written to in ``copy`` the values that it has here."""
        for name, x in copy.written.items():
            x.copy_(self.tensors[name])

    def overwritten(self, copy: Arguments) -> str | None:
        """The first tensor of ``copy``, where those that may be written to do not count, that has changed."""
        for name, x in self.tensors.items():
            if name not in copy.written and not same(copy.tensors[name], x):
                return f"it wrote to its input {name}"
        return None


def same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors have the same bits, NaN included."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if torch.equal(x, y):
        return True
    # NaN is equal to nothing; what is poisoned with it may stay so.
    return x.is_floating_point() and torch.equal(*(one.contiguous().view(torch.uint8) for one in (x, y)))


class Guarded:
    """``kernel``, watched.

    Raises:
        Fault: from a call that wrote to an input, or beside an array that it was given or that its launcher made.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        given = Arguments(POSITIONAL[len(positional)], positional, keywords)
        fences = Fences()
        copy = given.copied(fences)
        with FencedAllocations(fences):
            found = copy.run(self._kernel)
        if fault := fences.broken() or given.overwritten(copy):
            raise Fault(fault)
        copy.restore(given)
        return found


POSITIONAL = {4: ("q", "k", "v", "u"), 5: ("dy", "q", "k", "v", "u")}
"""What launchers are called with by position."""
