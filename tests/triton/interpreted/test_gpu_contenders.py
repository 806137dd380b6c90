"""What `mctune bench` compares on a GPU, and what it makes of the figures."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mctune.backends import get_backend
from mctune.core.outcome import Timed
from mctune.core.target import resolve
from mctune.core.work import bound, work
from mctune.runtime.kernels.triton.matrix import backward as triton_backward
from mctune.runtime.kernels.triton.tables import make_tables
from mctune.runtime.segments import make_segments

TARGET, _ = resolve("h200")


def tiny(gpu: ModuleType, kind: str) -> Any:
    return gpu.Shape(kind, 1, 41, 2, 16, 16, "float16")


def timing(name: str, computes: str, ms: float) -> Any:
    return sys.modules["mctune.measure.gpu.goals"].Timing(name, computes, Timed(ms, ms, ms, 9, 0.0), 0.1, {})


# --- the recurrence alone


@pytest.mark.parametrize(("T", "C"), [(16384, 256), (65536, 256), (2048, 64), (16384, 512)])
def test_base_is_residual_in_segments_that_a_piece_holds_whole(gpu: ModuleType, T: int, C: int) -> None:
    shape = gpu.Shape("training", 1, T, 16, 128, C)
    problem = shape.problem("base")
    assert (problem.aggregation, problem.segment_length) == ("residual", 256)
    space = get_backend("triton").space(problem)
    config = space.first_valid(lambda candidate: space.valid(candidate, problem, TARGET))
    assert config is not None and config["saved"] == "states"
    segments = make_segments(T, "constant", problem.segment_length, None)
    tables = make_tables(segments, config.integer("piece"), False, torch.device("cpu"))
    assert tables.whole and segments.count == T // 256


def test_base_is_plain_linear_attention_and_computes_its_states_once(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, shape = sys.modules["mctune.measure.gpu.contenders"], tiny(gpu, "training")
    data = module.Data.of(shape)
    # Several segments, so that there are states to compute again.
    assert shape.problem("base").segment_length < shape.T
    monkeypatch.setattr(triton_backward, "states_of", lambda *_: pytest.fail("the states are computed again"))
    found = module.Kernels("base", TARGET, None, tmp_path).make(shape, data)()
    q, k, v = (x.double().requires_grad_() for x in (data.q, data.k, data.v))
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril() * shape.D**-0.5
    y = torch.einsum("bhts,bshd->bthd", scores, v)
    wanted = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(y, (q, k, v), data.dy.double()), strict=True))
    # What all that compute it are held to has no segments.
    assert shape.meaning("base").segment_length == shape.T
    held = module.eager(shape, data, "base")()
    for name, x in {"y": y.detach(), **wanted}.items():
        assert sys.modules["mctune.measure.gpu.timings"].error_ratio(found[name].double(), x) < 2e-3, name
        assert sys.modules["mctune.measure.gpu.timings"].error_ratio(held[name].double(), x) < 1e-6, name


def test_the_bound_of_base_is_that_of_the_recurrence_without_a_cache(gpu: ModuleType) -> None:
    shape, reached = gpu.Shape("training", 1, 16384, 16, 128, 256), gpu.Rates(8e14, 4e12)
    alone = shape.problem("base").replace(segment_length=shape.T)
    shortest = sum(bound(work(alone.replace(pass_=p)), 8e14, 4e12) for p in ("forward", "backward"))
    fractions = [
        sys.modules["mctune.measure.gpu.goals"].fraction(shape, timing(name, "base", 2.0), reached)
        for name in ("mctune base, defaults", "fla chunk_linear_attn")
    ]
    assert fractions == [pytest.approx(shortest * 1e3 / 2.0)] * 2
    in_segments = sum(bound(work(shape.problem("base").replace(pass_=p)), 8e14, 4e12) for p in ("forward", "backward"))
    assert shortest < in_segments


def test_rows_of_another_base_are_not_mixed_with_this_one(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, shape, own = tmp_path / "rows.jsonl", gpu.Shape("training", 1, 16384, 16, 128, 256), gpu.identity(None)
    assert "residual" in own["computes"]["base"][0] and " C256 " in own["computes"]["base"][0]
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["mctune.measure.gpu.shapes"], "BASE_SEGMENT", 1024)
        other = gpu.identity(None)
    assert other != own
    gpu.Record(path, other).add(shape, [timing("mctune base", "base", 1.0)])
    assert not gpu.Record.read(path, own, []).found and gpu.Record.read(path, other, []).found
    older = {name: value for name, value in own.items() if name != "computes"}
    gpu.Record(path, older).add(shape, [timing("mctune base", "base", 1.0)])
    assert not gpu.Record.read(path, own, []).found


# --- attention


def whole_context(data: Any) -> torch.Tensor:
    """The attention of the last token, [B, H, 1, D], in float64."""
    q, k, v = (x.transpose(1, 2).double() for x in (data.q[:, -1:], data.k, data.v))
    return F.scaled_dot_product_attention(q, k, v)


def causal(data: Any) -> list[torch.Tensor]:
    """y, dq, dk, dv, [B, T, H, D], in float64."""
    inputs = [x.double().requires_grad_() for x in (data.q, data.k, data.v)]
    y = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), is_causal=True).transpose(1, 2)
    return [y.detach(), *torch.autograd.grad(y, inputs, data.dy.double())]


def names(gpu: ModuleType, kind: str, folder: Path) -> list[str]:
    return [one.name for one in gpu.contenders(tiny(gpu, kind), TARGET, None, folder)]


def test_a_decoded_token_has_every_form_of_torch_s_attention(gpu: ModuleType, tmp_path: Path) -> None:
    module, shape = sys.modules["mctune.measure.gpu.contenders"], tiny(gpu, "decode")
    data, made = module.Data.of(shape), {}
    for one in gpu.contenders(shape, TARGET, None, tmp_path):
        if one.name.startswith(module.TORCH_ATTENTION):
            assert one.built and not one.computes
            made[one.name] = one.make
    assert set(made) == {"sdpa, flash", "sdpa, cudnn", "sdpa, efficient", "products and softmax"}
    assert data.heads_first is data.heads_first and all(x.is_contiguous() for x in data.heads_first)
    for name in ("sdpa, flash", "products and softmax"):  # the others have no CPU
        y = made[name](shape, data)()["y"]
        assert y.dtype == torch.float16
        torch.testing.assert_close(y.double(), whole_context(data), rtol=5e-3, atol=2e-3)
    assert "sdpa, efficient" not in names(gpu, "training", tmp_path)


@pytest.fixture
def fa3(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """FlashAttention 3, as far as it is called: it takes [B, T, H, D], and of a cache no gradient."""
    module = ModuleType("flash_attn_interface")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2)

    module.flash_attn_func = attend  # type: ignore[attr-defined]
    module.flash_attn_with_kvcache = attend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("tuples", [False, True])
def test_flash_attention_3_joins_where_the_machine_has_it(
    gpu: ModuleType, tmp_path: Path, fa3: ModuleType, tuples: bool
) -> None:
    module, attend = sys.modules["mctune.measure.gpu.contenders"], fa3.flash_attn_func
    if tuples:
        for name in ("flash_attn_func", "flash_attn_with_kvcache"):
            setattr(fa3, name, lambda *args, **options: (attend(*args, **options), None))
    made = {
        kind: next(c for c in gpu.contenders(tiny(gpu, kind), TARGET, None, tmp_path) if c.name == "flash attention 3")
        for kind in ("forward", "training", "decode")
    }
    data = module.Data.of(tiny(gpu, "training"))
    assert set(made["forward"].make(tiny(gpu, "forward"), data)()) == {"y"}
    found = made["training"].make(tiny(gpu, "training"), data)()
    assert list(found) == ["y", "dq", "dk", "dv"]
    for x, wanted in zip(found.values(), causal(data), strict=True):
        torch.testing.assert_close(x.double(), wanted, rtol=1e-2, atol=1e-2)
    y = made["decode"].make(tiny(gpu, "decode"), data)()["y"].transpose(1, 2)
    torch.testing.assert_close(y.double(), whole_context(data), rtol=5e-3, atol=2e-3)


def test_without_flash_attention_3_nothing_is_said_of_it(gpu: ModuleType, tmp_path: Path) -> None:
    assert "flash attention 3" not in names(gpu, "decode", tmp_path)


# --- one that fails


def fails(at: str, ours: Callable[..., Any]) -> dict[str, Any]:
    """What of a contender is replaced so that it fails there."""

    def make(shape: Any, data: Any) -> Any:
        call = ours(shape, data)
        if at == "make":
            raise ImportError("planted: undefined symbol")

        def run() -> Any:
            if at == "call":
                raise RuntimeError("planted: no kernel")
            return {name: x * float("nan") for name, x in call().items()}

        return run

    def config(shape: Any) -> Any:
        raise KeyError("planted")

    return {"config": config} if at == "config" else {"make": make}


@pytest.mark.parametrize("at", ["make", "call", "result", "config"])
def test_one_that_fails_loses_no_other(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    measure, shape = sys.modules["mctune.measure.gpu.timings"], tiny(gpu, "forward")
    calls, eager = list[str](), sys.modules["mctune.measure.gpu.contenders"].eager
    monkeypatch.setattr(measure, "eager", lambda *args: calls.append(args[2]) or eager(*args))
    good = gpu.Contender("good", "grm", lambda shape, data: eager(shape, data, "grm"))
    bad = replace(good, name="bad", **fails(at, good.make))
    found = gpu.measured(shape, [good, bad, replace(good, name="last")], 2, gpu.Trying(tmp_path / "trying"))
    assert [one.name for one in found] == ["good", "last"]
    assert "bad left out: " in capsys.readouterr().err
    # Three are held to what is computed once.
    assert calls == ["grm"]


# --- what was wanted


def test_goals_are_of_the_figures(gpu: ModuleType) -> None:
    def measured(**ms: float) -> list[Any]:
        known = {
            "grm": ("mctune grm, defaults", "grm"), "narrow": ("mctune grm, 16-bit states", "grm"),
            "ssc": ("mctune ssc", "ssc"), "base": ("mctune base, defaults", "base"), "flash": ("sdpa, flash", ""),
            "cudnn": ("sdpa, cudnn", ""), "products": ("products and softmax", ""), "fa3": ("flash attention 3", ""),
            "linear": ("fla chunk_linear_attn", "base"), "gla": ("fla chunk_simple_gla", ""),
        }  # fmt: skip
        return [timing(*known[name], time) for name, time in ms.items()]

    def shape(kind: str, T: int) -> Any:
        return gpu.Shape(kind, 1, T, 16, 128, 256)

    found = {
        shape("training", 16384): measured(grm=2.0, ssc=1.5, base=1.0, flash=5.2, cudnn=4.0, linear=0.9, gla=1.1),
        shape("training", 65536): measured(grm=20.0, ssc=6.4, base=4.0, flash=90.0),
        shape("forward", 16384): measured(grm=1.0),
        # States of 32 bits are not what is meant, nor is attention that is not torch's; the best of torch's is.
        shape("decode", 16385): measured(grm=0.001, narrow=0.02, flash=0.05, products=0.035, fa3=0.02),
    }
    judged = gpu.goals(found, gpu.Rates(8e14, 4e12))
    ratios = [goal for goal in judged if "bound" not in goal.name]
    assert [(round(goal.figure, 3), goal.wanted, goal.most, goal.met) for goal in ratios] == [
        (2.6, 2.5, False, True), (0.9, 1.0, False, False), (1.75, 2.0, False, False), (1.6, 1.8, True, True),
        (1.6, 1.5, True, False),
    ]  # fmt: skip
    (part,) = (goal for goal in judged if "of the bound" in goal.name)
    assert part.wanted == 0.6 and part.figure == pytest.approx(
        sys.modules["mctune.measure.gpu.goals"].fraction(shape("forward", 16384), found[shape("forward", 16384)][0],
                                           gpu.Rates(8e14, 4e12))
    )  # fmt: skip
    said = [str(goal) for goal in judged]
    assert any("fla's chunk kernels (fla chunk_linear_attn)" in line for line in said)
    assert any("the best of torch's attention (products and softmax), at least 2 wanted" in line for line in said)
    assert said[-1].startswith("MISSED 1.60 SSC top 4") and said[-1].endswith("at most 1.5 wanted")
    assert judged[-1].to_dict()["met"] is False and not gpu.goals({}, gpu.Rates(8e14, 4e12))


def test_tables_say_what_base_is(gpu: ModuleType) -> None:
    report, shape = sys.modules["mctune.measure.gpu.goals"], gpu.Shape("training", 1, 16384, 16, 128, 256)
    reached = gpu.Rates(8e14, 4e12)
    assert report.base(256) in gpu.table(shape, [timing("mctune base", "base", 1.0)], reached)
    assert "base:" not in gpu.table(shape, [timing("mctune grm", "grm", 1.0)], reached)
    assert report.surroundings(TARGET)["base"] == report.base(256)
