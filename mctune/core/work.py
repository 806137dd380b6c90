"""How much work a problem is: operations, bytes, and the time that no implementation on a target can beat.

Per token and head, for a matrix-valued memory (a multiply-add counts 2), in the s-th segment of its sequence:

    state update                               2 Dk Dv
    online, intra-chunk, causal half           (BT + 1) (Dk + Dv)
    online, entering state                     2 Dk Dv      (independent: none in a segment's first chunk)
    cached read: grm, soup                     2 (s - 1) Dk Dv
                 ssc                           2 min(top_k, s - 1) Dk Dv
                 residual, mean                2 Dk Dv for s > 1, and Dk Dv additions a later segment: their weights are
                                               the same for all cached states, so the sum of the states is read
    gate logits: grm, soup, ssc                2 s Dk       (residual and mean have none)

The sums run over the segments as they are, short ones included. SWLA (Eq. 26-27) counts like linear: its decays and
strengths scale rows, which is not matrix work. A backward pass is twice the forward and one recomputed forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from mctune.core.errors import UsageError
from mctune.core.problem import Problem

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_GATE_BYTES = 4
_STATE_BYTES = 4


@dataclass(frozen=True)
class Work:
    """How much a problem needs.

    Attributes:
        operations: floating-point operations; a multiply-add counts 2.
        bytes: the fewest bytes to and from memory.
        parts: operations by name.
        chunk: BT, tokens of a chunk that the count is for.
    """

    operations: int
    bytes: int
    parts: tuple[tuple[str, int], ...]
    chunk: int


def work(problem: Problem, chunk: int | None = None) -> Work:
    """Count the operations and the fewest bytes of ``problem``, by the table at the head of this module.

    Bytes: q, k, v, u (where there are logits) and SWLA's gates read once, y written once, every state that a later
    segment reads written once and read once, as if one read served every tile. A backward pass reads dy too, writes
    the gradients of its inputs and does to the states' gradients what it does to the states. ``decode`` is one step at
    context T: the online state read and written, the cached states and descriptors that it needs read once.

    Args:
        problem: with a matrix memory.
        chunk: BT in tokens; ``None`` is the divisor of the segment length with the fewest operations.

    Raises:
        UsageError: for dla and titans, whose deep memories are not counted, and for a chunk below 1.

    Examples:
        >>> counted = work(Problem(T=4096, H=8, Dk=64, Dv=64, segment_length=256))
        >>> counted.operations, dict(counted.parts)["cached read"], counted.bytes
        (2593128448, 2013265920, 45875200)
    """
    if problem.deep:
        raise UsageError(
            f"no work count for recurrence={problem.recurrence!r}: counts cover matrix-valued memories, linear and swla"
        )
    if chunk is not None and chunk < 1:
        raise UsageError(f"chunk={chunk}: must be at least 1")
    if problem.pass_ == "decode":
        return _decode(problem)
    candidates = [chunk] if chunk else _divisors(max(end - begin for begin, end in problem.spans()))
    counted = {size: _forward_parts(problem, size) for size in candidates}
    best = min(counted, key=lambda size: sum(counted[size].values()))
    parts = counted[best]
    if problem.pass_ == "backward":
        parts = {name: 3 * count for name, count in parts.items()}
    return Work(sum(parts.values()), _bytes(problem), tuple(parts.items()), best)


def bound(counted: Work, matrix_rate: float, bandwidth: float) -> float:
    """The least time that the work can take, in seconds: max(operations / matrix_rate, bytes / bandwidth).

    Args:
        counted: the work.
        matrix_rate: operations/s of matrix products.
        bandwidth: bytes/s of memory.

    Examples:
        >>> bound(Work(2_000_000, 1_000_000, (), 64), matrix_rate=1e12, bandwidth=1e12)
        2e-06
    """
    return max(counted.operations / matrix_rate, counted.bytes / bandwidth)


def attention_operations(problem: Problem) -> int:
    """Operations of causal softmax attention at the same shape, for comparison: T (Dk + Dv) per token and head."""
    return problem.B * problem.H * problem.T * problem.T * (problem.Dk + problem.Dv)


def cached_states(problem: Problem) -> int:
    """Number of segments of one sequence, each of which leaves one state per head."""
    return len(problem.spans())


def cached_state_bytes(problem: Problem) -> int:
    """Bytes of the cache after T tokens, all heads and batches: float32 states, and the segments' mean keys where the
    aggregation needs them (Eq. 10). A deep memory's state is its W_up and W_down."""
    state = problem.E * (problem.Dk + problem.Dv) if problem.deep else problem.Dk * problem.Dv
    descriptor = problem.Dk if problem.routed else 0
    return problem.B * problem.H * cached_states(problem) * (state + descriptor) * _STATE_BYTES


