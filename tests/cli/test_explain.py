"""`mctune explain`: what it prints of a kernel, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mctune.backends.protocol import Launch
from mctune.backends.triton.hazards import Hazard
from mctune.core.problem import Problem
from mctune.core.target import resolve
from mctune.measure import explain
from mctune.report.compiled import read_explanation
from mctune.report.page.content import read_content
from mctune.report.write import read_document, write_results

LONG = "recurrence=titans,T=4096,H=2,Dk=32,Dv=32,segment_length=2048,aggregation=mean,dtype=bfloat16"
SMALL = "T=512,H=2,Dk=32,Dv=32,segment_length=64,aggregation=mean,dtype=bfloat16"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mctune", "explain", *arguments], capture_output=True, text=True, timeout=300
    )


def test_every_launch_has_a_line() -> None:
    done = run("--gpu", "h100", "--problem", SMALL, "--set", "read_BJ=32,states_num_warps=4")
    assert done.returncode == 0, done.stderr
    title, header, *lines, last = done.stdout.splitlines()
    assert title.startswith("forward linear mean") and last.startswith("predicted ")
    kernels = {line.split()[0]: line.split() for line in lines if not line.startswith("local_kernel: C75")}
    assert list(kernels) == ["local", "carry", "read_summed"] and kernels["local"][2] == "4"
    # Pieces of 64 tokens, two heads; products on Hopper's matrix units.
    assert kernels["read_summed"][1] == "16" and int(kernels["read_summed"][header.split().index("product")]) > 0


def test_a_gpu_whose_assembly_is_not_read_has_the_rest() -> None:
    done = run("--gpu", "mi300x", "--problem", SMALL)
    assert done.returncode == 0, done.stderr
    _, header, *lines, last = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["local", "carry", "read_summed"] and last.startswith("predicted ")
    loop = slice(header.index("product"), header.index("MiB L2"))
    assert not any(line[loop].strip() for line in lines) and all(line[loop.stop :].split() for line in lines)


def test_what_ptxas_says_and_what_products_read_are_told() -> None:
    problem = SMALL.replace("mean", "grm").replace("=32", "=64") + ",pass=backward"
    done = run("--gpu", "h100", "--problem", problem, "--set", "dstates_OPERAND=registers")
    assert done.returncode == 0, done.stderr
    _, header, *lines, _ = done.stdout.splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert "C7515" in rows["cached"] and not any("C75" in rows[name] for name in ("connector", "descriptor"))
    assert any(line.startswith("cached_kernel: C7515 wgmma.mma_async instructions are serialized") for line in lines)
    # 4 of 64 x 64 x 16 by each of two warpgroups, the left factor in registers: 2 KB in the 32 cycles of one.
    begins = [header.index(name) for name in ("cyc MMA", "cyc opnd", "cyc issue")]
    cycles = [int(rows["cached"][begin:].split()[0]) for begin in begins[:2]]
    assert cycles == [8 * 32, 8 * 2048 // 128]


def test_rows_of_the_page() -> None:
    cells = (*"kbwrs", "84", "2", "4", *"1234567", "512", "384", "538", "issue", "C7515", "", "20")
    bare = ("c", "1", "4", "32", "0", "0", "8", *[""] * 11, "", "", "", "3")
    rows = [(*cells, "10", "96", "matrix units", "19%"), (*bare, "2", "4", "DRAM", "50%")]
    assert explain.markdown(rows, "forward").splitlines() == [
        "| k | b | w | r | s | 84 | 2 | 1, 2, 3, 4, 18 | 512, 384, 538 | C7515 | 20 | 10 | 96 (products) |",
        "| c | 1 | 4 | 32 | 0 | 0 | 8 | 0, 0, 0, 0, 0 | 0, 0, 0 | | 3 | 2 | 4 (DRAM) |",
        "| **forward** | | | | | | | | | | 23 | 12 | **100** |",
    ]


def test_a_package_is_explained_kernel_by_kernel_and_kept_with_its_rows(tmp_path: Path) -> None:
    problem = Problem(T=512, H=2, Dk=32, Dv=32, segment_length=64, aggregation="mean", dtype="bfloat16")
    target, _ = resolve("h100-sxm")
    config = explain.chosen_config(problem, target, {})
    entry = {
        "problem": problem.to_dict(), "config": config.to_dict(), "backend": "triton",
        "outcome": {"kind": "predicted", "ms": 0.01, "model": "m"},
    }  # fmt: skip
    table = {"schema": 1, "target": {"name": target.name, "title": target.title}, "versions": {}, "entries": [entry]}
    (tmp_path / "tuned.json").write_text(json.dumps(table))
    done = run("--package", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    (tmp_path / "compiled.json").write_text(done.stdout)
    explanation = read_explanation(tmp_path / "compiled.json")
    assert explanation is not None and explanation.target == "h100-sxm"
    (folder,) = write_results([read_document(tmp_path)], tmp_path / "results", compiled=[explanation])
    (one,) = read_content(folder, tmp_path / "results").compiled
    assert (one.problem, one.config, one.backend) == (problem, config, "triton")
    assert [launch["kernel"] for launch in one.launches] == ["local", "carry", "read_summed"]
    assert all(launch["occupancy"].endswith("%") and int(launch["regs"]) > 0 for launch in one.launches)


def test_writes_that_come_too_early_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch("k", (1, 1, 1), 8, 2, 32, 0, 64, 0, "", b"", (), (), ("C7507 'setmaxnreg' ignored",))
    assert explain.races(launch) == "" and list(explain.remarks([launch])) == ["k: C7507 'setmaxnreg' ignored"]
    found = [Hazard("cp.async", line, (0, 64), (32, 96), True) for line in (7, 7, 9)]
    monkeypatch.setattr(explain, "hazards", lambda asm, warps, serialized: tuple(found))
    assert explain.races(launch) == "2" and list(explain.remarks([launch, launch]))[1:] == [f"k: {found[0]}"]

    def maze(*given: object) -> None:
        raise ValueError("more than 20000 ways through the kernel")

    monkeypatch.setattr(explain, "hazards", maze)
    assert explain.races(launch) == "?" and len(list(explain.remarks([launch]))) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpu", "t4", "--backend", "triton"), "T4 (sm_75) is not served by Triton"),
        (("--gpu", "t4", "--problem", f"{SMALL},dtype=bfloat16"), "multiplies float16 only"),
        (("--gpu", "cpu"), "cpu is a CPU"),
        (("--package", "here", "--gpu", "t4"), "--package and --gpu exclude each other"),
        (("--package", "here", "--set", "read_BT=16"), "--package and --set exclude each other"),
        (("--package", "nowhere"), "nowhere does not exist"),
        (("--problem", SMALL, "--set", "read_BT=3"), "read_BT=3: it may be 16, 32"),
        (("--problem", SMALL, "--set", "tiles=3"), "no parameter 'tiles'"),
        (
            ("--problem", LONG, "--set", "write_FORM=rows"),
            "write_FORM=rows: rows are of segments of at most 1024 tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], said: str) -> None:
    done = run(*arguments)
    assert done.returncode != 0 and done.stderr.startswith("mctune: error: ") and said in done.stderr
