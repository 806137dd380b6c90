"""The cost model's time: it goes the way that it must, and says that it is a model."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from mctune.backends.triton.cost import calibrated
from mctune.backends.triton.cost.opcodes import Mix
from mctune.backends.triton.cost.parameters import Parameters
from mctune.backends.triton.cost.predict import Demand, demands, estimate, predict
from mctune.backends.triton.cost.trips import TRIPS
from mctune.backends.triton.cost.walk import Source
from mctune.core.outcome import Predicted, describe, from_json, to_json
from mctune.core.target import resolve
from tests.cost.launches import CONFIG, FORWARD, H100, LOOP, launched, ptx

MI300 = resolve("mi300x")[0]


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
    # An uneven grid whose longest programs start first has no such tail.
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
    # But never more bytes than are loaded.
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
    # Records written before notes existed.
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