def _forward_parts(problem: Problem, chunk: int) -> dict[str, int]:
    """Operations of one forward pass by part."""
    heads, matrix, rows = problem.B * problem.H, problem.Dk * problem.Dv, problem.Dk + problem.Dv
    intra = entering = cached = logits = 0
    for past, (begin, end) in enumerate(problem.spans()):
        length = end - begin
        full, rest = divmod(length, chunk)
        intra += (full * chunk * (chunk + 1) + rest * (rest + 1)) * rows
        entering += 2 * matrix * (length - min(chunk, length) if problem.state_init == "independent" else length)
        cached += _cached_read(problem, past, length)
        logits += 2 * (past + 1) * problem.Dk * length if problem.routed else 0
    parts = {
        "state update": 2 * matrix * problem.T,
        "intra-chunk": intra,
        "entering state": entering,
        "cached read": cached,
        "gate logits": logits,
    }
    return {name: heads * count for name, count in parts.items()}


def _cached_read(problem: Problem, past: int, tokens: int) -> int:
    """Operations of ``tokens`` tokens that read ``past`` cached states of one head."""
    matrix = problem.Dk * problem.Dv
    if not problem.routed:
        return matrix * (2 * tokens + 1) if past else 0
    read = min(problem.top_k, past) if problem.top_k else past
    return 2 * read * matrix * tokens


def _decode(problem: Problem) -> Work:
    """One step at context T: all but the last segment are cached."""
    heads, matrix, past = problem.B * problem.H, problem.Dk * problem.Dv, cached_states(problem) - 1
    gated = problem.routed
    read = min(problem.top_k, past) if problem.top_k else past
    parts = {
        "state update": 2 * matrix,
        "online read": 2 * matrix,
        # One token reads each state once: the cache keeps no running sum of the states.
        "cached read": 2 * read * matrix,
        "gate logits": 2 * (past + 1) * problem.Dk if gated else 0,
    }
    state_bytes = _STATE_BYTES * ((2 + read) * matrix + (past * problem.Dk if gated else 0))
    total = heads * (_token_bytes(problem) + state_bytes)
    return Work(heads * sum(parts.values()), total, tuple((n, heads * c) for n, c in parts.items()), 1)


def _token_bytes(problem: Problem) -> int:
    """Bytes of q, k, v, u, y and the gates of one token and head."""
    size = _BYTES[problem.dtype]
    keys = 3 if problem.routed else 2
    gates = len(problem.writes.gates)
    return size * (keys * problem.Dk + 2 * problem.Dv) + gates * _GATE_BYTES


def _bytes(problem: Problem) -> int:
    """Fewest bytes of a whole-sequence pass."""
    heads = problem.B * problem.H
    states = heads * (cached_states(problem) - 1) * problem.Dk * problem.Dv * _STATE_BYTES * 2
    tokens = heads * problem.T * _token_bytes(problem)
    if problem.pass_ == "forward":
        return tokens + states
    # In: q, k, v, u, the gates and dy; out: their gradients. That is twice a forward's rows, less one y.
    dy = heads * problem.T * problem.Dv * _BYTES[problem.dtype]
    return 2 * tokens - dy + 2 * states


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
