"""What is said of problems before they are searched: reads that take more work than attention would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mctune.core.problem import Problem
from mctune.core.workload import Case


def read_over_attention(problem: Problem) -> float:
    """Operations to read the memory of one past segment, over those of attention to its C tokens: P / (C (Dk + Dv)).

    P is the numbers of a state, Dk Dv or E (Dk + Dv): of a deep memory the ratio is E / C, whatever the widths. C of
    logarithmic segments is their mean.

    Examples:
        >>> read_over_attention(Problem(T=4096, H=4, Dk=128, Dv=128, recurrence="dla", segment_length=256))
        2.0
        >>> read_over_attention(Problem(T=4096, H=4, Dk=128, Dv=128, segment_length=256))
        0.25
    """
    state = sum(rows * columns for rows, columns in problem.layers)
    segment = problem.segment_length or problem.T / len(problem.spans())
    return state / (segment * (problem.Dk + problem.Dv))


def advice(cases: Iterable[Case]) -> tuple[str, ...]:
    """One line for each width and set of segment lengths at which dense reads of deep memories exceed attention.

    Examples:
        >>> fields = dict(T=4096, H=4, Dk=64, Dv=64, recurrence="dla")
        >>> (line,) = advice([Case.of(fields, (128, 256))])
        >>> print(line.partition(":")[0])
        a dense read of deep memories, E256, in segments of 128 tokens takes 2 times the work of attention
        >>> advice([Case.of(fields | {"aggregation": "ssc"}, (128, 256))])
        ()
    """
    return tuple(dict.fromkeys(line for case in cases for line in _of(case)))


def _of(case: Case) -> Iterator[str]:
    problem = case.problem
    if not problem.deep or problem.reads.sparse:
        return
    at = [problem.replace(segment_length=length) for length in case.segment_lengths]
    costly = [one for one in at if read_over_attention(one) > 1 and len(one.spans()) > 1]
    if costly:
        widths, E = problem.Dk + problem.Dv, problem.E
        lengths = [one.segment_length for one in costly]
        yield (
            f"a dense read of deep memories, E{E}, in segments of {_listed(lengths)} tokens takes "
            f"{_listed(f'{read_over_attention(one):.3g}' for one in costly)} times the work of attention: "
            f"2 E (Dk + Dv) = {2 * E * widths} operations a token and state, 2 C (Dk + Dv) = "
            f"{_listed(2 * (length or 0) * widths for length in lengths)} for attention to its segment; take "
            f"aggregation=ssc, or segments of at least E = {E} tokens"
        )


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
