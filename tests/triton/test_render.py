"""What rendering leaves of a template, in a dozen cases that are kept as files.

After a change that is meant, write them again: ``python tests/triton/test_render.py``.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mctune.backends.triton.backend import TritonBackend
from mctune.backends.triton.render import CannotFold, render
from mctune.backends.triton.templates import operations, specialised, values
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import resolve

GOLDEN = Path(__file__).parent / "golden"
_GRM = Problem(aggregation="grm", T=16384, H=16, Dk=128, Dv=128, segment_length=256, dtype="bfloat16")
_SSC = _GRM.replace(recurrence="swla", aggregation="ssc", top_k=4, state_init="checkpoint")
_MEAN = _GRM.replace(aggregation="mean", Dk=48, Dv=80)
_DLA = _GRM.replace(recurrence="dla", Dk=64, Dv=64)
_TITANS = _DLA.replace(recurrence="titans", aggregation="mean", state_init="checkpoint", Dk=48, Dv=80)
_TITANS_ROWS = _DLA.replace(recurrence="titans")
CASES = {
    "segment_states_grm": ("segment_states", _GRM, {}),
    "segment_states_swla": ("segment_states", _SSC, {}),
    "gates_grm": ("gates", _GRM, {}),
    "gates_grouped": ("gates", _SSC, {"formulation": "grouped"}),
    "grouped_read": ("grouped_read", _SSC, {"formulation": "grouped"}),
    "read_forward_grm": ("read_forward", _GRM, {}),
    "read_specialized": ("read_specialized", _GRM, {"formulation": "specialized"}),
    "read_forward_fused": ("read_forward", _GRM, {"gates": "fused", "formulation": "gated"}),
    "read_forward_mean": ("read_forward", _MEAN, {"formulation": "summed"}),
    "pair_order": ("pair_order", _SSC, {"formulation": "grouped"}),
    "read_backward_ssc": ("read_backward", _SSC.replace(pass_="backward"), {"formulation": "per_segment"}),
    "read_backward_grouped": ("read_backward", _SSC.replace(pass_="backward"), {"formulation": "grouped"}),
    "grouped_backward": ("grouped_backward", _SSC.replace(pass_="backward"), {"formulation": "grouped"}),
    "gates_backward_grm": ("gates_backward", _GRM.replace(pass_="backward"), {}),
    "gates_backward_grouped": ("gates_backward", _SSC.replace(pass_="backward"), {"formulation": "grouped"}),
    "state_backward_mean": ("state_backward", _MEAN.replace(pass_="backward"), {}),
    "write_backward_swla": ("write_backward", _SSC.replace(pass_="backward"), {}),
    "decode_combine_swla": ("decode_combine", _SSC.replace(pass_="decode"), {}),
    "deep_write_dla": ("deep_write", _DLA, {}),
    "deep_write_lanes": ("deep_write_lanes", _TITANS.replace(aggregation="grm"), {}),
    "deep_write_rows_down": ("deep_write_rows", _TITANS_ROWS, {}),
    "deep_rows_grm": ("deep_rows", _TITANS_ROWS, {}),
    "deep_rows_soup": ("deep_rows", _TITANS_ROWS.replace(aggregation="soup"), {}),
    "deep_row_output": ("deep_row_output", _TITANS_ROWS.replace(aggregation="soup"), {}),
    "deep_read_grm": ("deep_read", _DLA, {}),
    "deep_read_ssc": ("deep_read", _DLA.replace(aggregation="ssc", top_k=4), {}),
    "deep_mix_soup": ("deep_mix", _DLA.replace(aggregation="soup"), {}),
    "deep_mix_mean": ("deep_mix", _TITANS, {}),
    "deep_replay_dla": ("deep_replay", _DLA.replace(pass_="backward"), {}),
    "deep_replay_titans": ("deep_replay", _TITANS.replace(pass_="backward"), {}),
    "deep_online_backward_grm": ("deep_online_backward", _DLA.replace(pass_="backward"), {}),
    "deep_read_backward_ssc": ("deep_read_backward", _DLA.replace(pass_="backward", aggregation="ssc", top_k=4), {}),
    "deep_read_backward_mean": ("deep_read_backward", _TITANS.replace(pass_="backward"), {}),
    "deep_state_backward_grm": ("deep_state_backward", _DLA.replace(pass_="backward"), {}),
    "deep_write_backward_dla": ("deep_write_backward", _DLA.replace(pass_="backward"), {}),
    "deep_write_backward_titans": ("deep_write_backward", _TITANS.replace(pass_="backward"), {}),
    "deep_decode_gates_ssc": ("deep_decode_gates", _DLA.replace(pass_="decode", aggregation="ssc", top_k=4), {}),
    "deep_decode_grm": ("deep_decode", _DLA.replace(pass_="decode"), {}),
    "deep_decode_titans": ("deep_decode", _TITANS.replace(pass_="decode"), {}),
    "deep_decode_mix_mean": ("deep_decode_mix", _TITANS.replace(pass_="decode"), {}),
    "deep_decode_combine_dla": ("deep_decode_combine", _DLA.replace(pass_="decode"), {}),
    "decode_step_ssc": ("decode_step", _SSC.replace(pass_="decode", state_init="independent"), {}),
}


def rendered(name: str) -> str:
    operation, problem, changes = CASES[name]
    target, _ = resolve("h100-sxm")
    space = TritonBackend().measuring().space(problem)
    config = space.first_valid(lambda config: space.valid(config.replace(**changes), problem, target))
    assert config is not None
    config = config.replace(**changes)
    assert operation in operations(problem, config)
    return specialised(operation, values(operation, problem, config))


@pytest.mark.parametrize("name", CASES)
def test_is_the_golden_file(name: str) -> None:
    text = rendered(name)
    tree = ast.parse(text)
    assert text == (GOLDEN / f"{name}.py").read_text(encoding="utf-8")
    flags = {"SWLA", "AGGREGATION", "ROUTED", "AVERAGES", "HALF", "PRECISION", "FORMULATION", "INDEPENDENT", "OPERAND"}
    flags |= {"SPARSE", "GATES", "MIXES", "SQUARED", "READ", "HELD"}
    found = {x.id for x in ast.walk(tree) if isinstance(x, ast.Name)}
    found |= {x.arg for x in ast.walk(tree) if isinstance(x, ast.arg | ast.keyword) and x.arg is not None}
    assert not found & flags


def test_there_are_no_other_golden_files() -> None:
    assert {path.stem for path in GOLDEN.glob("*.py")} == set(CASES)


def test_a_configuration_from_before_rows_carries_its_states(tmp_path: Path) -> None:
    backend, (target, _) = TritonBackend(), resolve("h100-sxm")
    space = backend.space(_TITANS_ROWS)
    carried = space.first_valid(lambda c: c["write_FORM"] == "states" and space.valid(c, _TITANS_ROWS, target))
    assert carried is not None
    older = Config.of({name: value for name, value in carried.items if name not in space.before})
    assert backend.build(_TITANS_ROWS, older, target, tmp_path) == backend.build(
        _TITANS_ROWS, carried, target, tmp_path
    )
    with pytest.raises(ValueError, match="has no read_BT; search the problem again"):
        backend.build(_TITANS_ROWS, Config.of({n: x for n, x in older.items if n != "read_BT"}), target, tmp_path)


_KERNEL = """import triton
import triton.language as tl


