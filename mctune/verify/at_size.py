"""A problem at the size that is timed: its arguments, and what a kernel must give for them.

The oracle goes token by token. Here the eager path computes the reference, in float32, a few heads at a time; tests
hold it to the oracle on small problems. The same arguments serve every candidate of a problem, so they are made once
and kept in a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mctune.backends.protocol import Kernel
from mctune.core.problem import Problem
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.eager.decode import decode
from mctune.runtime.eager.ends import end_states
from mctune.runtime.eager.forward import by_head, lay_out
from mctune.runtime.kernels.kept import ROWS, Names, make_kept
from mctune.runtime.memory import LayerMemory
from mctune.verify.decided import DRAWS, decided, gaps, means_of
from mctune.verify.guard import POSITIONAL, Arguments
from mctune.verify.inputs import Inputs, call_of, make_inputs
from mctune.verify.judge import written_whole
from mctune.verify.kept import rows_by, segments_of
from mctune.verify.passes import Results, empty_memory, gradients, gradients_of, left, options, wants

Tensor = torch.Tensor
_AT_ONCE = 1 << 26
"""Numbers of one array of the eager path, about: more heads than make so many are computed one after another."""
_GAP = 1e-4
"""Logits at the edge of ssc's choice are at least so far apart; float32 decides them."""


@dataclass(frozen=True)
class AtSize:
    """One problem, what its kernels are called with, and what they must give.

    Attributes:
        given: what a backward is given of its forward, by name; the tensors of a decode step's memory.
        wanted: the results, float32.
    """

    problem: Problem
    inputs: Inputs
    given: dict[str, Tensor]
    wanted: dict[str, Tensor]

    def to(self, device: str) -> AtSize:
        """The same on a device."""
        given, wanted = ({name: x.to(device) for name, x in one.items()} for one in (self.given, self.wanted))
        return AtSize(self.problem, self.inputs.to(device), given, wanted)

    def arguments(self) -> Arguments:
        """What a kernel is called with."""
        problem, inputs = self.problem, self.inputs
        rows: tuple[Tensor, ...] = (inputs.q, inputs.k, inputs.v, inputs.u)
        if problem.pass_ == "decode":
            last = slice(problem.T - 1, problem.T)
            rows = tuple(x[:, last].contiguous() for x in rows)
            memory = _memory(problem, self.given)
            own = {"segment_length": problem.segment_length, "memory": memory}
            return Arguments(POSITIONAL[4], rows, {**options(problem, inputs, last), **own})
        shared = {**options(problem, inputs), "segments": segments_of(problem, inputs)}
        if problem.pass_ == "forward":
            return Arguments(POSITIONAL[4], rows, {**shared, "keep": ()})
        return Arguments(POSITIONAL[5], (inputs.dy, *rows), {**shared, "kept": self.given})

    def results(self, found: Any, arguments: Arguments) -> Results:
        """By name what a kernel returned, and left in what it was called with."""
        match self.problem.pass_:
            case "forward":
                return {"y": found.y}
            case "backward":
                return gradients_of(found, self.inputs)
            case _:
                return {"y": found, **_after(self.problem, arguments.keywords["memory"])}


def at_size(kernel: Kernel, problem: Problem, seed: int, folder: Path) -> AtSize:
    """The case of ``problem`` at its own size, on the kernel's device; from a file in ``folder`` if it is there.

    To be called before a candidate has run in this process: the file serves those that follow.
    """
    names = wants(kernel, problem) if problem.pass_ == "backward" else ()
    digest = hashlib.sha256(f"{seed} {problem.key} {names}".encode()).hexdigest()[:16]
    file = folder / f"at_size_{digest}.pt"
    if not file.is_file():
        _save(make(problem, seed, names, kernel.device), file)
    return _load(problem, file).to(kernel.device)


