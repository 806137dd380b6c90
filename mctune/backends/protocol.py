"""What a backend does for the search: compile one configuration for a target, and run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.space import SearchSpace
from mctune.core.target import Target


@dataclass(frozen=True)
class Built:
    """The files of one compiled candidate: ``library`` is what was compiled, ``source`` what it came from."""

    library: Path
    source: Path
    parts: tuple[tuple[str, str], ...] = ()
    """(operation, file beside ``library``) of every module of a kernel that has several; ``library`` is one of them."""


Kernel = Any
"""What a launcher of ``mctune.runtime`` is called like, by pass: ``TvmForward``, ``TvmBackward`` or ``TvmDecode``."""


class Backend(Protocol):
    """One way to compile templates."""

    name: str

    def check(self, problem: Problem) -> None:
        """Refuse a problem that no template computes, with what works instead."""

    def ready(self) -> None:
        """Refuse a machine that lacks what compiling takes, with what to install."""

    def identity(self) -> dict[str, str]:
        """What its results depend on besides problem, configuration and target: versions, the templates' digest."""

    def space(self, problem: Problem) -> SearchSpace:
        """The parameters that the templates of ``problem`` take, without the segment length."""

    def build(self, problem: Problem, config: Config, target: Target, folder: Path) -> Built:
        """Render and compile into ``folder``; files are named by the configuration, the same one twice is kept."""

    def load(self, problem: Problem, config: Config, built: Built) -> Kernel:
        """The compiled candidate as a function of torch tensors."""
