"""What the oracle refuses, and the float64 form of what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mctune.core.errors import UsageError
from mctune.core.problem import AGGREGATIONS, RECURRENCES, Problem
from mctune.reference.memory import Memory
from mctune.reference.recurrence import ABSENT


@dataclass(frozen=True)
class Writes:
    """One sequence's keys, values and gates in float64; ``problem.T`` is its length."""

    problem: Problem
    k: Tensor
    v: Tensor
    gates: dict[str, Tensor]
    """Each gate [B, T, H, 1, 1], the absent ones filled in."""
    start: Memory
    """M_0, tensors [B, H, ...]: zero for a linear memory, the learned parameters for a deep one."""
    residual: bool
    bounds: tuple[int, ...]
    """Where sequences begin and end in the row: (0, T) unless packed."""

    def sequences(self) -> Iterator[tuple[slice, Writes]]:
        """Each sequence that has a token, with its place in the row; each is a problem of its own."""
        for begin, end in zip(self.bounds, self.bounds[1:], strict=False):
            if begin == end:
                continue
            place = slice(begin, end)
            segmentation = "constant" if self.problem.segmentation == "packed" else self.problem.segmentation
            yield (
                place,
                replace(
                    self,
                    problem=self.problem.replace(T=end - begin, segmentation=segmentation),
                    k=self.k[:, place],
                    v=self.v[:, place],
                    gates={name: gate[:, place] for name, gate in self.gates.items()},
                    bounds=(0, end - begin),
                ),
            )


def check_tensor(name: str, x: object, layout: str, shape: tuple[int | None, ...], like: Tensor) -> Tensor:
    """``x`` in float64, if it is a floating-point tensor on ``like``'s device; ``None`` in ``shape`` means any."""
    if not isinstance(x, Tensor):
        raise UsageError(f"{name} is {type(x).__name__}, not a torch.Tensor of shape {layout}; convert it")
    if not x.is_floating_point():
        raise UsageError(f"{name} has dtype {x.dtype}: must be floating point; convert it with {name}.float()")
    if x.device != like.device:
        raise UsageError(f"{name} is on {x.device} and k on {like.device}; move them to one device")
    if x.ndim != len(shape) or any(want not in (None, have) for want, have in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise UsageError(f"{name} has shape {tuple(x.shape)}: must be {layout} = ({wanted}); reshape or cut {name}")
    return x.to(torch.float64)


def check_writes(
    problem: dict[str, str | int | None],
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor | None],
    W_up: Tensor | None,
    W_down: Tensor | None,
    memory_residual: bool,
    cu_seqlens: Tensor | None,
) -> Writes:
    """Hold every argument of the write to its rules; ``problem`` has the fields of :class:`Problem` but the shapes.

    The call's own defaults fill every field, so those without a meaning in this problem are dropped here.
    """
    if problem["segmentation"] == "logarithmic":
        problem = {**problem, "segment_length": None}
    if problem["recurrence"] in RECURRENCES and not RECURRENCES[problem["recurrence"]].deep:
        problem = {**problem, "inner_chunk": None}
    if problem["aggregation"] in AGGREGATIONS and not AGGREGATIONS[problem["aggregation"]].sparse:
        problem = {**problem, "top_k": None}
    for name, x in (("k", k), ("v", v)):
        if isinstance(x, Tensor) and x.ndim != 4:
            raise UsageError(f"{name} has shape {tuple(x.shape)}: must be [B, T, H, D{name}]; reshape it")
    k64 = check_tensor("k", k, "[B, T, H, Dk]", (None,) * 4, k)
    B, T, H, Dk = k.shape
    v64 = check_tensor("v", v, "[B, T, H, Dv]", (B, T, H, None), k)
    Dv = v.shape[3]
    asked = Problem(**{**problem, "B": B, "T": T, "H": H, "Dk": Dk, "Dv": Dv})  # type: ignore[arg-type]
    return Writes(
        asked,
        k64,
        v64,
        {name: _gate(name, gate, asked, k) for name, gate in gates.items()},
        _start(asked, k64, W_up, W_down, memory_residual),
        asked.deep and memory_residual,
        _bounds(asked, cu_seqlens),
    )


def _gate(name: str, gate: Tensor | None, problem: Problem, k: Tensor) -> Tensor:
    shape = problem.B, problem.T, problem.H
    if gate is None:
        return torch.full((*shape, 1, 1), ABSENT[name], dtype=torch.float64, device=k.device)
    if name not in problem.writes.gates:
        takers = " and ".join(recurrence for recurrence, row in RECURRENCES.items() if name in row.gates)
        raise UsageError(f"recurrence={problem.recurrence!r} takes no {name}, which belongs to {takers}; leave it out")
    checked = check_tensor(name, gate, "[B, T, H]", shape, k)
    if name == "g" and not bool((checked <= 0).all()):
        raise UsageError(
            f"g reaches {float(checked.max()):g}: it is the logarithm of a decay, at most 0; pass for example "
            "torch.nn.functional.logsigmoid(x)"
        )
    return checked[..., None, None]


def _start(problem: Problem, k: Tensor, W_up: Tensor | None, W_down: Tensor | None, residual: bool) -> Memory:
    B, H, Dk, Dv = problem.B, problem.H, problem.Dk, problem.Dv
    given = {"W_up": W_up, "W_down": W_down}
    if not problem.deep:
        for name, W in given.items():
            if W is not None:
                raise UsageError(
                    f"recurrence={problem.recurrence!r} takes no {name}: its memory is a matrix that starts at zero; "
                    "leave it out, or use recurrence='dla' or 'titans'"
                )
        return (k.new_zeros(B, H, Dk, Dv),)
    for name, W in given.items():
        if W is None:
            raise UsageError(
                f"recurrence={problem.recurrence!r} needs {name}, the memory that segments start from; pass "
                "W_up [H, Dk, E] and W_down [H, E, Dv]"
            )
    if residual and Dk != Dv:
        raise UsageError(
            f"memory_residual=True adds the input of width Dk={Dk} to the output of width Dv={Dv}: they must be equal; "
            "pass memory_residual=False, or choose Dk = Dv"
        )
    up = check_tensor("W_up", W_up, "[H, Dk, E]", (H, Dk, None), k)
    down = check_tensor("W_down", W_down, "[H, E, Dv]", (H, up.shape[2], Dv), k)
    return up.expand(B, *up.shape), down.expand(B, *down.shape)


def _bounds(problem: Problem, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    if problem.segmentation != "packed":
        if cu_seqlens is not None:
            raise UsageError(
                f"cu_seqlens with segmentation={problem.segmentation!r}: use segmentation='packed', or leave it out"
            )
        return 0, problem.T
    if cu_seqlens is None:
        raise UsageError("segmentation='packed' needs cu_seqlens, int32 [S+1]: where each sequence begins, then T")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1:
        found = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else repr(cu_seqlens)
        raise UsageError(f"cu_seqlens is {found}: must be a tensor, int32 [S+1]; convert it with .to(torch.int32)")
    bounds = tuple(int(bound) for bound in cu_seqlens.tolist())
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != problem.T or list(bounds) != sorted(bounds):
        raise UsageError(
            f"cu_seqlens={list(bounds)}: must begin at 0, never decrease and end at T={problem.T}; pass the running "
            "sum of the sequences' lengths, with a 0 before it"
        )
    return bounds
