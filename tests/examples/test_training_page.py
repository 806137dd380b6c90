"""docs/training.md: its Python runs from top to bottom, and what it says of the results holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mctune.core.workload import read_workload

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
pytestmark = pytest.mark.filterwarnings("ignore:the eager path runs")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)


def test_the_python_runs() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    # The first piece imports a package that a search leaves.
    for piece in blocks("python")[1:]:
        exec(piece, names)
    assert names["attached"].layers == ("blocks.0.mixer", "blocks.1.mixer")
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_generation_is_recomputation() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    pieces = [piece for piece in blocks("python") if "class Model" in piece or "def generate" in piece]
    for piece in pieces:
        exec(piece, names)
    model, tokens = names["Model"](100), torch.randint(100, (2, 250))
    written = names["generate"](model, tokens, 12)  # across the end of a segment
    with torch.no_grad():
        again = model(written[:, :-1])[:, 249:].argmax(-1)
    assert torch.equal(written[:, 250:], again)


def test_the_workload_is_one(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    assert [case.problem.pass_ for case in read_workload(path).cases] == ["forward", "backward", "decode"]
