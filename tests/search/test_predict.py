"""The cost model: what assembly is counted as, and that time goes the way that it must."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from mctune.backends.protocol import Launch
from mctune.core.config import Config
from mctune.core.outcome import Predicted, describe, from_json, to_json
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.search import calibrated
from mctune.search.footprint import footprint
from mctune.search.mix import loops_of
from mctune.search.opcodes import Mix, amd_mix, ptx_mix
from mctune.search.parameters import Parameters
from mctune.search.predict import Demand, demands, estimate, predict
from mctune.search.trips import TRIPS, Source, Walk, source_of

H100 = resolve("h100-sxm")[0]
MI300 = resolve("mi300x")[0]
FORWARD = Problem(T=2048, H=16, Dk=128, Dv=128, segment_length=256, dtype="bfloat16")
CONFIG = Config.of({"piece": 128, "gates": "precomputed", "formulation": "per_segment", "precision": "ieee"})


def ptx(line: str, warps: int = 4, **constants: str) -> Mix:
    return ptx_mix(line, warps, 32, {f"%{name}": value for name, value in constants.items()})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # Every warp does 16 x 8 x 16.
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};", {"matrix": 4 * 4096.0}),
        # Half the rate.
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};", {"matrix": 4 * 4096.0}),
        # Four warps together do 64 x 128 x 16, and read rows of 32 B: 64 of the left factor, 128 of the right one.
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, %p1, 1, 1, 0, 1;",
         {"matrix": 2.0 * 64 * 128 * 16, "operands": 32.0 * (64 + 128), "groups": 1}),
        # The left factor is in registers.
        ("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1,%r2}, {%r3,%r4,%r5,%r6}, %rd2, %p1, 1, 1, 1;",
         {"matrix": 2.0 * 64 * 128 * 16, "operands": 32.0 * 128, "groups": 1}),
        ("wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%r1}, %rd1, %rd2, %p1, 1, 1;",
         {"matrix": 2.0 * 2 * 64 * 64 * 8, "operands": 32.0 * 128, "groups": 1}),
        ("@%p3 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd5 + 0 ];",
         {"issue": 4, "loaded": 16.0 * 128, "loads": 1}),
        ("ld.global.b16 %rs1, [%rd1];", {"issue": 4, "loaded": 2.0 * 128, "loads": 1}),
        ("st.global.v2.b32 [ %rd1 + 0 ], { %r1, %r2 };", {"issue": 4, "stored": 8.0 * 128}),
        ("cp.async.cg.shared.global [ %r98 + 0 ], [ %rd39 + 0 ], 0x10, %r103;",
         {"issue": 4, "loaded": 2048, "shared": 2048, "loads": 1, "ahead": 2048}),
        ("ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];", {"issue": 4, "shared": 2048}),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];", {"issue": 4, "shared": 2048}),
        ("ex2.approx.f32 %r1, %r2;", {"issue": 4, "special": 128}),
        ("fma.rn.f32 \t%r1, %r2, %r3, %r4;", {"issue": 4, "fp32": 128}),
        ("fma.rn.f32x2 %rd1, %rd2, %rd3, %rd4;", {"issue": 4, "fp32": 256}),
        ("add.s32 \t%r1, %r2, %r3;", {"issue": 4}),
        ("shfl.sync.bfly.b32 \t%r1, %r2, 1, 31, -1;", {"issue": 4, "shared": 512}),
        ("bar.sync \t0;", {"issue": 4, "barriers": 1}),
        ("mov.b32 \t%r1, 7;", {}),
        ("wgmma.fence.sync.aligned;", {}),
    ],
)  # fmt: skip
def test_ptx(line: str, expected: dict[str, float]) -> None:
    assert ptx(line) == Mix(**expected)


def test_every_warpgroup_reads_its_operands_anew() -> None:
    """64 x 64 x 16 with both in shared memory: 4 KB in the product's 32 cycles, all of the 128 B a cycle."""
    line = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, %p1, 1, 1, 0, 1;"
    one, four = ptx(line), ptx(line, warps=16)
    assert four == Mix(matrix=4 * one.matrix, operands=4 * one.operands, groups=1)
    cycles = one.matrix / 4096
    assert (cycles, one.operands, one.operands / cycles) == (32, 4096, Parameters().shared_bytes)


