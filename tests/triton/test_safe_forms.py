"""Known hazards of Triton: which version has them, which compiled kernels show them, which form does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mctune.backends.triton.backend import TritonBackend
from mctune.backends.triton.exposure import exposed, wgmma_of
from mctune.backends.triton.safe import FORMS, environment, newest_ptxas, prefixes, safe
from mctune.backends.triton.versions import HAZARDS, hazards
from mctune.core.outcome import TooLarge
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.verify.spread import default

TARGET, _ = resolve("h100-sxm")
WIDE = Problem(aggregation="grm", T=16384, H=16, Dk=128, Dv=128, segment_length=256, dtype="bfloat16")
EVERY = [
    WIDE.replace(pass_=pass_, aggregation=aggregation, top_k=4 if aggregation == "ssc" else None)
    for pass_ in ("forward", "backward")
    for aggregation in ("grm", "residual", "ssc", "mean")
]


def test_versions() -> None:
    names = {
        version: {h.name for h in hazards(version, "sm_90")} for version in ("3.6.0", "3.7.0", "3.7.1", "3.9.0+git1")
    }
    assert names["3.6.0"] == {hazard.name for hazard in HAZARDS} == names["3.7.0"]
    assert names["3.7.0"] - names["3.7.1"] == {"wgmma fence", "transposed registers"}
    assert names["3.7.1"] - names["3.9.0+git1"] == {"wgmma wait"}
    assert not hazards("3.6.0", "sm_80") and hazards("3.6.0") == hazards("3.6.0", "sm_90")
    assert all(set(hazard.forms) <= set(FORMS) and hazard.forms for hazard in HAZARDS)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("problem", EVERY, ids=lambda problem: f"{problem.pass_}-{problem.aggregation}")
def test_a_safe_form_is_valid_and_stays_as_it_is(problem: Problem, form: str) -> None:
    space, config = TritonBackend().space(problem), default(problem, TARGET)
    found = safe(config, space, problem, TARGET, (form,))
    assert found is not None and space.valid(found, problem, TARGET)
    assert safe(found, space, problem, TARGET, (form,)) == found
    if form == "warps":
        used = {name.partition("_")[0] for name in found if found[name] != config[name]}
        assert used and all(found.integer(f"{prefix}_num_warps") <= 4 for prefix in used)
    if form in ("mma", "ptxas"):
        assert found == config
    for prefix in prefixes(config):
        alone = safe(config, space, problem, TARGET, (form,), (prefix,))
        assert alone is not None and space.valid(alone, problem, TARGET)
        assert {name for name in alone if name not in config or alone[name] != config[name]} <= {
            name for name in alone if name.startswith(f"{prefix}_")
        }


@pytest.mark.parametrize("chip", ["a100", "b200", "mi300x"])
def test_safe_forms_of_other_targets(chip: str) -> None:
    target, _ = resolve(chip)
    for problem in EVERY:
        space, config = TritonBackend().space(problem), default(problem, target)
        assert safe(config, space, problem, target, ("warps", "stages", "operand")) is not None


def test_where_another_assembler_is(tmp_path: Path) -> None:
    for name, version in (("ptxas", "12.8.93"), ("ptxas-blackwell", "12.9.86")):
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 1, V{version}'\n")
        tool.chmod(0o755)
    newer = newest_ptxas(str(tmp_path / "ptxas"))
    assert newer is not None and newer.name in ("ptxas-blackwell", "ptxas")
    assert environment("ptxas", str(tmp_path / "ptxas")) == {"TRITON_PTXAS_PATH": str(newer)}
    (tmp_path / "ptxas-blackwell").unlink()
    if not list(Path("/usr/local").glob("cuda*/bin/ptxas")):
        assert environment("ptxas", str(tmp_path / "ptxas")) is None
    assert environment("warps") == {} and environment("mma") == {"DISABLE_MMA_V3": "1"}


LOOP = """
cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r3,%r4}, {%r5,%r6,%r7,%r8}, %rd2, %p1, 1, 1, 1;
wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r3,%r4}, %rd3, %rd2, %p1, 1, 1, 1;
wgmma.wait_group.sync.aligned 1;
"""


def test_what_is_read_off_the_assembly() -> None:
    found = wgmma_of(LOOP + "bar.sync 0;\nst.shared.b32 [%r1], %r2;\n")
    assert (found.products, found.registers, found.in_flight) == (2, 1, 1)
    assert (found.fences, found.copies) == (0, True)
    assert wgmma_of("fence.proxy.async.shared::cta;\n" + LOOP).fences == 1
    assert wgmma_of("mma.sync.aligned.m16n8k16;\nst.shared.b32 [%r1], %r2;\n").products == 0


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets Triton kernels")
def test_the_form_with_operands_in_shared_memory_has_none_in_registers(tmp_path: Path) -> None:
    small = Problem(pass_="backward", T=1024, H=2, Dk=64, Dv=64, segment_length=128, dtype="bfloat16")
    backend, config = TritonBackend(), default(small, TARGET).replace(dstates_OPERAND="registers")
    shared = safe(config, backend.space(small), small, TARGET, ("operand",))
    assert shared is not None
    found = []
    for one in (config, shared):
        launches = backend.compile(small, one, backend.build(small, one, TARGET, tmp_path), TARGET)
        assert not isinstance(launches, TooLarge)
        (launch,) = (launch for launch in launches if launch.name == "cached_kernel")
        found.append((wgmma_of(launch.asm), set(exposed(launch))))
    (left, names), (right, others) = found
    assert left.registers > 0 and {"transposed registers", "ptxas"} <= names
    assert right.products > 0 and right.registers == 0
    assert not {"wgmma registers", "transposed registers", "ptxas"} & others
