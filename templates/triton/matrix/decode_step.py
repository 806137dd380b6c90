"""New tokens of a linear or SWLA Memory Caching layer over its cache, states read in place (Eq. 2, 4, 6-17, 26-27).

Token by token: write, read, and at a segment's end append the state and the mean key to the cache:

    M_t = e^{g_t} M_{t-1} + beta_t k_{t-1}^T v_{t-1} + lam_t k_t^T v_t          linear: M_t = M_{t-1} + k_t^T v_t
    y_t = gamma_t^(s) (q_t M_t) + sum_{i < s} gamma_t^(i) (q_t M^(i))

Bound by the bytes of the states. The cached states of a head are shared out over SPLITS programs, each of which reads
its share once for all tokens and leaves a softmax of its own: largest logit, size and sum. One more program a block of
value columns walks through the tokens, writes the online state and reads it, and reads what it appends on the way for
the tokens that come after. A second kernel adds up the parts. The same serves every aggregation: with all logits 0
the softmax is 1 / s (mean), and without its division all weights are 1 (residual).

Cached states in 16 bits are half the bytes; all sums are float32. A state is rounded as it is appended, so the tokens
of the same launch read it before it is.

With SPLITS = 1 one program a head does everything, in a single launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import Dims, soften
from .decode_common import (
    BN,
    LOW,
    NONE,
    Blocks,
    Memory,
    Parts,
    Tokens,
    Writes,
    among_best,
    append,
    leave,
    load_place,
    load_row,
    logits_of,
    mean_scores,
    ordered,
    scores,
    take_best,
    write_swla,
)


@triton.jit
def _read_online(
    top, size, acc, M, keys, j, slot, place, token, tokens, memory, logits, used, begun, n, H, length, top_k, scale,
    ROUTED: tl.constexpr, SPARSE: tl.constexpr, dims: tl.constexpr, CP: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The softmaxes with the read of ``M`` by token j, and by all after it where it is a segment's end state."""
    for i in range(j, tl.where(place == length, n, j + 1)):
        read = tl.sum((load_row(tokens.q + i * H * dims.DK, dims.DK, dims.PK) * scale)[:, None] * M, 0)
        reads = token == i
        logit = 0.0
        if ROUTED:
            logit = tl.sum(load_row(tokens.u + i * H * dims.DK, dims.DK, dims.PK) * keys, 0) / place
        if SPARSE:
            if i > j:
                score = scores(tokens, memory, logits, i, used, begun, length, H, dims, CP, BS)
                reads = reads & among_best(score, slot, top_k, CP)
        new = tl.where(reads, tl.maximum(top, logit), top)
        keep = tl.exp(top - new)
        weight = tl.where(reads, tl.exp(logit - new), 0.0)
        size = size * keep + weight
        acc = acc * keep[:, None] + weight[:, None] * read[None, :]
        top = new
    return top, size, acc


