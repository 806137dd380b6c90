"""What a forward keeps for the backward: what a forward candidate should keep, and what a backward one is given."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mctune.backends.protocol import Kernel
from mctune.core.problem import Problem
from mctune.reference import segment_states
from mctune.runtime.eager.forward import lay_out
from mctune.runtime.eager.rows import rows_of
from mctune.runtime.kernels.kept import CHOICE, ENDS, LOGITS, OF_SEGMENTS, ROWS, Names, left_by, make_kept, make_pairs
from mctune.runtime.segments import Segments, make_segments
from mctune.verify.inputs import Inputs, call_of

Tensor = torch.Tensor
OPTIONAL = "kept "


def segments_of(problem: Problem, inputs: Inputs) -> Segments:
    """Where the row of a problem is cut into segments."""
    return make_segments(problem.T, problem.segmentation, problem.segment_length or 1, inputs.cu_seqlens)


def oracle_states(problem: Problem, inputs: Inputs, tokens: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """The oracle's end state and mean key of every segment of the first ``tokens`` tokens: [B, N, H, ...]."""
    arguments = inputs.arguments(problem)
    options = {name: value for name, value in arguments.items() if name not in ("q", "u", "aggregation", "top_k")}
    for name in ("k", "v", *inputs.gates):
        options[name] = options[name][:, :tokens]
    with torch.no_grad():
        cache = segment_states(**options)
    return cache.states, cache.descriptors


def kept_by(problem: Problem, inputs: Inputs, names: Names) -> dict[str, Tensor]:
    """What a forward keeps, exact: from the oracle's states and mean keys."""
    if not names:
        return {}
    ends, by_segment = oracle_states(problem, inputs, problem.T)
    states, means = tuple(x.transpose(1, 2).flatten(0, 1) for x in ends), by_segment.transpose(1, 2).flatten(0, 1)
    u, k = (x.transpose(1, 2).flatten(0, 1).double() for x in (inputs.u, inputs.k))
    segments = segments_of(problem, inputs)
    rows = rows_by(problem, inputs, names, torch.float64)
    made = make_kept(names, states, means, u, k, problem.top_k, segments, inputs.q.dtype, rows)
    return {name: x.float() if x.dtype == torch.float64 else x for name, x in made.items()}


def rows_by(problem: Problem, inputs: Inputs, names: Names, dtype: torch.dtype) -> dict[str, Tensor]:
    """:data:`ROWS` as the eager path has it in ``dtype``, nothing unless one of ``names`` is of it."""
    if set(ROWS).isdisjoint(names):
        return {}
    call = call_of(problem, inputs, slice(None), dtype, inputs.cu_seqlens)
    return rows_of(call, lay_out(call))


# --- what a forward candidate keeps


def checked_names(kernel: Kernel, problem: Problem) -> Names:
    """What a forward candidate is asked to keep when it is verified: everything that it can keep and that has a use."""
    if problem.segmentation == "logarithmic":
        return ()
    # Without gates, operands are written only for pieces that a state enters.
    return tuple(name for name in sorted(kernel.gives) if problem.routed or name != "operand")


def expected(problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """What :func:`comparable` should have, by names that begin with :data:`OPTIONAL`: a candidate has some of them."""
    if problem.segmentation == "logarithmic":
        return {}
    names = left_by(problem.to_dict()) if problem.deep else (*ENDS["matrix"], "operand", "past")
    if problem.routed and not problem.deep:
        names += CHOICE if problem.reads.sparse else LOGITS
    return comparable(problem, inputs, kept_by(problem, inputs, names))


def comparable(problem: Problem, inputs: Inputs, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kept arrays in a form that has one right value: gates [heads, N, T] for logits and choices, zero if not read."""
    found = {name: kept[name] for name in (*OF_SEGMENTS, *ROWS, "lse") if name in kept}
    segments = segments_of(problem, inputs)
    if "chosen" in kept:
        chosen, lse, N = kept["chosen"].long(), kept["lse"], segments.count
        gates = lse.new_zeros(*lse.shape, N + 1)
        gates.scatter_(-1, chosen, (kept["picked"] - lse[..., None]).exp().masked_fill(chosen == N, 0.0))
        number = torch.tensor([s for s, (begin, end, _) in enumerate(segments.spans) for _ in range(begin, end)])
        number = number.to(lse.device).expand(lse.shape)[..., None]
        found["gates"] = gates.scatter(-1, number, (kept["own"] - lse).exp()[..., None])[..., :N].mT
        wrong = sum(int((kept[name] != x).sum()) for name, x in make_pairs(kept["chosen"], N).items())
        found["order"] = lse.new_full((1,), 1.0 + wrong)
    elif "logits" in kept:
        read = torch.zeros_like(kept["logits"], dtype=torch.bool)
        for s, (begin, end, first) in enumerate(segments.spans):
            read[:, first : s + 1, begin:end] = True
        found["gates"] = (kept["logits"] - kept["lse"][:, None]).exp().masked_fill(~read, 0.0)
    return {f"{OPTIONAL}{name}": x for name, x in found.items()}
