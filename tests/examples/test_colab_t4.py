"""The notebook for a T4: its cells run, on the CPU, where the stand-in driver runs the package's kernels."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mctune.verify.cuda_cpu.folder import environment, prepare_parts
from mctune.verify.package import read_entries

NOTEBOOK = Path(__file__).parents[2] / "examples" / "colab_t4.ipynb"


def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    space: dict[str, Any] = {}
    for cell in cells:
        (tag,) = cell["metadata"]["tags"]
        if tag == "compare":
            # There is no T4 here: the kernels that were found run by their CUDA C.
            for name, value in environment(tmp_path / "cuda").items():
                monkeypatch.setitem(os.environ, name, value)
            for entry in read_entries(tmp_path / "mctune_t4"):
                prepare_parts(tmp_path / "mctune_t4" / "kernels", entry["parts"])
        exec(compile("".join(cell["source"]), f"colab_t4.ipynb, {tag}", "exec"), space)
    assert max(space["errors"].values()) < 1e-2
    assert [T for T, _ in space["rows"]] == list(space["lengths"]) and all(
        set(times) == {"mctune", "PyTorch path", "SDPA"} for _, times in space["rows"]
    )
