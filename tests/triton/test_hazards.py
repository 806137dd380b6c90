"""Writes to shared memory that a product may still read: small kernels by hand, both ways, and compiled ones."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from mctune.backends.triton import hazards as module
from mctune.backends.triton.addresses import Value, address, number, operand, result, upto
from mctune.backends.triton.hazards import ANYWHERE, hazards

# A right factor of 64 rows of 128 bytes, swizzled, of which a product takes 32 bytes each: 8 rows are 1024 bytes apart.
LAYOUT = 0x4000004000000000
START = """.target sm_90a
.visible .entry kernel()
{
	.reg .b32 	%r<99>;
	mov.u32 	%r1, %tid.x;
	shl.b32 	%r2, %r1, 4;
	and.b32 	%r3, %r2, 4080;
	mov.b32 	%r4, global_smem;
	add.s32 	%r5, %r4, %r3;
"""
PRODUCT = """	add.s32 	%r6, %r4, {0};
	bfe.u32 	%r7, %r6, 4, 14;
	cvt.u64.u32 	%rd1, %r7;
	or.b64 	%rd2, %rd1, 4611686293305294848;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{%f1,%f2}}, {{%r90,%r91,%r92,%r93}}, %rd2, %p1, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
"""
WAIT, BARRIER = "\twgmma.wait_group.sync.aligned {0};\n", "\tbar.sync \t0;\n"
COPY = "\tcp.async.cg.shared.global [ %r5 + {0} ], [ %rd9 + 0 ], 0x10, %r9;\n"
END = "\tret;\n}\n"
assert LAYOUT == 4611686293305294848


def kernel(*parts: str) -> str:
    return START + "".join(parts) + END


def test_a_wait_is_not_one_for_other_warpgroups() -> None:
    product, copy = PRODUCT.format(8192), COPY.format(8192)
    unsafe = kernel(product, WAIT.format(0), copy)
    (found,) = hazards(unsafe, 8)
    assert (found.write, found.written, found.read, found.waited) == ("cp.async", (8192, 12288), (8192, 16384), True)
    assert str(found) == (
        "cp.async to bytes 8192 to 12288 while another warpgroup's wgmma may read bytes 8192 to 16384"
    )
    assert hazards(unsafe, 4) == ()
    assert hazards(kernel(product, WAIT.format(0), BARRIER, copy), 8) == ()


def test_a_barrier_before_the_wait_does_not_help() -> None:
    """All threads have asked for their products, and may have ended none."""
    parts = (PRODUCT.format(0), BARRIER, WAIT.format(0))
    assert len(hazards(kernel(*parts, COPY.format(0)), 8)) == 1
    assert hazards(kernel(*parts, BARRIER, COPY.format(0)), 8) == ()


def test_what_nobody_waited_for_is_read_by_its_own_warpgroup_too() -> None:
    parts = (PRODUCT.format(0), PRODUCT.format(16384), WAIT.format(1), BARRIER)
    for warps in (4, 8):
        assert hazards(kernel(*parts, COPY.format(0)), warps) == ()
        (found,) = hazards(kernel(*parts, COPY.format(16384)), warps)
        assert not found.waited and "its own or another warpgroup's" in str(found)
    # ptxas waits for serialized products, whatever the PTX says.
    assert hazards(kernel(*parts, COPY.format(16384)), 8, serialized=True) == ()
    assert hazards(kernel(PRODUCT.format(0), COPY.format(0)), 8, serialized=True)[0].waited
    assert hazards(kernel(PRODUCT.format(0), COPY.format(0)), 4, serialized=True) == ()


@pytest.mark.parametrize(("offset", "count"), [(0, 0), (4096, 0), (4112, 1), (16368, 1), (16384, 0)])
def test_other_bytes_are_no_hazard(offset: int, count: int) -> None:
    """256 threads write 16 bytes each, next to what is read or into it by one of them."""
    assert len(hazards(kernel(PRODUCT.format(8192), WAIT.format(0), COPY.format(offset)), 8)) == count


@pytest.mark.parametrize(
    ("write", "written"),
    [
        ("st.shared.v4.b32 \t[%r5+64], {%r1, %r2, %r3, %r4};", (64, 64 + 4096)),
        ("st.shared.b16 \t[global_smem+6], %rs1;", (6, 8)),
        ("@%p1 st.shared.v2.b32 [ %r5 + 0 ], { %r1, %r2 };", (0, 4080 + 8)),
        ("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {%r1, %r2, %r3, %r4};", (0, 4096)),
        ("st.shared.b32 \t[%r77], %r1;", ANYWHERE),
        ("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%rd4, {%r1}], [%r3];",
         ANYWHERE),
        ("ld.shared.b32 \t%r8, [%r5];", None),
        ("st.global.b32 \t[%rd5], %r1;", None),
        ("cp.async.commit_group;", None),
        ("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd4, {%r1, %r2}], [%r5];", None),
    ],
)  # fmt: skip
def test_kinds_of_writes(write: str, written: tuple[int, int] | None) -> None:
    found = hazards(kernel(PRODUCT.format(0), WAIT.format(0), f"\t{write}\n"), 8)
    assert [one.written for one in found] == ([] if written is None else [written])


@pytest.mark.parametrize(
    ("barrier", "safe"),
    [
        ("bar.sync \t0;", True),
        ("bar.sync \t1, 256;", True),
        ("barrier.cta.sync.aligned.all 0;", True),
        ("bar.red.popc.u32 %r8, 0, %p1;", True),
        ("bar.sync \t1, 128;", False),
        ("bar.arrive \t1, 256;", False),
        ("bar.warp.sync \t-1;", False),
        ("fence.proxy.async.shared::cta;", False),
    ],
)
def test_kinds_of_barriers(barrier: str, safe: bool) -> None:
    found = hazards(kernel(PRODUCT.format(0), WAIT.format(0), f"\t{barrier}\n", COPY.format(0)), 8)
    assert (found == ()) == safe


ROTATING = """	mov.b32 	%r10, -1;
	mov.b32 	%r11, 0;
