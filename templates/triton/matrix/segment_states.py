"""States of linear and SWLA memories at the end of every piece, and the mean keys of segments (Eq. 2, 9, 26-27).

    linear: M_t = M_{t-1} + k_t^T v_t          SWLA: M_t = e^{g_t} M_{t-1} + beta_t k_{t-1}^T v_{t-1} + lam_t k_t^T v_t

Inside a piece, with cum_t the sum of g up to t, the memory at t is sum_j w_tj k_j^T v_j + e^{cum_t} (what entered):

    w_tt = now_t = lam_t        w_tj = after_j e^{cum_t - cum_{j+1}},  after_j = lam_j e^{g_{j+1}} + beta_{j+1}    j < t

and the token before the piece writes once more, with the strength before = beta of the piece's first token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import Decays, Dims, Spans, States, Tables, load_rows


@triton.jit(do_not_specialize=["T", "H", "P"])
def decays_kernel(g, beta, lam, begin, end, entering, made, T, H, P, PIECE: tl.constexpr):
    """One program: a piece of a head."""
    piece = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    start = tl.load(begin + piece)
    stop = tl.load(end + piece)
    t = start + tl.arange(0, PIECE)
    here = t < stop
    more = t + 1 < stop
    place = (bh // H * T + t) * H + bh % H
    line = bh * T + t
    tl.store(made.cum + line, tl.cumsum(tl.load(g + place, mask=here, other=0.0), 0), mask=here)
    strength = tl.load(lam + place, mask=here, other=0.0)
    tl.store(made.now + line, strength, mask=here)
    decay = tl.exp(tl.load(g + place + H, mask=more, other=0.0))
    again = tl.load(beta + place + H, mask=more, other=0.0)
    tl.store(made.after + line, tl.where(more, strength * decay + again, 0.0), mask=here)
    enters = tl.load(entering + piece) >= 0
    first = tl.load(beta + (bh // H * T + start) * H + bh % H)
    tl.store(made.before + bh * P + piece, tl.where(enters, first, 0.0))


@triton.constexpr_function
def rows_of_ones():
    """That keys are added up by: as many as products take where the program goes on meanwhile (sm_90, sm_100), else 1.

    Keys that a sum and such a product read get a buffer too few in a pipeline (triton #6691), so that there the sum is
    a product as well. Where there is no GPU to ask it is, too.
    """
    target = tl.target_info
    if target.is_cuda():
        return 64 if target.cuda_capability_geq(9) and not target.cuda_capability_geq(12) else 1
    return 1 if target.is_hip() else 64


@triton.jit
def add_keys(total, k_t):
    """``total [ROWS, BK]``, every row of it the sum of the keys before ``k_t [BT, BK]``, and those."""
    if total.shape[0] == 1:
        return total + tl.sum(k_t.to(tl.float32), 0)[None, :]
    else:
        return tl.dot(tl.full([total.shape[0], k_t.shape[0]], 1.0, k_t.dtype), k_t, total)


@triton.jit
def _left(cum, now, after, t, stop, cum_end):
    """Weights of the writes ``t`` of a piece in its end state."""
    cum_next = tl.load(cum + t + 1, mask=t + 1 < stop, other=0.0)
    left = tl.load(after + t, mask=t < stop, other=0.0) * tl.exp(cum_end - cum_next)
    return tl.where(t + 1 < stop, left, tl.load(now + t, mask=t < stop, other=0.0))


@triton.jit(do_not_specialize=["T", "H", "P"])
def local_kernel(
    k, v, decayed, spans, made, T, H, P,
    SWLA: tl.constexpr, PRECISION: tl.constexpr, dims: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """One program: a block of what one piece of a head writes; those of the first value columns add up the keys too.

    Of ``made`` it writes what is not None; means are those of pieces.
    """
    BLOCKS: tl.constexpr = (dims.SV + BV - 1) // BV
    KEYS: tl.constexpr = (dims.SK + BK - 1) // BK
    column = tl.program_id(0) % BLOCKS * BV
    row = tl.program_id(0) // BLOCKS % KEYS * BK
    piece = tl.program_id(0) // (BLOCKS * KEYS)
    bh = tl.program_id(1).to(tl.int64)
    start = tl.load(spans.begin + piece)
    stop = tl.load(spans.end + piece)
    head = bh // H * T * H + bh % H
    k += head * dims.DK
    v += head * dims.DV
    rows = row + tl.arange(0, BK)
    cols = column + tl.arange(0, BV)
    if SWLA:
        cum = decayed.cum + bh * T
        cum_end = tl.load(cum + stop - 1)
        total = tl.zeros([1, BK], tl.float32)
    else:
        total = tl.zeros([1 if k.dtype.element_ty == tl.float32 else rows_of_ones(), BK], tl.float32)
    state = tl.zeros([BK, BV], tl.float32)
    for t0 in range(start, stop, BT):
        k_t = load_rows(k, t0, stop, H * dims.DK, row, dims.DK, BT, BK)
        v_t = load_rows(v, t0, stop, H * dims.DV, column, dims.DV, BT, BV)
        total = add_keys(total, k_t)
        if SWLA:
            t = t0 + tl.arange(0, BT)
            weight = _left(cum, decayed.now + bh * T, decayed.after + bh * T, t, stop, cum_end)
            k_t = (k_t.to(tl.float32) * weight[:, None]).to(v_t.dtype)
        state = tl.dot(tl.trans(k_t), v_t, state, input_precision=PRECISION)
    total = tl.max(total, 0)
    if SWLA:
        # The token before the piece, where it is one of the same memory.
        if tl.load(spans.entering + piece) >= 0:
            weight = tl.load(decayed.before + bh * P + piece) * tl.exp(cum_end - tl.load(cum + start))
            last = tl.cast(start - 1, tl.int64)
            key = tl.load(k + last * (H * dims.DK) + rows, mask=rows < dims.DK, other=0.0).to(tl.float32)
            value = tl.load(v + last * (H * dims.DV) + cols, mask=cols < dims.DV, other=0.0).to(tl.float32)
            state += weight * key[:, None] * value[None, :]
    inside = (rows < dims.SK)[:, None] & (cols < dims.SV)[None, :]
    place = (bh * P + piece) * (dims.SK * dims.SV) + rows[:, None] * dims.SV + cols[None, :]
    if made.ends is not None:
        tl.store(made.ends + place, state, mask=inside)
    if made.operand is not None:
        tl.store(made.operand + place, state.to(made.operand.dtype.element_ty), mask=inside)
    if column == 0:
        if made.sums is not None:
            tl.store(made.sums + (bh * P + piece) * dims.SK + rows, total, mask=rows < dims.SK)
        if made.means is not None:
            mean = total / (stop - start)
            tl.store(made.means + (bh * P + piece) * dims.SK + rows, mean, mask=rows < dims.SK)


@triton.jit(do_not_specialize=["T", "N", "P"])
def carry_kernel(
    ends,
    carried,
    operand,
    past,
    cum,
    end,
    segment,
    entering,
    seg_last,
    seq_begin,
    seq_end,
    T,
    N,
    P,
    SWLA: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of the states of a sequence, from its first piece to its last.

    ``past``, where not None, gets the sum of the states of the segments before, for every segment; ``carried`` is None
    where nothing enters a piece.
    """
    sequence = tl.program_id(1)
    bh = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    state = tl.zeros([BLOCK], tl.float32)
    earlier = tl.zeros([BLOCK], tl.float32)
    # Only additions wait for the piece before: loads go ahead.
    for piece in tl.range(tl.load(seq_begin + sequence), tl.load(seq_end + sequence), num_stages=4):
        matrix = (bh * P + piece) * SIZE + place
        entered = tl.where(tl.load(entering + piece) >= 0, state, 0.0)
        if SWLA:
            entered *= tl.exp(tl.load(cum + bh * T + tl.load(end + piece) - 1))
        state = tl.load(ends + matrix, mask=inside, other=0.0) + entered
        if carried is not None:
            height = SIZE
            if not SWLA:
                if operand is not None:
                    # Inside a segment the operands of the pieces are read, not these.
                    height = tl.where(tl.load(seg_last + tl.load(segment + piece)) == piece, SIZE, 0)
            tl.store(carried + matrix, state, mask=place < height)
        if operand is not None:
            tl.store(operand + matrix, state.to(operand.dtype.element_ty), mask=inside)
        if past is not None:
            s = tl.load(segment + piece)
            if tl.load(seg_last + s) == piece:
                tl.store(past + (bh * N + s) * SIZE + place, earlier.to(past.dtype.element_ty), mask=inside)
                earlier += state


@triton.jit(do_not_specialize=["N", "P"])
def means_kernel(sums, seg_begin, seg_end, seg_piece, seg_last, means, N, P, SK: tl.constexpr, BK: tl.constexpr):
    """One program: the mean key of a segment of several pieces."""
    s = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BK)
    total = tl.zeros([BK], tl.float32)
    last = tl.load(seg_last + s)
    for p0 in range(tl.load(seg_piece + s), last + 1, 16):
        piece = p0 + tl.arange(0, 16)
        inside = (piece <= last)[:, None] & (cols < SK)[None, :]
        total += tl.sum(tl.load(sums + (bh * P + piece)[:, None] * SK + cols[None, :], mask=inside, other=0.0), 0)
    total /= tl.load(seg_end + s) - tl.load(seg_begin + s)
    tl.store(means + (bh * N + s) * SK + cols, total, mask=cols < SK)


