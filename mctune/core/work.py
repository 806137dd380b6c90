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

For a deep memory of P = E (Dk + Dv) parameters, in inner chunks of b tokens (Eq. 30-31 and 34-36):

    gradients: k W_up, e W_down^T              2 P          (titans: and the output that is compared with v, 2 E Dv)
    state update, both layers                  2 P
    online, intra-chunk, causal half           (b + 1) (Dk + 2 E + Dv)
    online, entering state                     2 P          (a segment starts from weights, not from zero)
    cached read: grm, soup, residual           2 (s - 1) P  (a sum of MLPs is no MLP: residual reads every state)
                 ssc                           2 min(top_k, s - 1) P
                 mean                          2 P for s > 1, and P additions a later segment: it mixes parameters
    gate logits                                as above

The sums run over the segments as they are, short ones included. SWLA (Eq. 26-27) counts like linear: its decays and
strengths scale rows, which is not matrix work; nor are gelu and the decays of titans, whose momentum is a matter of
coefficients inside a segment. A backward pass is twice the forward and one recomputed forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

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
        chunk: BT or b, tokens of a chunk that the count is for; 1 for a decode step.
    """

    operations: int
    bytes: int
    parts: tuple[tuple[str, int], ...]
    chunk: int


@lru_cache(maxsize=1024)
def work(problem: Problem, chunk: int | None = None) -> Work:
    """Count the operations and the fewest bytes of ``problem``, by the table at the head of this module.

    Bytes: q, k, v, u (where there are logits) and the gates read once, y written once, every state that a later segment
    reads written once and read once, as if one read served every tile; a deep memory's W_up and W_down read once. A
    backward pass reads dy too, writes the gradients of its inputs and does to the states' gradients what it does to the
    states. ``decode`` is one step at context T: the online state read and written (and titans' momentum), the cached
    states and descriptors that it needs read once; of a deep memory also the state at the inner chunk's start.

    Args:
        problem: what is to be computed.
        chunk: BT in tokens; ``None`` is the divisor of the segment length with the fewest operations. The chunks of a
            deep memory are its inner chunks, which are part of the problem.

    Raises:
        UsageError: for a chunk below 1, or another one than a deep memory's inner chunk.

    Examples:
        >>> counted = work(Problem(T=4096, H=8, Dk=64, Dv=64, segment_length=256))
        >>> counted.operations, dict(counted.parts)["cached read"], counted.bytes
        (2593128448, 2013265920, 45875200)
    """
    if chunk is not None and chunk < 1:
        raise UsageError(f"chunk={chunk}: must be at least 1")
    if problem.deep and chunk not in (None, problem.inner_chunk):
        raise UsageError(
            f"chunk={chunk} with inner_chunk={problem.inner_chunk}: a deep memory is counted in its inner chunks, "
            "which are part of the problem; leave chunk out"
        )
    if problem.pass_ == "decode":
        return _decode(problem)
    chunk = problem.inner_chunk if problem.deep else chunk
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
    descriptor = problem.Dk if problem.routed else 0
    return problem.B * problem.H * cached_states(problem) * (_parameters(problem) + descriptor) * _STATE_BYTES


def _parameters(problem: Problem) -> int:
    """Numbers of one state of one head: Dk Dv, or P = E (Dk + Dv)."""
    return sum(rows * columns for rows, columns in problem.layers)


def _forward_parts(problem: Problem, chunk: int) -> dict[str, int]:
    """Operations of one forward pass by part."""
    heads, state = problem.B * problem.H, _parameters(problem)
    rows = sum(width for layer in problem.layers for width in layer)
    starts_from_zero = problem.state_init == "independent" and not problem.deep
    intra = entering = cached = logits = 0
    for past, (begin, end) in enumerate(problem.spans()):
        length = end - begin
        full, rest = divmod(length, chunk)
        intra += (full * chunk * (chunk + 1) + rest * (rest + 1)) * rows
        entering += 2 * state * (length - min(chunk, length) if starts_from_zero else length)
        cached += _cached_read(problem, past, length)
        logits += 2 * (past + 1) * problem.Dk * length if problem.routed else 0
    parts = {
        **({"gradients": _gradients(problem) * problem.T} if problem.deep else {}),
        "state update": 2 * state * problem.T,
        "intra-chunk": intra,
        "entering state": entering,
        "cached read": cached,
        "gate logits": logits,
    }
    return {name: heads * count for name, count in parts.items()}


def _gradients(problem: Problem) -> int:
    """Operations of a deep memory's error rows, one token of one head."""
    compared = 2 * problem.E * problem.Dv if problem.writes.momentum else 0
    return 2 * _parameters(problem) + compared


def _cached_read(problem: Problem, past: int, tokens: int) -> int:
    """Operations of ``tokens`` tokens that read ``past`` cached states of one head."""
    state = _parameters(problem)
    if not problem.routed and (problem.reads.mixes_parameters or not problem.deep):
        return state * (2 * tokens + 1) if past else 0
    read = min(problem.top_k, past) if problem.top_k else past
    return 2 * read * state * tokens


def _decode(problem: Problem) -> Work:
    """One step at context T: all but the last segment are cached."""
    heads, state, past = problem.B * problem.H, _parameters(problem), cached_states(problem) - 1
    gated = problem.routed
    read = min(problem.top_k, past) if problem.top_k else past
    parts = {
        **({"gradients": _gradients(problem)} if problem.deep else {}),
        "state update": 2 * state,
        "online read": 2 * state,
        # One token reads each state once: the cache keeps no running sum of the states.
        "cached read": 2 * read * state,
        "gate logits": 2 * (past + 1) * problem.Dk if gated else 0,
    }
    # Read and written: the online state and the momentum. One of the two: the state at the inner chunk's start.
    online = 2 + problem.deep + 2 * problem.writes.momentum
    state_bytes = _STATE_BYTES * ((online + read) * state + (past * problem.Dk if gated else 0))
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
    states = heads * (cached_states(problem) - 1) * _parameters(problem) * _STATE_BYTES * 2
    if problem.deep:
        states += problem.H * _parameters(problem) * _STATE_BYTES  # the weights, which a backward writes gradients of
    tokens = heads * problem.T * _token_bytes(problem)
    if problem.pass_ == "forward":
        return tokens + states
    # In: q, k, v, u, the gates and dy; out: their gradients. That is twice a forward's rows, less one y.
    dy = heads * problem.T * problem.Dv * _BYTES[problem.dtype]
    return 2 * tokens - dy + 2 * states


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