def test_tcgen05_says_its_shape_in_a_descriptor() -> None:
    code = (128 >> 4) << 24 | (64 >> 3) << 17 | 0x490
    line = "@%p27 tcgen05.mma.cta_group::1.kind::f16 [ %r327 + 0 ], %rd112, %rd113, %r147, %p26;"
    expected = Mix(matrix=2.0 * 128 * 64 * 16, operands=32.0 * (128 + 64))
    assert ptx(line, r147=str(code)) == ptx(line, warps=8, r147=str(code)) == expected
    # An address of tensor memory in the place of the first descriptor.
    tensor = line.replace("%rd112", "[ %r328 + 0 ]")
    assert ptx(tensor, r147=str(code)) == Mix(matrix=2.0 * 128 * 64 * 16, operands=32.0 * 64)


def test_what_came_before_wgmma_is_slower_there() -> None:
    line = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1}, {%r2}, {%r3}, {%r4};"
    old, new, consumer = (loops_of(f".target sm_{arch}\n.entry k()\n{{\n{line}\nret;\n}}", 4, 32).mix.matrix
                          for arch in ("80", "90a", "120a"))  # fmt: skip
    assert old == consumer == 4 * 4096 < new


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]", {"matrix": 2.0 * 32 * 32 * 8 * 4}),
        ("v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], 0", {"matrix": 2.0 * 16 * 16 * 16 * 4}),
        # An eighth of the rate.
        ("v_mfma_f32_32x32x2_f32 a[0:15], v0, v1, a[0:15]", {"matrix": 8 * 2.0 * 32 * 32 * 2 * 4}),
        ("buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen",
         {"issue": 4, "loaded": 4096, "loads": 1, "ahead": 4096}),
        ("global_store_short v[0:1], v2, off", {"issue": 4, "stored": 512}),
        ("ds_read_b128 v[0:3], v4", {"issue": 4, "shared": 4096}),
        ("ds_read2_b64 v[0:3], v4 offset1:1", {"issue": 4, "shared": 4096}),
        ("v_exp_f32_e32 v0, v1", {"issue": 4, "special": 256}),
        ("v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]", {"issue": 4, "fp32": 512}),
        ("v_add_u32_e32 v0, v1, v2", {"issue": 4}),
        ("s_barrier", {"barriers": 1}),
        ("s_add_i32 s0, s0, 1", {}),
    ],
)  # fmt: skip
def test_amd(line: str, expected: dict[str, float]) -> None:
    assert amd_mix(line, 4, 64) == Mix(**expected)


BODY = """
.visible .entry kernel(
	.param .u64 kernel_param_0
)
{
	.reg .b32 	%r<9>;
	ld.global.b32 	%r1, [%rd1];
	@%p1 bra 	$L__BB0_6;
$L__BB0_2:
	ex2.approx.f32 	%r2, %r3;
	ld.shared::cta.b32 	%r8, [%r6];
{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r6], %r7;
	@!complete bra.uni waitLoop;
}
	@%p2 bra 	$L__BB0_4;
	bra.uni 	$L__BB0_3;
$L__BB0_3:
	fma.rn.f32 	%r2, %r3, %r4, %r5;
	fma.rn.f32 	%r2, %r3, %r4, %r5;
	@%p3 bra 	$L__BB0_3;
	bra.uni 	$L__BB0_4;
$L__BB0_4:
	@%p4 bra 	$L__BB0_2;
$L__BB0_5:
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
	@%p5 bra 	$L__BB0_5;
$L__BB0_6:
	st.global.b32 	[%rd1], %r1;
	bra.uni 	$L__BB0_7;
$L__BB0_7:
	ret;
}
"""


