"""mctune's kernels for `benchmarks/contact.py`: their configurations, their files, and the calls that go through them.

Nothing here needs more than torch, Triton and LibCST; without LibCST templates run as they are, which is real Python.
Everything is imported where it is used: Triton reads whether it interprets when it is imported.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mctune.backends.protocol import Built
    from mctune.core.config import Config
    from mctune.core.problem import Problem
    from mctune.core.target import Target

Tensor = torch.Tensor
Results = Mapping[str, Tensor]
AGGREGATIONS = ("grm", "residual", "ssc")
TOP_K = {"forward": 4, "backward": 4, "decode": 8}
BASE = "residual"
"""The recurrence alone: the states of independent segments, added up, are those of one long segment."""


@dataclass(frozen=True)
class Sizes:
    """What is computed: heads H of width D, segments of C tokens; T ``checked``, ``timed`` and ``long``; ``states``
    cached by a decoded token; ``repeats`` that must be bitwise equal."""

    D: int = 128
    C: int = 256
    H: int = 16
    checked: int = 4096
    timed: int = 16384
    long: int = 65536
    states: int = 64
    repeats: int = 20
    rounds: int = 15
    dtype: str = "bfloat16"

    def problem(self, pass_: str, aggregation: str, T: int | None = None) -> Problem:
        """The problem of one pass; a kernel does not depend on T."""
        from mctune.core.problem import Problem

        decode = pass_ == "decode"
        return Problem(
            pass_=pass_, aggregation=aggregation, T=T or (self.states * self.C + 1 if decode else self.timed), H=self.H,
            Dk=self.D, Dv=self.D, segment_length=self.C, dtype=self.dtype,
            top_k=TOP_K[pass_] if aggregation == "ssc" else None,
        )  # fmt: skip


SMALL = Sizes(D=16, C=16, H=1, checked=24, timed=24, long=40, states=2, repeats=2, rounds=1, dtype="float16")
"""For a rehearsal, which interprets."""


@dataclass(frozen=True)
class Kernels:
    """Rendered kernels of a target, in ``folder``, where other processes find them too."""

    folder: Path
    target: Target
    sizes: Sizes

    def config(self, problem: Problem) -> Config:
        """The default."""
        from mctune.verify.spread import default

        return default(problem, self.target)

    def is_built(self, problem: Problem, config: Config) -> bool:
        """Whether the files exist."""
        return self._note(problem, config).is_file()

    def _note(self, problem: Problem, config: Config) -> Path:
        return self.folder / f"{problem.pass_}_{problem.aggregation}_{problem.key}_{config.key}.built"

    def built(self, problem: Problem, config: Config) -> Built:
        """The files of a configuration: rendered here, or by another process before."""
        from mctune.backends.protocol import Built

        note = self._note(problem, config)
        try:
            found = json.loads(note.read_text())
        except (OSError, ValueError):
            built = self._build(problem, config)
            scratch = note.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps([str(built.library), str(built.source), built.parts]))
            scratch.replace(note)
            return built
        return Built(Path(found[0]), Path(found[1]), tuple((operation, file) for operation, file in found[2]))

    def _build(self, problem: Problem, config: Config) -> Built:
        from mctune.backends import get_backend

        try:
            # From the space of measured searches, which has more than a predicted one's.
            return get_backend("triton").measuring().build(problem, config, self.target, self.folder)
        except ModuleNotFoundError as error:
            if error.name != "libcst":
                raise
            return unrendered(problem, config, self.folder)

    def load(self, problem: Problem, config: Config) -> Any:
        """The launcher of a pass."""
        from mctune.backends import get_backend

        return get_backend("triton").load(problem, config, self.built(problem, config))

    def serve(self, *pairs: tuple[Problem, Config]) -> None:
        """From now on ``memory_caching(backend="triton")`` takes these and no others, in this process."""
        from mctune.runtime.kernels import dispatch
        from mctune.runtime.kernels.table import Entry, Table

        entries = []
        for problem, config in pairs:
            built = self.built(problem, config)
            record = built.record(problem, config)
            entries.append(Entry(problem.to_dict(), "triton", built.library, record))
        dispatch.TABLE = Table(tuple(entries), self.target.name)

    def pairs(self, aggregation: str, **changed: Config) -> tuple[tuple[Problem, Config], tuple[Problem, Config]]:
        """Forward and backward with their defaults, but for configurations that are given by pass."""
        problems = [self.sizes.problem(pass_, aggregation) for pass_ in ("forward", "backward")]
        forward, backward = ((problem, changed.get(problem.pass_) or self.config(problem)) for problem in problems)
        return forward, backward


def unrendered(problem: Problem, config: Config, folder: Path) -> Built:
    """The templates themselves, their parameters bound: what runs where nothing can be rendered."""
    import inspect

    from mctune.backends.protocol import Built
    from mctune.backends.triton.templates import operations, values
    from mctune.core.paths import templates_dir
    from mctune.runtime.kernels.triton.loader import load_parts

    folder.mkdir(parents=True, exist_ok=True)
    for path in (templates_dir() / "triton" / "matrix").glob("*.py"):
        scratch = folder / f"{path.name}.{os.getpid()}"
        scratch.write_text(path.read_text())
        scratch.replace(folder / path.name)
    parts = []
    for operation in operations(problem, config):
        template = load_parts(folder, {operation: f"{operation}.py"})[operation]
        bound = values(operation, problem, config)
        lines = ["from functools import partial", f"from . import {operation} as template"]
        for name, function in vars(template).items():
            if inspect.isfunction(function) and function.__module__ == template.__name__ and name[0] != "_":
                mine = {key: value for key, value in bound.items() if key in inspect.signature(function).parameters}
                lines.append(f"{name} = partial(template.{name}, **{mine!r})")
        file = f"{operation}_{config.key}_{problem.key}.py"
        (folder / file).write_text("\n".join(lines) + "\n")
        parts.append((operation, file))
    return Built(folder / parts[-1][1], folder / parts[-1][1], tuple(parts))


# --- calls


def through(data: Any, sizes: Sizes, aggregation: str, backend: str) -> Callable[[], Tensor]:
    """y of ``memory_caching`` for tensors with the fields q, k, v, u; gradients of those that want one flow."""
    from mctune.runtime.api.functional import memory_caching

    ssc = {"top_k": TOP_K["forward"]} if aggregation == "ssc" else {}
    u = None if aggregation == BASE else data.u
    return lambda: memory_caching(
        data.q, data.k, data.v, u, aggregation=aggregation, segment_length=sizes.C, backend=backend, **ssc
    )


@dataclass(frozen=True)
class Leaves:
    """Tensors of a training step, and what their gradients are called."""

    q: Tensor
    k: Tensor
    v: Tensor
    u: Tensor
    dy: Tensor
    names: tuple[str, ...]

    @classmethod
    def of(cls, data: Any, aggregation: str, dtype: torch.dtype | None = None) -> Leaves:
        """From random tensors, in ``dtype`` if one is given."""
        names = ("q", "k", "v") if aggregation == BASE else ("q", "k", "v", "u")
        found = {name: getattr(data, name).to(dtype or data.q.dtype) for name in ("q", "k", "v", "u", "dy")}
        return cls(**{name: x.detach().requires_grad_(name in names) for name, x in found.items()}, names=names)

    def gradients(self, y: Tensor, keep: bool = False) -> Results:
        """dq, dk, dv and, where gates are learned, du."""
        found = torch.autograd.grad(y, [getattr(self, name) for name in self.names], self.dy, retain_graph=keep)
        return {f"d{name}": gradient for name, gradient in zip(self.names, found, strict=True)}


def step_of(leaves: Leaves, sizes: Sizes, aggregation: str, backend: str) -> Callable[[], Results]:
    """y and the gradients of a training step."""
    forward = through(leaves, sizes, aggregation, backend)

    def step() -> Results:
        y = forward()
        return {"y": y.detach(), **leaves.gradients(y)}

    return step


UNDECIDED = 1e-3
"""Share of ssc's tokens that may differ: where two logits are closer than rounding, the other segment is right too."""


