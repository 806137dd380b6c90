"""The registry of targets, and what the host says of itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mctune.core import host
from mctune.core.errors import UsageError
from mctune.core.paths import search_spaces_dir
from mctune.core.target import FIGURES, load_target, resolve, targets

NAMES = {
    "cpu", "a100-40g", "a100-80g", "h100-sxm", "h100-pcie", "h200", "b200", "l4", "l40s", "a10g", "orin", "rtx2080ti",
    "rtx3090", "rtx4090", "rtx5090", "t4", "v100", "mi300x",
}  # fmt: skip
# Bytes of shared memory a block may have, by architecture.
BLOCK_BYTES = {
    "sm_70": 98304, "sm_75": 65536, "sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90": 232448,
    "sm_100": 232448, "sm_120": 101376, "gfx942": 65536,
}  # fmt: skip
GPUS = [target for target in targets() if not target.on_cpu]


def test_the_registry_is_complete_and_its_file_names_are_the_targets() -> None:
    assert {target.name for target in targets()} == NAMES
    assert {path.stem for path in (search_spaces_dir() / "targets").glob("*.toml")} == NAMES
    assert targets()[0].name == "cpu"


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_figure_is_there_with_a_source(gpu) -> None:  # type: ignore[no-untyped-def]
    assert [field for field, _ in gpu.sources if field in FIGURES] == [f for f, _ in gpu.sources]
    assert {field for field, source in gpu.sources if source} == set(FIGURES)
    assert all(getattr(gpu, field) > 0 for field in FIGURES)
    assert "cache_tbs" in gpu.unsure
    assert gpu.shared_bytes == BLOCK_BYTES[gpu.arch] <= gpu.shared_kb_per_core * 1024
    assert gpu.kind == ("hip" if gpu.arch.startswith("gfx") else "cuda")
    assert gpu.matrix_dtype == ("float16" if gpu.arch in ("sm_70", "sm_75") else "bfloat16")


def test_some_figures_against_the_data_sheets() -> None:
    a100, _ = resolve("a100-80g")
    assert (a100.cores, a100.matrix_tflops, a100.dram_gbs, a100.cache_mb) == (108, 312, 2039, 40)
    assert resolve("b200")[0].unsure == ("clock_ghz", "cache_mb", "cache_tbs")
    assert "matrix_tflops" in resolve("a10g")[0].unsure


def test_names_and_aliases() -> None:
    assert resolve("H100-SXM")[0].name == "h100-sxm" and resolve("h100-sxm")[1] == ""
    for alias, name in (("a100", "a100-80g"), ("h100", "h100-sxm"), ("4090", "rtx4090"), ("RTX_3090", "rtx3090")):
        target, note = resolve(alias)
        assert target.name == name
        assert alias in note and name in note
    every = [n for target in targets() for n in (target.name, *target.aliases)]
    assert len(every) == len(set(every))


def test_an_unknown_name_gets_its_neighbours() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'h10'.*h100") as caught:
        resolve("h10")
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="known: cpu, a100-40g"):
        resolve("zzzzzz")


def test_a_figure_without_a_source_is_refused(tmp_path: Path) -> None:
    row = 'name = "x"\ntitle = "X"\nkind = "cuda"\narch = "sm_80"\n[figures]\n'
    (tmp_path / "x.toml").write_text(row + "cores = { value = 1 }\n")
    with pytest.raises(UsageError, match="cores has no source"):
        load_target(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_text(row + 'coers = { value = 1, source = "s" }\n')
    with pytest.raises(UsageError, match="unknown figure 'coers'"):
        load_target(tmp_path / "x.toml")
    (tmp_path / "x.toml").write_text(row.replace("cuda", "cudda") + 'cores = { value = 1, source = "s" }\n')
    with pytest.raises(UsageError, match="kind='cudda'"):
        load_target(tmp_path / "x.toml")


V2 = "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3"
V3 = V2 + " avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
V4 = V3 + " avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", V4, (("x86-64-v4", 16), ("x86-64-v3", 8), ("x86-64-v2", 4), ("x86-64", 4))),
        ("x86_64", V4.replace("avx512dq", ""), (("x86-64-v3", 8), ("x86-64-v2", 4), ("x86-64", 4))),
        ("AMD64", V3, (("x86-64-v3", 8), ("x86-64-v2", 4), ("x86-64", 4))),
        ("x86_64", V3.replace("fma", ""), (("x86-64-v2", 4), ("x86-64", 4))),
        ("x86_64", "", (("x86-64", 4),)),
        ("aarch64", "asimd", (("generic", 4),)),
    ],
)
def test_an_llvm_name_implies_no_flag_that_is_missing(
    machine: str, flags: str, expected: tuple[tuple[str, int], ...]
) -> None:
    assert host.llvm_archs(machine, frozenset(flags.split())) == expected


def test_a_cpu_pretends_to_be_a_lesser_one_but_not_a_greater_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t\t: {V3}\n")
    for wanted, expected in (("x86-64-v2", ("x86-64-v2", 4)), ("", ("x86-64-v3", 8)), ("x86-64-v3", ("x86-64-v3", 8))):
        monkeypatch.setenv(host.CPU_ARCH, wanted)
        read = host.read_host(cpuinfo)
        assert (read.arch, read.vector_floats) == expected
    for wanted in ("x86-64-v4", "znver4"):
        monkeypatch.setenv(host.CPU_ARCH, wanted)
        with pytest.raises(
            UsageError, match=f"MCTUNE_CPU_ARCH={wanted}: this CPU can be x86-64-v3, x86-64-v2, x86-64$"
        ):
            host.read_host(cpuinfo)


def test_the_host_is_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delenv(host.CPU_ARCH, raising=False)
    cpuinfo = tmp_path / "cpuinfo"
    first = f"model name\t: Test CPU\ncpu MHz\t\t: 2596.142\nflags\t\t: {V3}\n"
    cpuinfo.write_text(first + "\n" + first.replace("Test", "Second"))
    for index, (level, size) in enumerate([("1", "32K"), ("2", "1024K"), ("3", "32768K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(level + "\n")
        (folder / "size").write_text(size + "\n")
    read = host.read_host(cpuinfo, tmp_path)
    assert read == host.Host("Test CPU", "x86-64-v3", 8, host.usable_cores(), 2.596, 32.0)
    bare = host.read_host(tmp_path / "none", tmp_path / "none")
    assert (bare.arch, bare.clock_ghz, bare.cache_mb) == ("x86-64", None, None)


def test_the_cpu_target_is_this_machine() -> None:
    cpu, _ = resolve("cpu")
    here = host.read_host()
    assert dataclasses.asdict(cpu) | {"arch": here.arch, "cores": here.cores} == dataclasses.asdict(cpu)
    assert cpu.vector_floats in (4, 8, 16) and cpu.shared_bytes == 0
    assert cpu.matrix_tflops is None and cpu.dram_gbs is None