def test_loops_are_found_and_nested() -> None:
    """Two loops, one inside the first; a wait in inline assembly is none, nor is a jump backwards without a cycle."""
    found = loops_of(BODY, 1, 32)
    assert (found.mix.loaded, found.mix.stored, found.mix.special, found.mix.fp32) == (128, 128, 0, 0)
    first, second = found.inner
    assert first.mix.special == 32 and first.mix.fp32 == 0 and not first.matrix
    # An instruction with colons is no label.
    assert first.mix.shared == 128
    (inner,) = first.inner
    assert inner.mix.fp32 == 64 and not inner.inner
    assert second.matrix and second.mix.matrix == 4096 and not second.inner


def test_a_backward_jump_to_a_common_exit_is_no_loop() -> None:
    text = ".entry k()\n{\n bra.uni B;\nA:\n add.s32 %r1, %r1, 1;\n ret;\nB:\n add.s32 %r1, %r1, 1;\n bra.uni A;\n}\n"
    found = loops_of(text, 1, 32)
    assert not found.inner and found.mix.issue >= 2


# --- trips


def walk(config: Config = CONFIG, problem: Problem = FORWARD, heaviest: bool = False, **values: int) -> Walk:
    return Walk(problem, config, values, heaviest)


def test_mean_and_most_trips_of_the_read() -> None:
    """8 segments of 2 pieces of 128; tiles of 64 tokens, 32 tokens a step inside the piece."""
    loops = TRIPS["read_forward_kernel"](walk(BT=64, BJ=32, BV=128)).inner
    # A piece's tiles end after 64 and 128 tokens: 2 and 4 steps. 0 to 7 segments are cached.
    assert [loop.trips for loop in loops] == [3, 3.5]
    assert [loop.matrix for loop in loops] == [2 * 64 * 32 * 256, 2 * 64 * 128 * 128]
    loops = TRIPS["read_forward_kernel"](walk(BT=64, BJ=32, BV=128, heaviest=True)).inner
    assert [loop.trips for loop in loops] == [4, 7]


def test_trips_depend_on_gates_and_formulation() -> None:
    fused = TRIPS["read_forward_kernel"](walk(CONFIG.replace(gates="fused"), BT=64, BJ=32, BV=128, BN=16))
    sums, tokens, groups = fused.inner
    assert (sums.trips, tokens.trips, groups.trips) == (0.5, 3, 7 / 8)
    assert groups.trips * groups.inner[0].trips == pytest.approx(3.5)
    ssc = FORWARD.replace(aggregation="ssc", top_k=3)
    grouped = CONFIG.replace(formulation="grouped")
    assert TRIPS["read_forward_kernel"](walk(grouped, ssc, BT=64, BJ=32, BV=128, top_k=3)).inner[1].trips == 3
    residual = FORWARD.replace(aggregation="residual")
    assert len(TRIPS["read_forward_kernel"](walk(CONFIG, residual, BT=64, BJ=32, BV=128)).inner) == 1


def test_gradients_of_chosen_pairs_do_not_grow_with_segments() -> None:
    """2 of past segments each: every segment's pairs together are the tokens' choices."""
    ssc = FORWARD.replace(aggregation="ssc", top_k=2, pass_="backward")
    grouped = CONFIG.replace(formulation="grouped")
    choices = 256 * (0 + 1 + 2 * 6)
    (loop,) = TRIPS["chosen_kernel"](walk(grouped, ssc, BT=64, BK=128)).inner
    assert loop.trips == pytest.approx(choices / 8 / 64 + 0.5) and loop.matrix == 2 * 2 * 64 * 128 * 128
    assert TRIPS["read_backward_kernel"](walk(grouped, ssc, BT=64, BJ=64, BK=128, top_k=2)).inner[1].trips == 2


def test_the_products_of_a_read_are_those_of_the_mathematics() -> None:
    """Whole tiles of whole segments: intra-piece blocks, entering states and cached reads, all tiles of all heads."""
    source = TRIPS["read_forward_kernel"](walk(BT=128, BJ=128, BV=128))
    tiles = FORWARD.T // 128
    cached = sum(2 * past * 256 * 128 * 128 for past in range(8))
    intra = tiles * 2 * 128 * 128 * (128 + 128)
    entering = 8 * 2 * 128 * 128 * 128
    assert source.total * tiles == pytest.approx(cached + intra + entering)