def decays(g: torch.Tensor, beta: torch.Tensor, lam: torch.Tensor, tables: Tables, PIECE: int) -> Decays:
    """cum, now, after ``[B*H, T]`` and before ``[B*H, P]``, float32, from gates ``[B, T, H]`` float32."""
    B, T, H = g.shape
    P = tables.begin.shape[0]
    made = Decays(*(g.new_empty((B * H, T)) for _ in range(3)), before=g.new_empty((B * H, P)))
    decays_kernel[(P, B * H)](
        g=g, beta=beta, lam=lam, begin=tables.begin, end=tables.end, entering=tables.entering, made=made, T=T, H=H, P=P,
        PIECE=PIECE, num_warps=4,
    )  # fmt: skip
    return made


def segment_states(
    k: torch.Tensor,
    v: torch.Tensor,
    decayed: Decays | None,
    tables: Tables,
    exact: bool,
    SWLA: bool,
    ROUTED: bool,
    HALF: bool,
    PRECISION: str,
    DK: int,
    DV: int,
    PK: int,
    PV: int,
    SK: int,
    SV: int,
    BT: int,
    BK: int,
    BV: int,
    num_warps: int,
    num_stages: int,
) -> States:
    """ends and operand ``[B*H, P, SK, SV]``, past ``[B*H, N, SK, SV]``, means ``[B*H, N, SK]``, sums ``[B*H, P, SK]``.

    Args:
        k [B, T, H, DK], v [B, T, H, DV]: of one dtype.
        decayed: of :func:`decays`; None for linear.
        exact: whether end states are wanted in float32 too.

    Returns:
        End states, float32, in linear memories of 16 bits only those of the last pieces of segments (unless ``exact``,
        None or scratch); the states of all pieces as operands of products, in k's dtype (``ends`` itself where that is
        float32, not written where sums of states are read and nothing enters a piece); the sum of earlier segments'
        states in k's dtype, where gates are equal, else None; mean keys, float32; the sums of pieces' keys, float32,
        None where every segment is one piece.
    """
    B, T, H, _ = k.shape
    P, N = tables.begin.shape[0], tables.seg_begin.shape[0]
    means = k.new_empty((B * H, N, SK), dtype=torch.float32)
    ends = operand = past = sums = None
    if HALF:
        operand = k.new_empty((B * H, P, SK, SV))
    if not ROUTED:
        past = k.new_empty((B * H, N, SK, SV))
    if P > N:
        sums = k.new_empty((B * H, P, SK), dtype=torch.float32)
    carries = tables.crosses or past is not None
    if exact or carries or operand is None:
        ends = k.new_empty((B * H, P, SK, SV), dtype=torch.float32)
    # No wider than the state.
    bk, bv = min(BK, PK), min(BV, PV)
    blocks = triton.cdiv(SK, bk) * triton.cdiv(SV, bv)
    local_kernel[(blocks * P, B * H)](
        k=k, v=v, decayed=decayed, spans=Spans(tables.begin, tables.end, entering=tables.entering if SWLA else None),
        made=States(ends, None if carries else operand, None, means if sums is None else None, sums), T=T, H=H, P=P,
        SWLA=SWLA, PRECISION=PRECISION, dims=Dims(DK, DV, PK, PV, SK, SV), BT=BT, BK=bk, BV=bv, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    if sums is not None:
        means_kernel[(N, B * H)](
            sums=sums, seg_begin=tables.seg_begin, seg_end=tables.seg_end, seg_piece=tables.seg_piece,
            seg_last=tables.seg_last, means=means, N=N, P=P, SK=SK, BK=PK, num_warps=4,
        )  # fmt: skip
    if carries:
        carry_kernel[(triton.cdiv(SK * SV, 1024), tables.seq_begin.shape[0], B * H)](
            ends=ends, carried=ends if tables.crosses and (exact or operand is None) else None,
            operand=operand if tables.crosses else None, past=past, cum=decayed.cum if SWLA else None, end=tables.end,
            segment=tables.segment, entering=tables.entering, seg_last=tables.seg_last, seq_begin=tables.seq_begin,
            seq_end=tables.seq_end, T=T, N=N, P=P, SWLA=SWLA, SIZE=SK * SV, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return States(ends, ends if operand is None else operand, past, means, sums)


def past_states(
    ends: torch.Tensor, like: torch.Tensor, cum: torch.Tensor | None, tables: Tables, SWLA: bool, SK: int, SV: int
) -> torch.Tensor:
    """past ``[B*H, N, SK, SV]`` of :func:`segment_states`, in the dtype of ``like``, from its ``ends``.

    Every segment is one piece.
    """
    heads, P = ends.shape[:2]
    past = like.new_empty(ends.shape)
    # What entered a piece is in its end state already.
    carry_kernel[(triton.cdiv(SK * SV, 1024), tables.seq_begin.shape[0], heads)](
        ends=ends, carried=None, operand=None, past=past, cum=cum, end=tables.end,
        segment=tables.segment, entering=torch.full_like(tables.entering, -1), seg_last=tables.seg_last,
        seq_begin=tables.seq_begin, seq_end=tables.seq_end, T=like.shape[1], N=P, P=P, SWLA=SWLA, SIZE=SK * SV,
        BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return past
