"""The cost model's counts: of assembly, of loops' trips, of bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mctune.backends.triton.cost.footprint import footprint
from mctune.backends.triton.cost.mix import loops_of
from mctune.backends.triton.cost.opcodes import Mix, amd_mix
from mctune.backends.triton.cost.parameters import Parameters
from mctune.backends.triton.cost.predict import demands
from mctune.backends.triton.cost.trips import TRIPS, source_of
from mctune.backends.triton.cost.walk import Source, Walk
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import resolve
from tests.cost.launches import BODY, CONFIG, FORWARD, H100, LOOP, launched, ptx


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # Each warp computes 16 x 8 x 16.
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};", {"matrix": 4 * 4096.0}),
        # At half the rate.
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4};", {"matrix": 4 * 4096.0}),
        # Four warps together compute 64 x 128 x 16 and read rows of 32 B: 64 of the left factor, 128 of the right one.
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
    # An address in tensor memory instead of the first descriptor.
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
        # At an eighth of the rate.
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


def test_loops_are_found_and_nested() -> None:
    """Two loops, one inside the first; a wait in inline assembly is none, nor is a jump backwards without a cycle."""
    found = loops_of(BODY, 1, 32)
    assert (found.mix.loaded, found.mix.stored, found.mix.special, found.mix.fp32) == (128, 128, 0, 0)
    first, second = found.inner
    assert first.mix.special == 32 and first.mix.fp32 == 0 and not first.matrix
    # An instruction with colons is not a label.
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
    loops = TRIPS["read_gated_kernel"](walk(BT=64, BJ=32, BV=128)).inner
    # A piece's tiles end after 64 and 128 tokens: 2 and 4 steps. 0 to 7 segments are cached.
    assert [loop.trips for loop in loops] == [3, 3.5]
    assert [loop.matrix for loop in loops] == [2 * 64 * 32 * 256, 2 * 64 * 128 * 128]
    loops = TRIPS["read_gated_kernel"](walk(BT=64, BJ=32, BV=128, heaviest=True)).inner
    assert [loop.trips for loop in loops] == [4, 7]


def test_trips_depend_on_gates_and_formulation() -> None:
    fused = TRIPS["read_fused_kernel"](walk(CONFIG.replace(gates="fused"), BT=64, BJ=32, BV=128, BN=16))
    sums, tokens, groups = fused.inner
    assert (sums.trips, tokens.trips, groups.trips) == (0.5, 3, 7 / 8)
    assert groups.trips * groups.inner[0].trips == pytest.approx(3.5)
    ssc = FORWARD.replace(aggregation="ssc", top_k=3)
    grouped = CONFIG.replace(formulation="grouped")
    assert TRIPS["read_pairs_kernel"](walk(grouped, ssc, BT=64, BJ=32, BV=128, top_k=3)).inner[1].trips == 3
    residual = FORWARD.replace(aggregation="residual")
    assert len(TRIPS["read_summed_kernel"](walk(CONFIG, residual, BT=64, BJ=32, BV=128)).inner) == 1


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
    source = TRIPS["read_gated_kernel"](walk(BT=128, BJ=128, BV=128))
    tiles = FORWARD.T // 128
    cached = sum(2 * past * 256 * 128 * 128 for past in range(8))
    intra = tiles * 2 * 128 * 128 * (128 + 128)
    entering = 8 * 2 * 128 * 128 * 128
    assert source.total * tiles == pytest.approx(cached + intra + entering)


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


def test_weights_of_rows_are_counted_as_far_as_they_are_read() -> None:
    """Segments of 32 tokens in chunks of 16: 32 * 33 / 2 weights each; one row a chunk, or the last, for some."""
    problem = Problem(recurrence="titans", B=1, T=64, H=2, Dk=32, Dv=32, expansion=2, segment_length=32, inner_chunk=16,
                      aggregation="grm", dtype="bfloat16")  # fmt: skip
    sizes = [
        footprint(launched(name, arguments=(("pairs", "*bf16"),)), problem, CONFIG)
        for name in ("weights_kernel", "row_read_kernel", "write_rows_kernel", "row_states_kernel")
    ]
    triangle = 2 * 2 * (32 * 33 / 2) * 2
    assert sizes == pytest.approx([triangle, triangle, triangle / 16, 2 * 2 * 32 * 2])


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