def launched(name: str = "read_forward_kernel", asm: str = BODY, **changes: object) -> Launch:
    values = tuple({"BT": 64, "BJ": 32, "BV": 128, "T": 2048, "H": 16}.items())
    made = Launch(name, (32, 16, 1), 4, 2, 32, 0, 64, 0, asm, b"", (("q", "*bf16"), ("y", "*bf16")), values)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_unknown_kernels_and_parameters_have_no_source() -> None:
    assert source_of(launched("new_kernel"), FORWARD, CONFIG, H100) is None
    assert source_of(launched(values=()), FORWARD, CONFIG, H100) is None
    assert isinstance(source_of(launched(), FORWARD, CONFIG, H100), Source)


@pytest.mark.parametrize("name, ones", [("h100-sxm", 64), ("b200", 64), ("a100-80g", 0), ("rtx5090", 0), ("mi300x", 0)])
def test_keys_are_added_up_by_products_where_these_are_in_flight(name: str, ones: int) -> None:
    launch = launched("local_kernel", values=(("BT", 16), ("BK", 32), ("BV", 64)))
    source = source_of(launch, FORWARD, CONFIG, resolve(name)[0])
    assert source is not None and source.inner[0].matrix == 2 * 16 * 32 * (64 + ones)


def test_footprint_counts_each_array_once() -> None:
    rows = 16 * 2048 * 128 * 2
    assert footprint(launched(), FORWARD, CONFIG) == 2 * rows
    carry = launched(
        "carry_kernel", arguments=(("ends", "*fp32"), ("carried", "*fp32"), ("mystery", "*fp32"), ("T", "i32"))
    )
    assert footprint(carry, FORWARD, CONFIG) == 2 * 16 * 16 * 128 * 128 * 4


LOOP = """
.entry k()
{
	ld.global.v4.b32 	{%r1}, [%rd1];
$L__BB0_1:
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};
	fma.rn.f32 	%r2, %r3, %r4, %r5;
	@%p5 bra 	$L__BB0_1;
	st.global.v4.b32 	[%rd1], {%r1};
	ret;
}
"""


def test_a_loop_is_counted_as_often_as_it_runs() -> None:
    """local_kernel: 128 tokens a piece, 16 a pass."""
    launch = launched("local_kernel", LOOP, values=(("BT", 16), ("BK", 16), ("BV", 8)))
    (asked,) = demands((launch,), FORWARD, CONFIG, H100, Parameters())
    assert asked.mean.matrix == 8 * 4 * 4096 and asked.mean.fp32 == 8 * 128
    assert asked.mean.loaded == asked.mean.stored == 2048
    assert asked.uniform and asked.blocks == 512
    (unknown,) = demands((replace(launch, name="x"),), FORWARD, CONFIG, H100, Parameters(unknown_trips=5))
    assert unknown.mean.fp32 == 5 * 128


def test_a_pass_that_a_pipeline_took_out_of_its_loop_is_not_counted_twice() -> None:
    product = "\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};\n"
    peeled = LOOP.replace("\tst.global", product + "\tfma.rn.f32 \t%r2, %r3, %r4, %r5;\n\tst.global")
    launch = launched("local_kernel", peeled, values=(("BT", 16), ("BK", 16), ("BV", 8)))
    (asked,) = demands((launch,), FORWARD, CONFIG, H100, Parameters())
    assert asked.mean.matrix == 8 * 4 * 4096 and asked.mean.fp32 == 8 * 128


# --- time


def asking(**changes: object) -> Demand:
    """132 blocks, one a multiprocessor, of 100 us of matrix work or so."""
    mix = Mix(matrix=5e8, issue=1e3)
    made = Demand("k", mix, mix, (10.0, 0.0, 1.0), (10.0, 0.0, 1.0), 132, True, 1, 8, 1e6)
    return replace(made, **changes)  # type: ignore[arg-type]


