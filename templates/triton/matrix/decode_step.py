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

from .common import LOW, load_place, load_row

BN = tl.constexpr(16)
"""Cached states whose logits are computed together."""


@triton.jit
def _scores(
    u, k, descriptors, key_sum, logits, i, used, begun, length, H,
    CP: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, PK: tl.constexpr,
):  # fmt: skip
    """[CP]: logits of token i against every state that it may read, those appended since token 0 included.

    ``used`` and ``begun`` are the place before token 0; ``logits``, where not None, has those of the ``used`` states.
    """
    state = tl.arange(0, CP)
    if logits is not None:
        score = tl.load(logits + i * CP + state, mask=state < used, other=0.0)
    else:
        score = tl.zeros([CP], tl.float32)
        for d0 in range(0, PK, BS):
            d = d0 + tl.arange(0, BS)
            x = tl.load(u + i * H * DK + d, mask=d < DK, other=0.0).to(tl.float32)
            inside = (state < used)[:, None] & (d < DK)[None, :]
            p = tl.load(descriptors + state[:, None] * DK + d[None, :], mask=inside, other=0.0)
            score += tl.sum(p * x[None, :], 1)
    score = tl.where(state < used, score, LOW)
    if begun + i >= length:
        x = load_row(u + i * H * DK, DK, PK)
        total = load_row(key_sum, DK, PK)
        slot = used
        place = begun
        for j in range(0, i):
            total += load_row(k + j * H * DK, DK, PK)
            place += 1
            if place == length:
                score = tl.where(state == slot, tl.sum(x * total, 0) / length, score)
                slot += 1
                place = 0
                total = tl.zeros_like(total)
    # One zero: what is compared by its bits must not tell +0 from -0.
    return tl.where(score == 0.0, 0.0, score)


@triton.jit
def _ordered(x):
    """The bits of floats as int32 in the floats' order, and back again."""
    return tl.where(x < 0, x ^ 0x7FFFFFFF, x)


