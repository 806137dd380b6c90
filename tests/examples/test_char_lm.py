"""The language model example: it learns, and writing through the cache is writing without it."""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

import mctune

PATH = Path(__file__).parents[2] / "examples" / "char_lm.py"
pytestmark = pytest.mark.filterwarnings("ignore:the eager path runs")


@pytest.fixture(scope="module")
def char_lm() -> ModuleType:
    spec = importlib.util.spec_from_file_location("char_lm", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["char_lm"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mixer", ("memory-caching", "linear", "attention"))
def test_a_few_steps_learn_and_the_cache_changes_nothing(char_lm: ModuleType, mixer: str) -> None:
    size = replace(
        char_lm.QUICK, context=96, batch=4, steps=12, hidden=32, head_dim=16, layers=2, segment=16, validation=4
    )
    model, rows = char_lm.train(mixer, size, mctune, 0, Console(quiet=True))
    assert [row.tokens for row in rows] == [step * 4 * 96 for step in range(1, 13)]
    assert rows[-1].validation < rows[0].validation - 0.3

    prompt = torch.stack([char_lm.encode(text) for text in ("import os, sys, re\n", "def run(self, x):\n ")])
    given: list[torch.Tensor] = []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        given.append(logits)
        return logits.argmax(-1)

    written = char_lm.generate(model, prompt, 45, choose)
    assert written.shape == (2, 45)
    with torch.no_grad():
        tokens = torch.cat([prompt, written], 1)
        again = model(tokens)[:, prompt.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(given, 1), again, atol=1e-4, rtol=1e-4)
    assert torch.equal(again.argmax(-1), written)


def test_a_prompt_in_parts_is_the_prompt(char_lm: ModuleType) -> None:
    """Attention's mask where a later call brings several tokens."""
    torch.manual_seed(0)
    model = char_lm.CharLM("attention", replace(char_lm.QUICK, hidden=32, head_dim=16), mctune)
    tokens = torch.randint(0, len(char_lm.CHARACTERS), (2, 13))
    cache = model.new_cache()
    with torch.no_grad():
        parts = torch.cat([model(part, cache) for part in tokens.split((5, 1, 7), 1)], 1)
        torch.testing.assert_close(parts, model(tokens), atol=1e-5, rtol=1e-4)


def test_the_text(char_lm: ModuleType) -> None:
    training, validation = char_lm.texts()
    assert (training, validation) == char_lm.texts()
    assert len(training) > 5 * len(validation) > 100_000
    assert char_lm.decode(char_lm.encode("def f():\n\treturn 'é'")) == "def f():\n\ufffdreturn '\ufffd'"


def test_the_command(char_lm: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "curves" / "loss.csv"
    char_lm.main(["--quick", "--steps", "1", "--mixer", "attention", "--out", str(out)])
    said = capsys.readouterr()
    assert "def read(self, " in said.out and "characters/s" in said.out and "attention step 1: train" in said.err
    with out.open() as file:
        (row,) = csv.DictReader(file)
    assert row["mixer"] == "attention" and float(row["validation"]) < 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--out", "loss.svg"], "must end in .csv or .png"),
        (["--out", "loss.png"], "pip install matplotlib"),
        (["--package", "no_such_package"], "no_such_package is no tuned package; `mctune search"),
    ),
)
def test_refusals(
    char_lm: ModuleType,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(char_lm, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        char_lm.main(arguments)
    assert message in capsys.readouterr().err + str(error.value)