def us(demand: Demand, target=H100, **parameters: float) -> float:
    (part,) = estimate((demand,), target, Parameters(launch_us=0.001, **parameters))
    return part.us


def bound(demand: Demand, target=H100) -> str:
    return estimate((demand,), target, Parameters(launch_us=0.001))[0].bound


@pytest.mark.parametrize(
    ("mix", "unit"),
    [
        (Mix(matrix=1e9, issue=1e3), "matrix units"),
        (Mix(issue=1e6), "instruction issue"),
        (Mix(fp32=1e8), "instruction issue"),
        (Mix(special=1e7), "special functions"),
        (Mix(shared=1e9), "shared memory"),
        (Mix(issue=10), "latency"),
    ],
)
def test_more_work_takes_longer_and_the_unit_is_named(mix: Mix, unit: str) -> None:
    chain = (100.0, 0.0, 20.0) if unit == "latency" else (0.0, 0.0, 0.0)
    one = asking(mean=mix, heaviest=mix, chain=chain, longest=chain)
    assert bound(one) == unit
    twice = Mix(**{name: 2 * value for name, value in vars(mix).items()})
    links = (200.0, 0.0, 40.0) if unit == "latency" else chain
    assert us(replace(one, mean=twice, heaviest=twice, chain=links, longest=links)) == pytest.approx(2 * us(one), 0.02)


def test_peak_matrix_rate_is_what_the_target_says() -> None:
    """132 blocks of 1e9 operations at 989 TFLOP/s, nothing else, at full efficiency."""
    mix = Mix(matrix=1e9)
    asked = asking(mean=mix, heaviest=mix, chain=(0, 0, 0), longest=(0, 0, 0), footprint=0.0)
    assert us(asked, matrix=1.0) == pytest.approx(132e9 / 989e6, rel=1e-3)


def products(count: float, n: int, shared_left: bool = True, warps: int = 8) -> Mix:
    """So many products of 64 x n x 16 by each warpgroup."""
    left = "%rd1" if shared_left else "{%r5,%r6,%r7,%r8}"
    one = ptx(f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{%r1}}, {left}, %rd2, %p1, 1, 1, 0;", warps)
    return Mix(**{name: count * value for name, value in vars(one).items()})


def plain(mix: Mix, **changes: object) -> Demand:
    """Nothing but ``mix``, in whole waves."""
    return asking(mean=mix, heaviest=mix, chain=(0.0, 0.0, 0.0), longest=(0.0, 0.0, 0.0), footprint=0.0, **changes)


def test_a_product_waits_for_its_operands() -> None:
    """64 x 32 x 16 takes 16 cycles, and with both operands in shared memory 3 KB, which are 24 cycles."""
    bare = replace(products(1e5, 32), operands=0.0)
    assert us(plain(products(1e5, 32))) == pytest.approx(1.5 * us(plain(bare)), rel=0.01)
    for n, shared_left in ((64, True), (128, True), (256, True), (32, False), (128, False)):
        mix = products(1e5, n, shared_left)
        assert us(plain(mix)) == pytest.approx(us(plain(replace(mix, operands=0.0))), rel=0.01)


def test_other_traffic_of_shared_memory_comes_on_top_of_operands() -> None:
    mix = products(1e5, 64)
    few, many = (replace(mix, shared=share * mix.operands) for share in (0.2, 1.0))
    assert bound(plain(mix)) == bound(plain(few)) == "matrix units" and bound(plain(many)) == "shared memory"
    # 128 B a cycle for operands, and as many bytes again at the efficiency of other accesses.
    cycles = (mix.operands + many.shared / Parameters().shared) / 128
    assert us(plain(many), exposed=0.0, half_warps=1e-9) == pytest.approx(cycles / H100.clock_ghz / 1e3, rel=1e-3)