@triton.jit
def kernel(x, y, n, FLAG: tl.constexpr, BT: tl.constexpr):
    # Kept.
    if FLAG:
        tl.store(x, {condition})
    else:
        tl.store(y, n)


def launch(x, y, n, FLAG: bool, BT: int):
    kernel[(1,)](x=x, y=y, n=n, FLAG=FLAG, BT=BT)
"""


def test_dead_branches_parameters_and_arguments_go() -> None:
    text = render(_KERNEL.format(condition="1"), {"FLAG": True, "BT": 8})
    assert "def kernel(x):" in text and "# Kept." in text and "def launch(x, y, n):" in text
    assert "kernel[(1,)](x=x)" in text
    text = render(_KERNEL.format(condition="1"), {"FLAG": False, "BT": 8})
    assert "def kernel(y, n):" in text and "tl.store(y, n)" in text


def test_a_flag_that_cannot_be_folded_is_named() -> None:
    mixed = _KERNEL.replace("if FLAG:", "if FLAG and n > 0:").format(condition="1")
    with pytest.raises(CannotFold, match="kernel: `FLAG and n > 0` mixes a flag with a value of run time"):
        render(mixed, {"FLAG": True, "BT": 8})


if __name__ == "__main__":
    for old in GOLDEN.glob("*.py"):
        old.unlink()
    for case in CASES:
        (GOLDEN / f"{case}.py").write_text(rendered(case), encoding="utf-8")
