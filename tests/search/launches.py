"""What the tests of the cost model are about: a launch that was compiled, and assembly."""

from __future__ import annotations

from dataclasses import replace

from mctune.backends.protocol import Launch
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.search.opcodes import Mix, ptx_mix

H100 = resolve("h100-sxm")[0]
FORWARD = Problem(T=2048, H=16, Dk=128, Dv=128, segment_length=256, dtype="bfloat16")
CONFIG = Config.of({"piece": 128, "gates": "precomputed", "formulation": "per_segment", "precision": "ieee"})

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


def ptx(line: str, warps: int = 4, **constants: str) -> Mix:
    return ptx_mix(line, warps, 32, {f"%{name}": value for name, value in constants.items()})


def launched(name: str = "read_gated_kernel", asm: str = BODY, **changes: object) -> Launch:
    values = tuple({"BT": 64, "BJ": 32, "BV": 128, "T": 2048, "H": 16}.items())
    made = Launch(name, (32, 16, 1), 4, 2, 32, 0, 64, 0, asm, b"", (("q", "*bf16"), ("y", "*bf16")), values)
    return replace(made, **changes)  # type: ignore[arg-type]