def error_of(found: Tensor, wanted: Tensor, aggregation: str) -> float:
    """RMS of the difference over that of what is wanted; inf where a result is NaN.

    Of ssc without the tokens, so few, at which two logits that tie to rounding may have changed places.
    """
    a, b = found.detach().float().flatten(0, -2), wanted.detach().float().flatten(0, -2)
    if not bool(a.isfinite().all()):
        return float("inf")
    off = (a - b).square().sum(-1)
    if aggregation == "ssc":
        kept = off.argsort()[: off.numel() - max(int(UNDECIDED * off.numel()), 1)]
        off, b = off[kept], b[kept]
    return float((off.sum() / b.square().sum()).sqrt())


def differing(first: Results, again: Results) -> dict[str, float]:
    """Names of the results that are not bitwise equal, and the share of elements that differ."""
    return {
        name: float((x.view(torch.uint8) != again[name].view(torch.uint8)).float().mean())
        for name, x in ((name, x.contiguous()) for name, x in first.items())
        if not torch.equal(x, again[name])
    }


def wrap(launcher: Any, note: Callable[[str, Sequence[Tensor]], None]) -> None:
    """Have ``note`` called after every host function of a launcher's modules, with its name and what it returned."""
    from types import ModuleType, SimpleNamespace

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            made = function(*args, **kwargs)
            note(name, [x for x in (made if isinstance(made, tuple) else (made,)) if isinstance(x, Tensor)])
            return made

        return run

    for attribute, value in list(vars(launcher).items()):
        if isinstance(value, ModuleType):
            public = {n: f for n, f in vars(value).items() if callable(f) and n[0] != "_" and not isinstance(f, type)}
            hosts = {n: wrapped(n, f) for n, f in public.items() if not hasattr(f, "fn")}
            setattr(launcher, attribute, SimpleNamespace(**{**vars(value), **hosts}))
        elif callable(value) and not isinstance(value, type):
            setattr(launcher, attribute, wrapped(attribute, value))