$L__BB0_1:
	add.s32 	%r12, %r10, 1;
	setp.gt.s32 	%p2, %r12, {last};
	selp.b32 	%r10, 0, %r12, %p2;
	add.s32 	%r13, %r11, 1;
	setp.gt.s32 	%p3, %r13, {last};
	selp.b32 	%r11, 0, %r13, %p3;
	shl.b32 	%r14, %r10, 13;
	add.s32 	%r15, %r4, %r14;
	bfe.u32 	%r7, %r15, 4, 14;
	cvt.u64.u32 	%rd1, %r7;
	or.b64 	%rd2, %rd1, 4611686293305294848;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{%f1,%f2}}, %rd2, %rd2, %p1, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned {left};
	{barrier}
	shl.b32 	%r16, %r11, 13;
	add.s32 	%r17, %r5, %r16;
	cp.async.cg.shared.global [ %r17 + 0 ], [ %rd9 + 0 ], 0x10, %r9;
	add.s32 	%r20, %r20, 64;
	setp.lt.s32 	%p4, %r20, %r21;
	@%p4 bra 	$L__BB0_1;
	bra.uni 	$L__BB0_2;
$L__BB0_2:
"""


@pytest.mark.parametrize(
    ("last", "left", "barrier", "safe"),
    [
        # A pass's buffer is written in the next pass, after this pass's copy was issued.
        (1, 0, "bar.sync 0;", True),
        (1, 1, "bar.sync 0;", True),
        (2, 1, "bar.sync 0;", True),
        (1, 1, "", False),
        (1, 2, "bar.sync 0;", False),
        # A single buffer.
        (0, 1, "bar.sync 0;", False),
        (0, 0, "bar.sync 0;", True),
    ],
)
def test_buffers_that_take_turns(last: int, left: int, barrier: str, safe: bool) -> None:
    found = hazards(kernel(ROTATING.format(last=last, left=left, barrier=barrier)), 8)
    assert (found == ()) == safe and all(ANYWHERE not in (one.read, one.written) for one in found)


def test_both_ways_of_a_condition_that_nothing_is_known_of() -> None:
    skipped = "\t@%p9 bra \t$L__BB0_1;\n" + BARRIER + "$L__BB0_1:\n"
    assert hazards(kernel(PRODUCT.format(0), WAIT.format(0), skipped, COPY.format(0)), 8)
    known = "\tmov.b32 \t%r30, 3;\n\tsetp.eq.s32 \t%p9, %r30, 4;\n\tadd.s32 \t%r31, %r5, 0;\n"
    # The value of a predicate that an address depends on is known.
    chosen = "\tselp.b32 \t%r31, %r31, %r5, %p9;\n" + COPY.replace("%r5", "%r31").format(0)
    assert not hazards(kernel(PRODUCT.format(0), WAIT.format(0), known, skipped, chosen), 8)


def test_an_operand_of_unknown_place_may_be_anywhere() -> None:
    lost = PRODUCT.replace("%r4, {0}", "%r88, {0}").format(0)
    (found,) = hazards(kernel(lost, WAIT.format(0), COPY.format(1 << 16)), 8)
    assert found.read == ANYWHERE and "may read anywhere" in str(found)


def test_kernels_without_wgmma_have_none_and_a_maze_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hazards(kernel(COPY.format(0)), 8) == ()
    monkeypatch.setattr(module, "_MOST_STATES", 3)
    with pytest.raises(ValueError, match="more than 3 ways through the kernel"):
        hazards(kernel(ROTATING.format(last=2, left=0, barrier="")), 8)


def test_a_register_that_grows_is_unknown_in_the_end() -> None:
    grows = "\tmov.b32 \t%r40, 0;\n$L__BB0_1:\n\tadd.s32 \t%r40, %r40, 16;\n\tadd.s32 \t%r41, %r4, %r40;\n"
    loop = grows + "\tst.shared.b32 \t[%r41], %r1;\n\t@%p4 bra \t$L__BB0_1;\n"
    found = hazards(kernel(PRODUCT.format(1 << 16), WAIT.format(0), loop), 8)
    assert [one.written for one in found] == [ANYWHERE]


# --- addresses

PLACE = Value(1024, 1024 + 48, 0x430, "address")


@pytest.mark.parametrize(
    ("opcode", "given", "expected"),
    [
        ("add.s32", [number(3), number(4)], (7, 7)),
        ("add.s32", [number(-1), number(1)], (0, 0)),
        ("sub.s32", [upto(7), number(2)], (-2, 5)),
        ("mul.lo.s32", [upto(7), number(3)], (0, 21)),
        ("shl.b32", [upto(7), number(4)], (0, 112)),
        ("shr.u32", [number(255), number(5)], (7, 7)),
        ("shr.u32", [None, number(28)], (0, 15)),
        ("and.b32", [upto(255), number(96)], (0, 96)),
        ("and.b32", [None, number(96)], (0, 96)),
        # Disjoint bits add without a carry.
        ("or.b32", [Value(0, 112, 112), Value(0, 3968, 3968)], (0, 4080)),
        ("xor.b32", [Value(0, 112, 112), Value(0, 48, 48)], (0, 112)),
        ("xor.b32", [number(5), number(1)], (4, 4)),
        ("bfe.u32", [number(0b11010), number(1), number(3)], (0b101, 0b101)),
        ("bfe.s32", [number(1), number(0), number(1)], None),
        ("selp.b32", [number(1), number(8), number(0)], (8, 8)),
        ("selp.b32", [number(1), number(8), None], (1, 8)),
        ("selp.b32", [None, number(8), None], None),
        ("setp.lt.s32", [upto(7), number(8)], (1, 1)),
        ("setp.ge.s32", [upto(7), number(8)], (0, 0)),
        ("setp.eq.s32", [upto(7), number(7)], None),
        ("setp.ne.s32", [number(1), number(2)], (1, 1)),
        ("mad.lo.s32", [number(1), number(2), number(3)], None),
        ("add.s32", [PLACE, upto(15)], (1024, 1024 + 63)),
        ("add.s32", [PLACE, PLACE], None),
        ("and.b32", [PLACE, number(-16)], None),
        ("bfe.u32", [PLACE, number(4), number(14)], (1024, 1024 + 48)),
        ("selp.b32", [PLACE, number(1), None], None),
    ],
)
def test_ranges(opcode: str, given: list[Value | None], expected: tuple[int, int] | None) -> None:
    made = result(opcode, given)
    assert (made and (made.low, made.high)) == expected
    if made is not None and made.low >= 0 and not made.where:
        assert all(x & ~made.bits == 0 for x in (made.low, made.high))


def test_descriptors_are_addresses_in_units_of_16_bytes() -> None:
    made = result("bfe.u32", [PLACE, number(4), number(14)])
    assert made is not None and made.where == "descriptor"
    moved = result("add.s64", [made, number(LAYOUT + 2)])
    assert moved is not None and (moved.low, moved.high, moved.layout) == (1056, 1104, LAYOUT)
    # Warpgroups read rows of their own.
    spread = result("add.s32", [made, Value(0, 512, 512)])
    assert spread is not None and (spread.low, spread.high) == (1024, 1072 + 8192)
    assert result("and.b32", [spread, number(16383)]) == spread
    assert result("add.s64", [made, Value(-4, 4, -1)]) is None


def test_operands_and_brackets() -> None:
    values = {"%r1": PLACE, "%r2": None}
    assert operand("%tid.x", values, 256) == Value(0, 255, 255)
    assert operand("0x10", values, 256) == number(16)
    assert operand("%r2", values, 256) is None and operand("%r3", values, 256) is None
    made = address("%r1+32", values, 256)
    assert made is not None and (made.low, made.high) == (1056, 1104)
    assert address("global_smem+8", values, 256) == Value(8, 8, 8, "address")


# --- compiled


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets Triton kernels")
@pytest.mark.parametrize("stages", [1, 3])
def test_compiled_kernels_are_safe_as_long_as_they_have_their_barriers(
    stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import small_kernel

    from mctune.backends.triton.device import VirtualDevice
    from mctune.core.target import resolve

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(4096, 64, dtype=torch.bfloat16, device="meta")
    with VirtualDevice(resolve("h100-sxm")[0]) as device:
        small_kernel.gram(x, x.new_empty(4096, 128, dtype=torch.float32), BT=128, num_stages=stages, num_warps=8)
    asm = device.launches[0].asm
    assert hazards(asm, 8) == ()
    without = re.sub(r"^\s*(bar\.sync|barrier\.cta\.sync)\b.*$", "", asm, flags=re.MULTILINE)
    found = hazards(without, 8)
    assert found and all(ANYWHERE not in (one.read, one.written) for one in found)