@triton.jit(do_not_specialize=["cached_all", "filled_all", "first", "total", "H", "capacity", "length"])
def _logits_kernel(
    u, descriptors, cached, filled, logits, cached_all, filled_all, first, n, total, H, capacity, length,
    CP: tl.constexpr, BS: tl.constexpr, DK: tl.constexpr, PK: tl.constexpr,
):  # fmt: skip
    """logits [B * H, n, CP] of n tokens against the states cached before them; a program has BS states."""
    bh = tl.program_id(0).to(tl.int64)
    used, _ = load_place(cached, filled, cached_all, filled_all, bh // H, first, length)
    u += ((bh // H * total + first) * H + bh % H) * DK
    state = tl.program_id(1) * BS + tl.arange(0, BS)
    d = tl.arange(0, PK)
    inside = (state < used)[:, None] & (d < DK)[None, :]
    p = tl.load(descriptors + (bh * capacity + state[:, None]) * DK + d[None, :], mask=inside, other=0.0)
    for i in range(0, n):
        x = load_row(u + i * H * DK, DK, PK)
        tl.store(logits + (bh * n + i) * CP + state, tl.sum(p * x[None, :], 1), mask=state < used)


@triton.jit(do_not_specialize=["cached_all", "filled_all", "first", "total", "H", "capacity", "length", "top_k"])
def _read_kernel(
    q, k, v, u, g, beta, lam, states, descriptors, online, key_sum, last_key, last_value, cached, filled, logits,
    parts, stats, y, cached_all, filled_all, first, n, total, H, capacity, length, top_k, scale,
    SWLA: tl.constexpr, AGGREGATION: tl.constexpr, INDEPENDENT: tl.constexpr, SPLITS: tl.constexpr,
    WRITERS: tl.constexpr, READER: tl.constexpr, NT: tl.constexpr, TT: tl.constexpr, CP: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr, STAGES: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, PK: tl.constexpr,
):  # fmt: skip
    """Programs 0 to WRITERS - 1 of a head write and read its online state, those from READER on its cached states.

    With SPLITS = 1 its only program is both. Otherwise program p >= READER has tokens of a group of TT, a share of the
    states and BV value columns, and all leave ``parts`` [B * H, n, SPLITS + 1, DV] and ``stats`` [.., 2].
    """
    pid = tl.program_id(1)
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    used, begun = load_place(cached, filled, cached_all, filled_all, b, first, length)
    row = (b * total + first) * H + bh % H
    q += row * DK
    k += row * DK
    u += row * DK
    v += row * DV
    y += row * DV
    states += bh * capacity * DK * DV
    descriptors += bh * capacity * DK
    key_sum += bh * DK
    if logits is not None:
        logits += bh * n * CP

    # Of the softmax so far, by token: largest logit, size, and the weighted reads.
    top = tl.full([NT], LOW, tl.float32)
    size = tl.zeros([NT], tl.float32)
    acc = tl.zeros([NT, BO], tl.float32)
    token = tl.arange(0, NT)
    if pid < WRITERS:
        x = pid * BO + tl.arange(0, BO)
        d = tl.arange(0, PK)
        inside = (d < DK)[:, None] & (x < DV)[None, :]
        tile = d[:, None] * DV + x[None, :]
        M = tl.load(online + bh * DK * DV + tile, mask=inside, other=0.0)
        keys = load_row(key_sum, DK, PK)
        if SWLA:
            key = load_row(last_key + bh * DK, DK, PK)
            value = tl.load(last_value + bh * DV + x, mask=x < DV, other=0.0)
        slot = used
        place = begun
        for j in range(0, n):
            kj = load_row(k + j * H * DK, DK, PK)
            vj = tl.load(v + j * H * DV + x, mask=x < DV, other=0.0).to(tl.float32)
            if SWLA:
                if g is not None:
                    M *= tl.exp(tl.load(g + row + j * H))
                if beta is not None:
                    M += (tl.load(beta + row + j * H) * key)[:, None] * value[None, :]
                key = kj
                value = vj
                if lam is not None:
                    M += (tl.load(lam + row + j * H) * kj)[:, None] * vj[None, :]
                else:
                    M += kj[:, None] * vj[None, :]
            else:
                M += kj[:, None] * vj[None, :]
            keys += kj
            place += 1
            # Token j reads the memory, and all after it do where it is a segment's end state.
            for i in range(j, tl.where(place == length, n, j + 1)):
                read = tl.sum((load_row(q + i * H * DK, DK, PK) * scale)[:, None] * M, 0)
                reads = token == i
                logit = 0.0
                if AGGREGATION == "grm" or AGGREGATION == "ssc":
                    logit = tl.sum(load_row(u + i * H * DK, DK, PK) * keys, 0) / place
                if AGGREGATION == "ssc":
                    if i > j:
                        score = _scores(
                            u, k, descriptors, key_sum, logits, i, used, begun, length, H, CP=CP, BS=BS, DK=DK, PK=PK
                        )
                        state = tl.arange(0, CP)
                        own = tl.max(tl.where(state == slot, score, LOW), 0)
                        better = (score > own) | ((score == own) & (state < slot))
                        reads = reads & (tl.sum(better.to(tl.int32), 0) < top_k)
                new = tl.where(reads, tl.maximum(top, logit), top)
                keep = tl.exp(top - new)
                weight = tl.where(reads, tl.exp(logit - new), 0.0)
                size = size * keep + weight
                acc = acc * keep[:, None] + weight[:, None] * read[None, :]
                top = new
            if place == length:
                # The host knows that there is room, unless the counts are on the device.
                room = d < tl.where(slot < capacity, DK, 0)
                ended = M.to(states.dtype.element_ty)
                tl.store(states + slot.to(tl.int64) * DK * DV + tile, ended, mask=room[:, None] & (x < DV)[None, :])
                tl.store(descriptors + slot * DK + d, keys / length, mask=room)
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
        tl.store(online + bh * DK * DV + tile, M, mask=inside)
        if SPLITS == 1:
            tl.store(key_sum + d, keys, mask=d < DK)
            if SWLA:
                tl.store(last_key + bh * DK + d, key, mask=d < DK)
                tl.store(last_value + bh * DV + x, value, mask=x < DV)
        else:
            part = (bh * n + token) * (SPLITS + 1)
            tl.store(parts + part[:, None] * DV + x[None, :], acc, mask=(token < n)[:, None] & (x < DV)[None, :])
            tl.store(stats + part * 2, top, mask=token < n)
            tl.store(stats + part * 2 + 1, size, mask=token < n)

    if pid >= READER:
        columns: tl.constexpr = (DV + BV - 1) // BV
        job = pid - READER
        x = job % columns * BV + tl.arange(0, BV)
        split = job // columns % SPLITS
        group = job // columns // SPLITS * TT
        tokens = group + tl.arange(0, TT)
        if SPLITS == 1:
            high = top
            mass = size
            out = acc
        else:
            high = tl.full([TT], LOW, tl.float32)
            mass = tl.zeros([TT], tl.float32)
            out = tl.zeros([TT, BV], tl.float32)
        sums = tl.zeros([TT, BK, BV], tl.float32)
        pick = tl.arange(0, BN)
        count = used
        if AGGREGATION == "ssc":
            state = tl.arange(0, CP)
            every = _scores(
                u, k, descriptors, key_sum, logits, group, used, begun, length, H, CP=CP, BS=BS, DK=DK, PK=PK
            )
            # Logit and, the other way round, index in one number: all differ, and of equal logits the earlier wins.
            order = (_ordered(every.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | (CP - 1 - state)
            count = tl.minimum(top_k, used + (begun + group) // length)
        lo = (split * count) // SPLITS
        hi = ((split + 1) * count) // SPLITS
        if AGGREGATION == "ssc":
            for _ in range(0, lo):
                order = tl.where(order == tl.max(order, 0), -(1 << 63), order)
        for i0 in range(lo, hi, BN):
            slots = i0 + pick
            some = tl.minimum(hi - i0, BN)
            score = tl.zeros([TT, BN], tl.float32)
            valid = slots < hi
            if AGGREGATION == "grm":
                for d0 in range(0, PK, BS):
                    d = d0 + tl.arange(0, BS)
                    inside = (tokens < n)[:, None] & (d < DK)[None, :]
                    w = tl.load(u + tokens[:, None] * H * DK + d[None, :], mask=inside, other=0.0).to(tl.float32)
                    inside = valid[:, None] & (d < DK)[None, :]
                    p = tl.load(descriptors + slots[:, None] * DK + d[None, :], mask=inside, other=0.0)
                    score += tl.sum(w[:, None, :] * p[None, :, :], 2)
            if AGGREGATION == "ssc":
                for i in range(0, some):
                    best = tl.max(order, 0)
                    order = tl.where(order == best, -(1 << 63), order)
                    slots = tl.where(pick == i, CP - 1 - (best & 0xFFFFFFFF).to(tl.int32), slots)
                    logit = _ordered((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
                    score = tl.where((pick == i)[None, :], logit, score)
                # What was appended on the way is the writer's to read.
                valid = valid & (slots < used)
            score = tl.where(valid[None, :], score, LOW)
            new = tl.maximum(high, tl.max(score, 1))
            keep = tl.exp(high - new)
            weight = tl.where(valid[None, :], tl.exp(score - new[:, None]), 0.0)
            mass = mass * keep + tl.sum(weight, 1)
            out = out * keep[:, None]
            sums = sums * keep[:, None, None]
            high = new
            blocks: tl.constexpr = (DK + BK - 1) // BK
            for step in tl.range(0, some * blocks, num_stages=STAGES):
                here = pick == step // blocks
                d = step % blocks * BK + tl.arange(0, BK)
                slot = i0 + step // blocks
                if AGGREGATION == "ssc":
                    slot = tl.sum(tl.where(here, slots, 0), 0)
                # Of a state that was appended on the way, nothing. (A scalar in a mask is too much for an interpreter.)
                inside = (d < tl.where(slot < used, DK, 0))[:, None] & (x < DV)[None, :]
                M = tl.load(
                    states + slot.to(tl.int64) * DK * DV + (d[:, None] * DV + x[None, :]), mask=inside, other=0.0
                ).to(tl.float32)
                inside = (tokens < n)[:, None] & (d < DK)[None, :]
                w = tl.load(q + tokens[:, None] * H * DK + d[None, :], mask=inside, other=0.0).to(tl.float32)
                w = w * scale * tl.sum(tl.where(here[None, :], weight, 0.0), 1)[:, None]
                sums += w[:, :, None] * M[None, :, :]
        out += tl.sum(sums, 1)
        inside = (tokens < n)[:, None] & (x < DV)[None, :]
        if SPLITS > 1:
            part = (bh * n + tokens) * (SPLITS + 1) + 1 + split
            tl.store(parts + part[:, None] * DV + x[None, :], out, mask=inside)
            tl.store(stats + part * 2, high, mask=tokens < n)
            tl.store(stats + part * 2 + 1, mass, mask=tokens < n)
        else:
            if AGGREGATION != "residual":
                out = out / mass[:, None]
            tl.store(y + tokens[:, None] * H * DV + x[None, :], out.to(y.dtype.element_ty), mask=inside)


def decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    lam: torch.Tensor | None,
    states: torch.Tensor,
    descriptors: torch.Tensor,
    online: torch.Tensor,
    key_sum: torch.Tensor,
    last_key: torch.Tensor,
    last_value: torch.Tensor,
    cached: torch.Tensor | None,
    filled: torch.Tensor | None,
    y: torch.Tensor,
    cached_all: int,
    filled_all: int,
    first: int,
    n: int,
    length: int,
    top_k: int,
    scale: float,
    SWLA: tl.constexpr,
    AGGREGATION: tl.constexpr,
    INDEPENDENT: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    PK: tl.constexpr,
    PV: tl.constexpr,
    SPLITS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BO: tl.constexpr,
    NEAR: tl.constexpr,
    STAGES: tl.constexpr,
    num_warps: tl.constexpr,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Tokens first to first + n of all T over a memory, which is written in place, and their y or the parts of it.

    Args:
        q, k, u [B, T, H, DK], v, y [B, T, H, DV], of one dtype; g, beta, lam [B, T, H] float32 or None for
            0, 0 and 1.
        states: of the memory, float32, bfloat16 or float16 [B, H, capacity, DK, DV].
        descriptors, online, key_sum, last_key, last_value: of the memory, float32:
            [B, H, capacity, DK], [B, H, DK, DV], [B, H, DK], [B, H, DK], [B, H, DV].
        cached, filled: int32 [B], states and tokens of the segment under way; None where they are ``cached_all`` and
            ``filled_all`` for every sequence.
        length: C.
        BK, BV: rows (of one token; fewer of several) and columns of a cached state's tile; BO: columns of the online
            state that a program has.
        NEAR: up to this capacity every ssc program computes all logits itself; above, a kernel does it before.

    Returns:
        With SPLITS > 1, what :mod:`decode_combine` makes y of, float32: reads [B * H, n, SPLITS + 1, DV] and, of each,
        largest logit and size of the softmax [B * H, n, SPLITS + 1, 2]; it also writes key_sum, last_key and
        last_value. Else None: y and the memory are written.
    """
    B, total, H, _ = q.shape
    capacity = descriptors.shape[2]
    CP = max(16, triton.next_power_of_2(capacity))
    NT = triton.next_power_of_2(n)
    TT = NT
    logits = None
    # So much of descriptors is in registers at a time.
    BS = max(16, min(PK, 1024 // (NT * 16)))
    if AGGREGATION == "ssc":
        TT = 1
        BS = max(4, min(PK, 4096 // CP))
        if capacity > NEAR:
            logits = torch.empty(B * H, n, CP, dtype=torch.float32, device=q.device)
            _logits_kernel[(B * H, triton.cdiv(capacity, 16))](
                u=u, descriptors=descriptors, cached=cached, filled=filled, logits=logits, cached_all=cached_all,
                filled_all=filled_all, first=first, n=n, total=total, H=H, capacity=capacity, length=length,
                CP=CP, BS=16, DK=DK, PK=PK, num_warps=4,
            )  # fmt: skip
    parts = None
    stats = None
    writers = 1
    reader = 0
    programs = 1
    bv = PV
    bo = PV
    if SPLITS > 1:
        bv = min(BV, PV)
        bo = min(BO, PV)
        parts = torch.empty(B * H * n, SPLITS + 1, DV, dtype=torch.float32, device=q.device)
        stats = torch.empty(B * H * n, SPLITS + 1, 2, dtype=torch.float32, device=q.device)
        writers = triton.cdiv(DV, bo)
        reader = writers
        programs = writers + triton.cdiv(DV, bv) * SPLITS * triton.cdiv(n, TT)
    _read_kernel[(B * H, programs)](
        q=q, k=k, v=v, u=u, g=g, beta=beta, lam=lam, states=states, descriptors=descriptors, online=online,
        key_sum=key_sum, last_key=last_key, last_value=last_value, cached=cached, filled=filled, logits=logits,
        parts=parts, stats=stats, y=y, cached_all=cached_all, filled_all=filled_all, first=first, n=n, total=total,
        H=H, capacity=capacity, length=length, top_k=top_k, scale=scale, SWLA=SWLA, AGGREGATION=AGGREGATION,
        INDEPENDENT=INDEPENDENT, SPLITS=SPLITS, WRITERS=writers, READER=reader, NT=NT, TT=TT, CP=CP,
        BK=max(1, min(BK, PK) // TT), BV=bv, BO=bo, BS=BS, STAGES=STAGES, DK=DK, DV=DV, PK=PK, num_warps=num_warps,
    )  # fmt: skip
    return parts, stats
