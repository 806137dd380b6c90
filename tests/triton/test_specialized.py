"""The read by specialised warps: where it is allowed, how it is launched, what the compiler makes of it for sm_90."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest

from mctune.backends.protocol import Launch
from mctune.backends.spaces import load_space
from mctune.backends.triton.backend import TritonBackend
from mctune.backends.triton.cost.predict import predict
from mctune.core.config import Config, Scalar
from mctune.core.errors import MctuneError
from mctune.core.outcome import Predicted
from mctune.core.problem import Problem
from mctune.core.target import resolve, targets
from mctune.core.workload import Case
from mctune.runtime.errors import KernelError
from mctune.runtime.kernels.triton.matrix import forward as triton_forward
from mctune.study import calibrate, run
from mctune.study.events import SearchRequest
from mctune.verify.spread import draw_specialized
from mctune.workers import hold

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets Triton kernels", allow_module_level=True)

from mctune.measure.explain import inner_loops

TARGET, _ = resolve("h100-sxm")
PROBLEM = Problem(aggregation="grm", T=16384, H=16, Dk=128, Dv=128, segment_length=256, dtype="bfloat16")
MEASURED = TritonBackend().measuring().space(PROBLEM)


def default_of(problem: Problem) -> Config:
    """The default of the space for predicted searches."""
    space = TritonBackend().space(problem)
    config = space.first_valid(lambda config: space.valid(config, problem, TARGET))
    assert config is not None
    return config


CONFIG = default_of(PROBLEM).replace(formulation="specialized", read_num_stages=3)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Launch, ...]:
    folder = tmp_path_factory.mktemp("specialized")
    built = TritonBackend().build(PROBLEM, CONFIG, TARGET, folder)
    made = TritonBackend().compile(PROBLEM, CONFIG, built, TARGET)
    assert isinstance(made, tuple), made
    return made


# --- where it is allowed


def test_it_is_one_change_away_from_the_default_of_a_measured_search() -> None:
    assert MEASURED.valid(CONFIG, PROBLEM, TARGET)
    assert MEASURED.first_valid(lambda config: MEASURED.valid(config, PROBLEM, TARGET)) == default_of(PROBLEM)


def test_it_is_no_default_and_no_point_of_a_predicted_search() -> None:
    space = load_space("triton", "matrix", "forward")
    assert "specialized" not in space.param("formulation").values
    assert {c["formulation"] for c in (MEASURED.default, *MEASURED.fallbacks)} <= set(space.param("formulation").values)
    for target in targets():
        if target.on_cpu:
            continue
        assert not space.valid(CONFIG, PROBLEM, target)
        assert MEASURED.valid(CONFIG, PROBLEM, target) == (target.arch == "sm_90")


@pytest.mark.parametrize("measure", [True, False])
def test_only_a_search_that_measures_has_it(measure: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "present", lambda target: True)
    case = Case(PROBLEM, (256, 512))
    request = SearchRequest(target=TARGET, cases=(case,), out=tmp_path, backend="triton", trials=9, measure=measure)
    (study,) = run._studies(request)
    assert ("specialized" in study.space().param("formulation").values) == measure


@pytest.mark.parametrize("here", [True, False])
def test_a_gpu_that_verifies_templates_verifies_it(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "present", lambda target: here)
    found = [one for one in hold.candidates(TARGET) if one.config.to_dict().get("formulation") == "specialized"]
    assert [one.problem.dtype for one in found] == (["bfloat16", "float16"] if here else [])
    assert all(MEASURED.valid(one.config, one.problem, TARGET) for one in found)
    assert draw_specialized(resolve("a100")[0]) == []


@pytest.mark.parametrize(
    ("problem", "config", "reason"),
    [
        ({"Dk": 64}, {}, "warps are specialised on sm_90, for linear grm and soup"),
        ({"dtype": "float32"}, {}, "warps are specialised on sm_90, for linear grm and soup"),
        ({"recurrence": "swla"}, {}, "warps are specialised on sm_90, for linear grm and soup"),
        ({"aggregation": "ssc", "top_k": 4}, {}, "warps are specialised on sm_90, for linear grm and soup"),
        ({}, {"gates": "fused"}, "warps are specialised on sm_90, for linear grm and soup"),
        ({}, {"read_num_stages": 1}, "keys and values of specialised warps are in the ring together"),
        ({}, {"read_BT": 128}, "specialised warps read tiles of one size"),
        ({"segment_length": 128}, {"piece": 128}, "a tile longer than a piece computes rows that do not exist"),
    ],
)
def test_what_it_does_not_compute_is_refused(
    problem: dict[str, Scalar], config: dict[str, Scalar], reason: str, tmp_path: Path
) -> None:
    asked, chosen = PROBLEM.replace(**problem), CONFIG.replace(**config)
    assert any(c.reason.startswith(reason) for c in MEASURED.broken(chosen, asked, TARGET))
    with pytest.raises(ValueError) as caught:
        TritonBackend().build(asked, chosen, TARGET, tmp_path)
    assert "\n" not in str(caught.value)


def test_other_gpus_refuse_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = TritonBackend().build(PROBLEM, CONFIG, TARGET, tmp_path)
    monkeypatch.setattr(triton_forward.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_forward.torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(triton_forward.torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(KernelError, match="for GPUs of sm_90, and NVIDIA A100 is none"):
        TritonBackend().load(PROBLEM, CONFIG, built)
    monkeypatch.setattr(triton_forward.torch.cuda, "get_device_capability", lambda: (9, 0))
    TritonBackend().load(PROBLEM, CONFIG, built)


# --- how it is launched and compiled


def test_the_launcher_gives_it_what_it_needs(launches: tuple[Launch, ...]) -> None:
    assert [launch.name for launch in launches] == ["local_kernel", "gates_kernel", "read_specialized_kernel"]
    launch, kinds, values = launches[-1], dict(launches[-1].arguments), dict(launches[-1].values)
    assert launch.grid == (64, 16, 1) and launch.num_warps == 12
    assert kinds["q"].startswith("tensordesc<bf16[64, 128]")
    assert all(kinds[name].startswith("tensordesc<bf16[128, 128]") for name in ("k", "v", "states"))
    pointers = ("begin", "end", "segment", "entering", "seg_first", "tiles")
    assert all(kinds[name] == "*i32" for name in pointers) and kinds["logits"] == kinds["lse"] == "*fp32"
    sizes = {"T": 16384, "H": 16, "N": 64, "P": 64, "scale": 128**-0.5, "STAGES": CONFIG["read_num_stages"]}
    assert {name: values[name] for name in sizes} == sizes


def test_registers_and_shared_memory(launches: tuple[Launch, ...]) -> None:
    """168 for each of 384 threads: the readers take 240, and leave 24 to those that copy."""
    launch = launches[-1]
    stages = int(dict(launch.values)["STAGES"])
    assert launch.registers == 168 and launch.spills <= 8
    assert (2 + stages) * 2**15 < launch.shared <= (2 + stages) * 2**15 + 512
    assert {int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", launch.asm)} >= {24, 240}


def test_the_loops_over_cached_states(launches: tuple[Launch, ...]) -> None:
    """Each group of warps has two products of 64 x 128 x 128, 128 multiplications, little else, and no stack."""
    work = 2.0 * 128 * 128 * 128 / 4  # per warp
    found = inner_loops(launches[-1].binary, launches[-1].name)
    loops = [loop for loop in found if loop.operations == work and loop.issued < 400]
    assert len(loops) == 2
    for loop in loops:
        assert loop.mix["product"] == 16 and loop.mix["stack"] == 0 and loop.issued <= 300, loop
        assert 128 <= loop.mix["float"] <= 170 and loop.mix["shared"] <= 2


def test_a_stage_is_left_only_when_all_warps_have_read_it(launches: tuple[Launch, ...]) -> None:
    """Before an arrival: every product waited for by its warp, then the warps of the group for each other."""
    products, barriers = r"wgmma\.mma_async|wgmma\.wait_group", r"bar\.sync|mbarrier\.arrive\.shared\S*|mbarrier\.init"
    steps = re.findall(rf"{products}|{barriers}|fence\.proxy\.async", launches[-1].asm)
    arrivals = [i for i, step in enumerate(steps) if step.startswith("mbarrier.arrive")]
    assert len(arrivals) == 2 * 4
    for i in arrivals:
        assert steps[i - 1] == "bar.sync"
        before = [step for step in steps[:i] if step.startswith("wgmma")]
        assert not before or before[-1] == "wgmma.wait_group"
    last = max(i for i, step in enumerate(steps) if step == "mbarrier.init")
    assert steps[last + 1] == "fence.proxy.async"


def test_it_is_not_predicted(launches: tuple[Launch, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = predict(launches, PROBLEM, CONFIG, TARGET)
    assert isinstance(outcome, Predicted) and outcome.ms == math.inf
    assert outcome.model.startswith("read_specialized_kernel is not predicted")


def test_calibration_leaves_it_out(
    launches: tuple[Launch, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Backend(TritonBackend):
        def compile(self, *_: object) -> tuple[Launch, ...]:
            return launches

    monkeypatch.setattr(calibrate, "get_backend", lambda name: Backend())
    notes: list[str] = []
    rows = [calibrate.Measured(PROBLEM, CONFIG, 1.0)] * calibrate.LEAST
    with pytest.raises(MctuneError, match="0 measured rows that compile"):
        calibrate.compiled(rows, TARGET, tmp_path, notes.append)
    assert len(notes) == calibrate.LEAST and "read_specialized_kernel is not predicted" in notes[0]