@triton.jit
def _write_online(
    tokens, writes, memory, scratch, bh, row, column, used, begun, n, H, capacity, length, top_k, scale,
    SWLA: tl.constexpr, ROUTED: tl.constexpr, SPARSE: tl.constexpr, INDEPENDENT: tl.constexpr, SPLITS: tl.constexpr,
    dims: tl.constexpr, blocks: tl.constexpr,
):  # fmt: skip
    """The writer: walks through the tokens, writes BO columns of the online state and what it appends, and reads both.

    Returns largest logit, size and weighted reads of the tokens' softmaxes over these.
    """
    NT: tl.constexpr = blocks.NT
    BO: tl.constexpr = blocks.BO
    DK: tl.constexpr = dims.DK
    PK: tl.constexpr = dims.PK
    DV: tl.constexpr = dims.DV
    top = tl.full([NT], LOW, tl.float32)
    size = tl.zeros([NT], tl.float32)
    acc = tl.zeros([NT, BO], tl.float32)
    token = tl.arange(0, NT)
    x = column + tl.arange(0, BO)
    d = tl.arange(0, PK)
    inside = (d < DK)[:, None] & (x < DV)[None, :]
    tile = d[:, None] * DV + x[None, :]
    M = tl.load(memory.online + bh * DK * DV + tile, mask=inside, other=0.0)
    keys = load_row(memory.key_sum, DK, PK)
    if SWLA:
        key = load_row(memory.last_key + bh * DK, DK, PK)
        value = tl.load(memory.last_value + bh * DV + x, mask=x < DV, other=0.0)
    slot = used
    place = begun
    for j in range(0, n):
        kj = load_row(tokens.k + j * H * DK, DK, PK)
        vj = tl.load(tokens.v + j * H * DV + x, mask=x < DV, other=0.0).to(tl.float32)
        if SWLA:
            M = write_swla(M, key, value, kj, vj, writes, row + j * H)
            key = kj
            value = vj
        else:
            M += kj[:, None] * vj[None, :]
        keys += kj
        place += 1
        top, size, acc = _read_online(
            top, size, acc, M, keys, j, slot, place, token, tokens, memory, scratch.logits, used, begun, n, H, length,
            top_k, scale, ROUTED=ROUTED, SPARSE=SPARSE, dims=dims, CP=blocks.CP, BS=blocks.BS,
        )  # fmt: skip
        if place == length:
            append(memory, M, keys, slot, tile, x, capacity, length, dims)
            slot += 1
            place = 0
            keys = tl.zeros_like(keys)
            if INDEPENDENT:
                M = tl.zeros_like(M)
                if SWLA:
                    key = tl.zeros_like(key)
                    value = tl.zeros_like(value)
    # Every thread has read what is overwritten now.
    tl.debug_barrier()
    tl.store(memory.online + bh * DK * DV + tile, M, mask=inside)
    if SPLITS == 1:
        tl.store(memory.key_sum + d, keys, mask=d < DK)
        if SWLA:
            tl.store(memory.last_key + bh * DK + d, key, mask=d < DK)
            tl.store(memory.last_value + bh * DV + x, value, mask=x < DV)
    else:
        leave(scratch, (bh * n + token) * (SPLITS + 1), top, size, acc, x, token < n, dims)
    return top, size, acc