def make(problem: Problem, seed: int, names: Names, device: str = "cpu") -> AtSize:
    """Draw the arguments, and compute what they must give; ``names``: what a backward is given of its forward."""
    # The tensors do not depend on how a row is cut into segments.
    drawn = problem.replace(segment_length=problem.T) if problem.segmentation == "constant" else problem
    inputs = make_inputs(drawn, seed).to(device)
    if problem.pass_ == "decode":
        return _make_decode(problem, inputs, seed)
    if problem.reads.sparse:
        inputs = decided(problem, inputs, seed, _GAP)
    if problem.pass_ == "forward":
        y = _joined([_forward(part, x) for part, x in _parts(problem, inputs)], problem)
        return AtSize(problem, inputs, {}, {"y": y})
    parts = list(_parts(problem, inputs))
    found = [gradients(_eager, part, x, torch.float32) for part, x in parts]
    wanted = {
        name: (_summed if name.removeprefix("d") in inputs.weights else _joined)([one[name] for one in found], problem)
        for name in found[0]
    }
    kept = [_kept(part, x, names) for part, x in parts] if names else []
    given = {name: _all_heads(name, [one[name] for one in kept], problem) for name in names}
    return AtSize(problem, inputs, given, wanted)


# --- a few heads at a time


def _parts(problem: Problem, inputs: Inputs) -> Iterator[tuple[Problem, Inputs]]:
    """The problem cut up by sequences and heads, in the order of heads; each part's arrays fit in memory."""
    wide = problem.Dk + problem.Dv + segments_of(problem, inputs).count * max(problem.E, 1)
    heads = max(1, min(problem.H, _AT_ONCE // (problem.T * wide)))
    while problem.H % heads:
        heads -= 1
    for row in range(problem.B):
        for head in range(0, problem.H, heads):
            rows, of = slice(row, row + 1), slice(head, head + heads)
            own = {name: getattr(inputs, name)[rows, :, of] for name in ("q", "k", "v", "u", "dy")}
            gates = {name: x[rows, :, of] for name, x in inputs.gates.items()}
            weights = {name: W[of] for name, W in inputs.weights.items()}
            yield problem.replace(B=1, H=heads), replace(inputs, **own, gates=gates, weights=weights)


def _joined(parts: list[Tensor], problem: Problem) -> Tensor:
    """[1, T, heads, ...] of each part as [B, T, H, ...]."""
    each = len(parts) // problem.B
    return torch.cat([torch.cat(parts[row * each : (row + 1) * each], 2) for row in range(problem.B)])


def _all_heads(name: str, parts: list[Tensor], problem: Problem) -> Tensor:
    """What a forward keeps, of each part, as it keeps it of all."""
    if name not in ROWS:
        return torch.cat(parts)
    return _joined([x.view(1, problem.T, -1, x.shape[1]) for x in parts], problem).flatten(0, 2)


def _summed(parts: list[Tensor], problem: Problem) -> Tensor:
    """The gradient of a layer, [heads, ...] of each part, as [H, ...]: all sequences share it."""
    each = len(parts) // problem.B
    rows = [torch.cat(parts[row * each : (row + 1) * each]) for row in range(problem.B)]
    return torch.stack(rows).sum(0)


def _eager(**arguments: Any) -> Tensor:
    return memory_caching(**arguments, backend="eager")


def _forward(problem: Problem, inputs: Inputs) -> Tensor:
    arguments = inputs.arguments(problem)
    with torch.no_grad():
        return _eager(**arguments | {name: arguments[name].float() for name in "qkvu"})


def _states(problem: Problem, inputs: Inputs) -> tuple[tuple[Tensor, ...], Tensor]:
    """End states, [heads, N, ...] a layer, and mean keys, [heads, N, Dk], of every segment, float32."""
    call = call_of(problem, inputs, slice(None), torch.float32, inputs.cu_seqlens)
    k, v = (by_head(x, torch.float32) for x in (call.k, call.v))
    with torch.no_grad():
        return end_states(call, lay_out(call), k, v).states, means_of(k, call.segments)


def _kept(problem: Problem, inputs: Inputs, names: Names) -> dict[str, Tensor]:
    """What a forward keeps of these heads."""
    states, means = _states(problem, inputs)
    u, k = (by_head(x, torch.float32) for x in (inputs.u, inputs.k))
    rows = rows_by(problem, inputs, names, torch.float32)
    return make_kept(names, states, means, u, k, problem.top_k, segments_of(problem, inputs), inputs.q.dtype, rows)


# --- decode: the last token, after a memory of random numbers


_MEMORY = ("states", "descriptors", "online", "key_sum", "last_key", "last_value", "start", "momentum")


def _make_decode(problem: Problem, inputs: Inputs, seed: int) -> AtSize:
    C, last = problem.segment_length or 1, slice(problem.T - 1, problem.T)
    cached, filled = divmod(problem.T - 1, C)
    for draw in range(DRAWS):
        given = _random_memory(problem, inputs, seed + draw)
        if not problem.reads.sparse or cached <= (problem.top_k or 1):
            break
        u = inputs.u[:, -1].float()
        logits = torch.einsum("bhd,bhnd->bhn", u, given["descriptors"][:, :, :cached])
        if float(gaps(logits, problem.top_k or 1).min()) >= _GAP:
            break
    if filled == 0 and problem.state_init == "independent":
        names = ("key_sum", "last_key", "last_value", "momentum", *(() if problem.deep else ("online",)))
        given |= {name: torch.zeros_like(x) for name, x in given.items() if name.partition(".")[0] in names}
    case = AtSize(problem, inputs, given, {})
    memory = _memory(problem, {name: x.clone() for name, x in given.items()})
    memory = replace(memory, initial=tuple(inputs.weights.values()))
    y = decode(call_of(problem, inputs, last, torch.float32), memory)
    assert y is not None
    return replace(case, wanted={"y": y, **{name: x.clone() for name, x in _after(problem, memory).items()}})


def _random_memory(problem: Problem, inputs: Inputs, seed: int) -> dict[str, Tensor]:
    """Tensors of a memory by name, those of a tuple numbered: ``states.0``. A deep memory's are near its layers."""
    generator = torch.Generator().manual_seed(seed)
    C = problem.segment_length or 1
    memory, found = empty_memory(problem, problem.B, -(-problem.T // C)), {}
    for name, x in memory.stores():
        field, _, number = name.partition(".")
        if field in _MEMORY:
            drawn = torch.randn(x.shape, generator=generator)
            if number and problem.deep:
                W = tuple(inputs.weights.values())[int(number)].cpu()
                W = W[:, None] if field == "states" else W
                drawn = W * (0.1 * drawn if field == "momentum" else 1 + 0.1 * drawn)
            found[name] = drawn.to(inputs.q.device)
    return found


def _memory(problem: Problem, given: dict[str, Tensor]) -> LayerMemory:
    """A memory of all tokens but the last, of these tensors."""
    stores: dict[str, Any] = {}
    for name, x in given.items():
        field, _, number = name.partition(".")
        stores[field] = (*stores.get(field, ()), x) if number else x
    memory = replace(empty_memory(problem, problem.B, 0), **stores)
    memory.advance(problem.T - 1, problem.segment_length or 1)
    return memory


def _after(problem: Problem, memory: LayerMemory) -> dict[str, Tensor]:
    """What a step leaves, without what it may leave as it was."""
    counted = replace(memory, cached=memory.cached.clone(), filled=memory.filled.clone())
    counted.advance(1, problem.segment_length or 1)
    return left(counted)


# --- in a file


def _save(case: AtSize, file: Path) -> None:
    with written_whole(file) as scratch:
        torch.save({"inputs": case.inputs.to_dict(), "given": case.given, "wanted": case.wanted}, scratch)


def _load(problem: Problem, file: Path) -> AtSize:
    # Mapped privately: what a candidate writes to it stays in its own process.
    values = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    return AtSize(problem, Inputs(**values["inputs"]), values["given"], values["wanted"])
