"""benchmarks/compiled.py: what it prints of a kernel, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "compiled.py"
SMALL = "T=512,H=2,Dk=32,Dv=32,segment_length=64,aggregation=mean,dtype=bfloat16"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


def test_every_launch_has_a_line() -> None:
    done = run("--gpu", "h100", "--problem", SMALL, "--set", "read_BJ=32,states_num_warps=4")
    assert done.returncode == 0, done.stderr
    title, header, *lines, last = done.stdout.splitlines()
    assert title.startswith("forward linear mean") and last.startswith("predicted ")
    kernels = {line.split()[0]: line.split() for line in lines}
    assert list(kernels) == ["local", "carry", "read_forward"] and kernels["local"][2] == "4"
    # Pieces of 64 tokens, two heads; products on Hopper's matrix units.
    assert kernels["read_forward"][1] == "16" and int(kernels["read_forward"][header.split().index("product")]) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "t4"), "T4 (sm_75) has no backend"),
        (("--gpu", "cpu"), "cpu is a CPU"),
        (("--problem", SMALL, "--set", "read_BT=3"), "read_BT=3: it may be 16, 32"),
        (("--problem", SMALL, "--set", "tiles=3"), "no parameter 'tiles'"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0 and done.stderr.startswith("compiled.py: error: ") and said in done.stderr