@triton.jit
def _add_states(
    sums, tokens, memory, group, slots, weight, x, i0, some, used, n, H, scale,
    SPARSE: tl.constexpr, dims: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``sums`` [TT, BK, BV] with the reads of ``some`` states from ``i0`` on, or of ``slots``, each with its weight."""
    DK: tl.constexpr = dims.DK
    DV: tl.constexpr = dims.DV
    pick = tl.arange(0, BN)
    steps: tl.constexpr = (DK + BK - 1) // BK
    for step in tl.range(0, some * steps, num_stages=STAGES):
        here = pick == step // steps
        d = step % steps * BK + tl.arange(0, BK)
        slot = i0 + step // steps
        if SPARSE:
            slot = tl.sum(tl.where(here, slots, 0), 0)
        # Nothing of a state that was appended on the way. (A scalar in a mask is too much for an interpreter.)
        inside = (d < tl.where(slot < used, DK, 0))[:, None] & (x < DV)[None, :]
        M = tl.load(
            memory.states + slot.to(tl.int64) * DK * DV + (d[:, None] * DV + x[None, :]), mask=inside, other=0.0
        ).to(tl.float32)
        inside = (group < n)[:, None] & (d < DK)[None, :]
        w = tl.load(tokens.q + group[:, None] * H * DK + d[None, :], mask=inside, other=0.0).to(tl.float32)
        w = w * scale * tl.sum(tl.where(here[None, :], weight, 0.0), 1)[:, None]
        sums += w[:, :, None] * M[None, :, :]
    return sums


@triton.jit
def _read_cached(
    tokens, memory, scratch, high, mass, out, begin, split, x, used, begun, n, H, length, top_k, scale,
    ROUTED: tl.constexpr, SPARSE: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, TT: tl.constexpr,
    dims: tl.constexpr, blocks: tl.constexpr,
):  # fmt: skip
    """The reader: adds to the softmaxes of the tokens of a group their reads of a split of the states cached before."""
    BK: tl.constexpr = blocks.BK
    BV: tl.constexpr = blocks.BV
    CP: tl.constexpr = blocks.CP
    group = begin + tl.arange(0, TT)
    sums = tl.zeros([TT, BK, BV], tl.float32)
    count = used
    if SPARSE:
        every = scores(tokens, memory, scratch.logits, begin, used, begun, length, H, dims, CP, blocks.BS)
        # Logit and, the other way round, index in one number: all differ, and of equal logits the earlier wins.
        order = (ordered(every.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | (CP - 1 - tl.arange(0, CP))
        count = tl.minimum(top_k, used + (begun + begin) // length)
    lo = (split * count) // SPLITS
    hi = ((split + 1) * count) // SPLITS
    if SPARSE:
        for _ in range(0, lo):
            order = tl.where(order == tl.max(order, 0), NONE, order)
    for i0 in range(lo, hi, BN):
        slots = i0 + tl.arange(0, BN)
        some = tl.minimum(hi - i0, BN)
        score = tl.zeros([TT, BN], tl.float32)
        valid = slots < hi
        if SPARSE:
            order, slots, score = take_best(order, slots, score, some, CP)
            # What was appended on the way is the writer's to read.
            valid = valid & (slots < used)
        elif ROUTED:
            score = mean_scores(tokens, memory, group, slots, valid, n, H, dims, TT, blocks.BS)
        score = tl.where(valid[None, :], score, LOW)
        high, mass, keep, weight = soften(high, mass, score, valid[None, :])
        out = out * keep[:, None]
        sums = _add_states(
            sums * keep[:, None, None], tokens, memory, group, slots, weight, x, i0, some, used, n, H, scale,
            SPARSE=SPARSE, dims=dims, BK=BK, STAGES=STAGES,
        )  # fmt: skip
    return high, mass, out + tl.sum(sums, 1)


@triton.jit(do_not_specialize=["cached_all", "filled_all", "first", "total", "H", "capacity", "length", "top_k"])
def step_kernel(
    tokens, writes, memory, scratch, cached_all, filled_all, first, n, total, H, capacity, length, top_k, scale,
    SWLA: tl.constexpr, ROUTED: tl.constexpr, SPARSE: tl.constexpr, AVERAGES: tl.constexpr, INDEPENDENT: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, dims: tl.constexpr, blocks: tl.constexpr,
):  # fmt: skip
    """The first programs of a head write and read BO columns of its online state each, the others read cached states.

    These have tokens of a group of TT, a split of the states and BV value columns, and all leave ``scratch``. With
    SPLITS = 1 the only program is both, and leaves y.
    """
    NT: tl.constexpr = blocks.NT
    TT: tl.constexpr = 1 if SPARSE else NT
    BO: tl.constexpr = blocks.BO
    BV: tl.constexpr = blocks.BV
    WRITERS: tl.constexpr = (dims.DV + BO - 1) // BO
    READER: tl.constexpr = 0 if SPLITS == 1 else WRITERS
    pid = tl.program_id(1)
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    used, begun = load_place(memory, cached_all, filled_all, b, first, length)
    row = (b * total + first) * H + bh % H
    tokens = Tokens(
        tokens.q + row * dims.DK, tokens.k + row * dims.DK, tokens.v + row * dims.DV, tokens.u + row * dims.DK,
        tokens.y + row * dims.DV,
    )  # fmt: skip
    memory = Memory(
        memory.states + bh * capacity * dims.DK * dims.DV, memory.descriptors + bh * capacity * dims.DK, memory.online,
        memory.key_sum + bh * dims.DK, memory.last_key, memory.last_value, None, None,
    )  # fmt: skip
    if scratch.logits is not None:
        scratch = Parts(scratch.parts, scratch.stats, scratch.logits + bh * n * blocks.CP)
    top = tl.full([NT], LOW, tl.float32)
    size = tl.zeros([NT], tl.float32)
    acc = tl.zeros([NT, BO], tl.float32)
    if pid < WRITERS:
        top, size, acc = _write_online(
            tokens, writes, memory, scratch, bh, row, pid * BO, used, begun, n, H, capacity, length, top_k, scale,
            SWLA=SWLA, ROUTED=ROUTED, SPARSE=SPARSE, INDEPENDENT=INDEPENDENT, SPLITS=SPLITS, dims=dims, blocks=blocks,
        )  # fmt: skip
    if pid >= READER:
        columns: tl.constexpr = (dims.DV + BV - 1) // BV
        job = pid - READER
        x = job % columns * BV + tl.arange(0, BV)
        split = job // columns % SPLITS
        begin = job // columns // SPLITS * TT
        if SPLITS == 1:
            high = top
            mass = size
            out = acc
        else:
            high = tl.full([TT], LOW, tl.float32)
            mass = tl.zeros([TT], tl.float32)
            out = tl.zeros([TT, BV], tl.float32)
        high, mass, out = _read_cached(
            tokens, memory, scratch, high, mass, out, begin, split, x, used, begun, n, H, length, top_k, scale,
            ROUTED=ROUTED, SPARSE=SPARSE, SPLITS=SPLITS, STAGES=STAGES, TT=TT, dims=dims, blocks=blocks,
        )  # fmt: skip
        group = begin + tl.arange(0, TT)
        if SPLITS > 1:
            leave(scratch, (bh * n + group) * (SPLITS + 1) + 1 + split, high, mass, out, x, group < n, dims)
        else:
            if ROUTED or AVERAGES:
                out = out / mass[:, None]
            inside = (group < n)[:, None] & (x < dims.DV)[None, :]
            place = tokens.y + group[:, None] * H * dims.DV + x[None, :]
            tl.store(place, out.to(tokens.y.dtype.element_ty), mask=inside)


def decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    lam: torch.Tensor | None,
    memory: Memory,
    y: torch.Tensor,
    cached_all: int,
    filled_all: int,
    first: int,
    n: int,
    length: int,
    top_k: int,
    scale: float,
    SWLA: bool,
    ROUTED: bool,
    SPARSE: bool,
    AVERAGES: bool,
    INDEPENDENT: bool,
    DK: int,
    DV: int,
    PK: int,
    PV: int,
    SK: int,
    SV: int,
    SPLITS: int,
    BK: int,
    BV: int,
    BO: int,
    NEAR: int,
    STAGES: int,
    num_warps: int,
) -> Parts:
    """Tokens first to first + n of all T over a memory, which is written in place, and their y or the parts of it.

    Args:
        q, k, u [B, T, H, DK], v, y [B, T, H, DV], of one dtype; g, beta, lam [B, T, H] float32 or None for
            0, 0 and 1.
        memory: its states float32, bfloat16 or float16; without cached and filled, which are ``cached_all`` and
            ``filled_all`` for every sequence, or with both.
        length: C.
        BK, BV: rows (of one token; fewer of several) and columns of a cached state's tile; BO: columns of the online
            state that a program has.
        NEAR: up to this capacity every ssc program computes all logits itself; above, a kernel does it before.

    Returns:
        With SPLITS > 1, what :mod:`decode_combine` makes y of; it also writes key_sum, last_key and last_value. Else
        nothing: y and the memory are written.
    """
    (B, total, H, _), capacity, dims = q.shape, memory.descriptors.shape[2], Dims(DK, DV, PK, PV, SK, SV)
    CP, NT = max(16, triton.next_power_of_2(capacity)), triton.next_power_of_2(n)
    TT = NT
    # So much of descriptors is in registers at a time.
    BS = max(16, min(PK, 1024 // (NT * 16)))
    parts = stats = logits = None
    if SPARSE:
        TT = 1
        BS = max(4, min(PK, 4096 // CP))
        if capacity > NEAR:
            logits = logits_of(u, memory, cached_all, filled_all, first, n, length, CP, dims)
    programs, bv, bo = 1, PV, PV
    if SPLITS > 1:
        bv, bo = min(BV, PV), min(BO, PV)
        parts = torch.empty(B * H * n, SPLITS + 1, DV, dtype=torch.float32, device=q.device)
        stats = torch.empty(B * H * n, SPLITS + 1, 2, dtype=torch.float32, device=q.device)
        programs = triton.cdiv(DV, bo) + triton.cdiv(DV, bv) * SPLITS * triton.cdiv(n, TT)
    scratch = Parts(parts, stats, logits)
    step_kernel[(B * H, programs)](
        tokens=Tokens(q, k, v, u, y), writes=Writes(g, beta, lam), memory=memory, scratch=scratch,
        cached_all=cached_all, filled_all=filled_all, first=first, n=n, total=total, H=H, capacity=capacity,
        length=length, top_k=top_k, scale=scale, SWLA=SWLA, ROUTED=ROUTED, SPARSE=SPARSE, AVERAGES=AVERAGES,
        INDEPENDENT=INDEPENDENT, SPLITS=SPLITS, STAGES=STAGES, dims=dims,
        blocks=Blocks(NT, CP, max(1, min(BK, PK) // TT), bv, bo, BS), num_warps=num_warps,
    )  # fmt: skip
    return scratch