@pytest.mark.parametrize(("warps", "factor"), [(4, 1 + 60 / (64 / 0.75)), (8, 1.0), (16, 1.0)])
def test_a_serialized_product_is_hidden_by_other_warpgroups_alone(warps: int, factor: float) -> None:
    """64 cycles at 75 %, then 60 in which the matrix units have only what other warpgroups give them."""
    mix = products(1e4, 128, warps=warps)
    asked = plain(mix, warps=warps)
    slow = replace(asked, serialized=True)
    fast = replace(H100, matrix_tflops=H100.cores * H100.clock_ghz * 4.096)  # 4096 operations a cycle
    assert us(slow, fast) == pytest.approx(factor * us(asked, fast), rel=0.01)
    assert us(slow, fast, serialized_cycles=600.0) > 1.2 * us(slow, fast)


def test_nothing_overlaps_with_the_serialized_products_of_one_warpgroup() -> None:
    mix = replace(products(1e4, 256, warps=4), special=3e7)
    one = plain(mix, warps=4)
    alone = [us(plain(part, warps=4)) for part in (replace(mix, special=0.0), Mix(special=mix.special))]
    assert us(replace(one, serialized=True), serialized_cycles=1e-9) == pytest.approx(sum(alone), rel=0.01)
    shares = [us(replace(one, warps=warps, serialized=True)) / us(replace(one, warps=warps)) for warps in (4, 8, 16)]
    assert shares[0] > shares[1] > shares[2] > 1


def test_a_block_over_a_wave_costs_a_wave() -> None:
    one, over, two = (us(asking(blocks=blocks)) for blocks in (132, 133, 264))
    assert over == pytest.approx(two) and over == pytest.approx(2 * one, rel=0.01)
    # Of an uneven grid whose longest start first it does not.
    uneven = asking(uniform=False)
    assert us(replace(uneven, blocks=1330)) == pytest.approx(us(replace(uneven, blocks=1320)), rel=0.02)


def test_no_grid_ends_before_its_longest_block() -> None:
    long = Mix(matrix=5e9, issue=1e4)
    uneven = asking(uniform=False, heaviest=long, blocks=264)
    assert us(uneven) >= us(asking(mean=long, heaviest=long, blocks=1))


def test_half_the_bandwidth_is_slower_where_memory_bounds() -> None:
    mix = Mix(loaded=1e6, stored=1e6)
    asked = asking(mean=mix, heaviest=mix, footprint=264e6)
    slow = replace(H100, dram_gbs=H100.dram_gbs / 2)
    assert bound(asked) == "DRAM"
    assert us(asked, slow) == pytest.approx(2 * us(asked), rel=0.1)
    assert us(asking(), slow) == pytest.approx(us(asking()), rel=0.01)


def test_arrays_larger_than_the_cache_are_read_more_than_once() -> None:
    mix = Mix(loaded=2e7)
    asked = asking(mean=mix, heaviest=mix, footprint=4e8)
    assert us(asked, replace(H100, cache_mb=25.0)) > us(asked, replace(H100, cache_mb=400.0))
    # And never more bytes than are loaded.
    few = Mix(loaded=1e4)
    assert us(asking(mean=few, heaviest=few, footprint=4e12)) < us(asked)


def test_few_warps_hide_less() -> None:
    mix = Mix(matrix=5e8, issue=1e5)
    assert us(asking(mean=mix, heaviest=mix, warps=4)) > us(asking(mean=mix, heaviest=mix, warps=16))
    # Two blocks at once hide each other's waits.
    waits = asking(mean=Mix(issue=10), heaviest=Mix(issue=10), chain=(10.0, 0.0, 50.0), blocks=264)
    assert us(replace(waits, resident=2)) == pytest.approx(us(waits) / 2, rel=0.05)


SERIALIZED = "C7515 wgmma.mma_async instructions are serialized due to something"
WGMMA = LOOP.replace(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};",
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, %p1, 1, 1, 0, 0;",
)


