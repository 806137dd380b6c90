"""Winners to emit, and an environment that has nothing but what an emitted package needs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packages import GRM, forget

from mctune.backends.tvm import TvmBackend
from mctune.core.config import Config
from mctune.core.host import needed_flags
from mctune.core.outcome import Timed
from mctune.core.target import Target, resolve
from mctune.core.winner import Winner

NEEDED = ("torch", "numpy", "apache-tvm-ffi")
"""What the README of a package names, and numpy, which torch uses if it is there."""


@pytest.fixture(scope="session")
def target() -> Target:
    return resolve("cpu")[0]


@pytest.fixture(scope="session")
def winners(kernel_folder: Path, target: Target) -> tuple[Winner, ...]:
    """One kernel, which serves constant segments and logarithmic ones."""
    backend, folder = TvmBackend(), kernel_folder
    config = Config.of(
        {
            "chunk": 32, "rows": 2, "cols": 16, "unroll": 1, "formulation": "per_segment", "panel": 1,
            "loop_order": "rows_outer", "parallel": "segment", "score_rows": 2, "score_lanes": 16, "state_chunk": 32,
            "state_rows": 2, "state_cols": 16,
        }
    )  # fmt: skip
    assert backend.space(GRM).valid(config, GRM, target)
    built = backend.build(GRM, config, target, folder)
    portable = backend.build(GRM, config, replace(target, arch="x86-64-v3"), folder).library
    constant = Winner(
        problem=GRM, config=config.replace(segment_length=32), outcome=Timed(1.5, 1.4, 1.7, 21, 3e-7), backend="tvm",
        device="cpu", library=built.library, source=built.source, portable=portable,
        cpu_flags=needed_flags(target.arch),
        recommended=True, verified={"error": 3e-7, "tolerance": 2e-5, "cases": 3},
    )  # fmt: skip
    logarithmic = GRM.replace(segmentation="logarithmic", segment_length=None)
    return constant, replace(constant, problem=logarithmic, config=config, recommended=False)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where a package goes; its modules are forgotten afterwards."""
    name = "emitted_" + re.sub(r"\W", "", tmp_path.name)
    yield tmp_path / name
    forget(name)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh virtual environment with NEEDED, what they require, and nothing else."""
    root = tmp_path_factory.mktemp("bare")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(root / "env")
    links = root / "links"
    links.mkdir()
    for distribution in _closure():
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (links / top).exists():
                (links / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    python = root / "env" / "bin" / "python"
    (site,) = (root / "env" / "lib").glob("python*/site-packages")
    (site / "links.pth").write_text(f"{links}\n")
    return python


def _closure() -> list[metadata.Distribution]:
    """The distributions of NEEDED and of what they require; Triton is none of them on a CPU."""
    waiting, found = list(NEEDED), dict[str, metadata.Distribution]()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found or name == "triton":
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform or Python
            continue
        waiting += [
            match[0]
            for requirement in found[name].requires or ()
            if "extra ==" not in requirement and (match := re.match(r"[\w.-]+", requirement))
        ]
    return list(found.values())


@pytest.fixture(scope="session")
def importer() -> Iterator[Callable[[Path], dict[str, Any]]]:
    """Imports a package in another process."""
    command = [
        sys.executable,
        "-P" if sys.version_info >= (3, 11) else "-E",
        str(Path(__file__).with_name("importer.py")),
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    sending, receiving = process.stdin, process.stdout

    def ask(path: Path) -> dict[str, Any]:
        sending.write(f"{path.parent}\t{path.name}\n")
        sending.flush()
        answer: dict[str, Any] = json.loads(receiving.readline())
        return answer

    yield ask
    sending.close()
    process.wait(60)