def test_serialized_products_are_priced_in_loops_alone() -> None:
    values = (("BT", 16), ("BK", 64), ("BV", 64))
    outside = WGMMA.replace("$L__BB0_1:\n", "").replace("\t@%p5 bra \t$L__BB0_1;\n", "")
    for asm, notes, expected in (
        (WGMMA, (SERIALIZED,), True),
        (WGMMA, ("C7507 'setmaxnreg' ignored to maintain minimum register requirements.",), False),
        (outside, (SERIALIZED,), False),
    ):
        launch = launched("local_kernel", asm, values=values, notes=notes)
        (asked,) = demands((launch,), FORWARD, CONFIG, H100, Parameters())
        assert asked.serialized == expected and asked.mean.groups == (8 if asm == WGMMA else 1)


def test_operands_of_products_that_are_not_done_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    work = 2.0 * 64 * 64 * 16
    launch = launched("local_kernel", WGMMA.replace("st.global", "ld.global"))
    for conditional, left in ((0.0, 1.0), (work / 4, 0.75)):
        loop = Source(1, work - conditional, conditional=conditional)
        monkeypatch.setitem(TRIPS, "local_kernel", lambda walk, loop=loop: Source(1, 0, (loop,)))
        (asked,) = demands((launch,), FORWARD, CONFIG, H100, Parameters())
        assert (asked.mean.matrix, asked.mean.operands, asked.mean.groups) == (left * work, left * 4096, left)


def test_what_the_compiler_says_is_in_the_outcome() -> None:
    launch = launched("local_kernel", WGMMA, notes=(SERIALIZED,), values=(("BT", 16), ("BK", 64), ("BV", 64)))
    made = predict((launch, launch, launched()), FORWARD, CONFIG, H100)
    assert made.notes == (f"local_kernel: {SERIALIZED}",)
    assert describe(made).endswith(f"); local_kernel: {SERIALIZED}")
    assert from_json(to_json(made)) == made
    # Records of before there were notes.
    old = {name: value for name, value in json.loads(to_json(made)).items() if name != "notes"}
    assert from_json(json.dumps(old)) == replace(made, notes=())


def test_spills_cost() -> None:
    launch = launched("local_kernel", LOOP, values=(("BT", 16), ("BK", 16), ("BV", 8)))
    times = []
    for spills in (0, 64, 512):
        asked = demands((replace(launch, spills=spills),), FORWARD, CONFIG, H100, Parameters())
        times.append(estimate(asked, H100, Parameters())[0].us)
    assert times[0] < times[1] < times[2]


def test_a_launch_costs_and_so_do_those_of_other_libraries() -> None:
    part = estimate((asking(),), H100, Parameters())[0]
    assert part.us == pytest.approx(us(asking()) + Parameters().launch_us, abs=0.01)
    assert estimate((asking(extra=3),), H100, Parameters())[0].us == pytest.approx(part.us + 3 * Parameters().launch_us)


def test_better_gpus_are_faster_on_the_same_demand() -> None:
    asked = asking(mean=Mix(matrix=5e8, loaded=1e6), blocks=1320, footprint=1e9)
    names = ("h100-sxm", "h100-pcie", "a100-80g", "l4")
    times = [us(asked, resolve(name)[0]) for name in names]
    assert times == sorted(times)
    assert us(asked, MI300) < math.inf


def test_predict_says_that_it_is_a_model(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrated, "search_spaces_dir", lambda: tmp_path / "search_spaces")
    launch = launched("local_kernel", LOOP, values=(("BT", 16), ("BK", 16), ("BV", 8)))
    made = predict((launch, launch), FORWARD, CONFIG, H100)
    assert isinstance(made, Predicted) and made.ms > 0 and made.error is None
    assert made.model.startswith("cost model, not calibrated: local_kernel 50% by ")
    calibrated.write_calibration(tmp_path / "results" / "h100-sxm" / calibrated.FILE, Parameters(launch_us=1e4), "x")
    after = predict((launch, launch), FORWARD, CONFIG, H100)
    assert after.ms == pytest.approx(20.0, rel=0.01) and "cost model, calibrated: " in after.model
    assert predict((launch,), FORWARD, CONFIG, resolve("h200")[0]).ms < 1
