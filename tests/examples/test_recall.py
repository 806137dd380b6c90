"""The recall example: its data can be answered from the context, its models learn, its CSV resumes."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

SOURCE = Path(__file__).resolve().parents[2] / "examples" / "recall.py"
_spec = importlib.util.spec_from_file_location("recall_example", SOURCE)
assert _spec is not None and _spec.loader is not None
recall = importlib.util.module_from_spec(_spec)
sys.modules["recall_example"] = recall  # dataclasses look their module up by name
_spec.loader.exec_module(recall)

WORDS = recall.Words(keys=8, values=8, filler=4)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(pairs: int = 5, length: int = 19, seed: int = 0, size: int = 50):
    return recall.make_batch(WORDS, size, length, pairs, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("pairs", "length"), [(5, 19), (6, 18), (1, 7)])
def test_every_answer_is_in_the_context(pairs: int, length: int) -> None:
    tokens, targets = batch(pairs, length)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        seen: dict[int, int] = {}
        asked: list[int] = []
        for at, token in enumerate(row):
            if wanted[at] != recall.IGNORED:
                assert seen[token] == wanted[at], "the value must have stood behind this key, earlier"
                asked.append(token)
            elif token < WORDS.keys:
                assert token not in seen, "a key that is no query stands here for the first time"
                seen[token] = row[at + 1]
                assert WORDS.keys <= row[at + 1] < WORDS.keys + WORDS.values
        assert sorted(asked) == sorted(seen) and len(asked) == pairs
        assert len(set(seen.values())) == pairs
        filler = sum(token >= WORDS.keys + WORDS.values for token in row)
        assert filler == length - 3 * pairs


def test_positions_of_queries_vary_and_seeds_repeat() -> None:
    tokens, targets = batch()
    again, _ = batch()
    other, _ = batch(seed=1)
    assert torch.equal(tokens, again) and not torch.equal(tokens, other)
    asked = (targets != recall.IGNORED).float().mean(0)
    assert asked[:2].sum() == 0 and (asked[2:] > 0).all()  # key, value, then a query at the earliest


def test_too_many_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="21 tokens, more than length=20"):
        batch(7, 20)
    with pytest.raises(ValueError, match="only 8 keys"):
        batch(9, 40)


@pytest.mark.parametrize(
    ("mixer", "recurrence"), [*((mixer, "swla") for mixer in recall.MIXERS), ("soup", "dla"), ("ssc", "titans")]
)
def test_models_are_causal_and_alike(mixer: str, recurrence: str) -> None:
    torch.manual_seed(0)
    run = recall.Run(mixer, 5, 0, recurrence, length=19, segment_length=4)
    model = recall.Model(run, WORDS)
    tokens, _ = batch(size=2)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % WORDS.total
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])
    shared = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mixer."))
    attention = recall.Model(recall.Run("attention", 5, 0), WORDS)
    assert shared == sum(p.numel() for name, p in attention.named_parameters() if not name.startswith("mixer."))


def test_mean_equals_residual_behind_the_output_norm() -> None:
    """For a memory that is one matrix they differ by the factor s, which the RMS norm takes out again."""
    tokens, _ = batch(size=2)
    torch.manual_seed(0)
    weights = recall.Model(recall.Run("grm", 5, 0, length=19, segment_length=4), WORDS).state_dict()
    logits = {}
    for mixer in ("residual", "mean", "grm"):
        model = recall.Model(recall.Run(mixer, 5, 0, length=19, segment_length=4), WORDS)
        extra = model.load_state_dict(weights, strict=False).unexpected_keys
        assert extra == ([] if mixer == "grm" else ["mixer.u_proj.weight"])
        logits[mixer] = model(tokens)
    torch.testing.assert_close(logits["residual"], logits["mean"], rtol=0, atol=5e-3)
    assert (logits["residual"] - logits["grm"]).abs().max() > 0.05


@pytest.mark.parametrize("mixer", ["attention", "grm"])
def test_a_small_task_is_learnt(mixer: str) -> None:
    run = recall.Run(mixer, 3, 0, length=15, segment_length=4, steps=300)
    result = recall.train(run, WORDS)
    assert result.accuracy > 0.7, result  # guessing among the values: 1 in 8
    assert result.steps_taken <= 300 and result.parameters > 0


def test_rate_warms_up_and_ends_at_zero() -> None:
    rates = [recall.rate(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1 and rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_csv_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[recall.Run] = []

    def pretend(run: recall.Run, words: recall.Words) -> recall.Result:
        measured.append(run)
        return recall.Result(0.5, 1.25, run.steps, 10, 0.1)

    monkeypatch.setattr(recall, "train", pretend)
    path = tmp_path / "new" / "recall.csv"
    console = Console(quiet=True)
    first = [recall.Run("grm", 3, seed) for seed in (0, 1)]
    recall.study(first, WORDS, path, console)
    more = [*first, recall.Run("ssc", 3, 0), recall.Run("grm", 3, 0, steps=7)]
    rows = recall.study(more, WORDS, path, console)
    assert measured == more, "what the file holds is not measured again; other settings are another row"
    assert set(rows) == {run.key for run in more} == set(recall.read_rows(path))
    with path.open(newline="") as file:
        assert [row["steps_taken"] for row in csv.DictReader(file)] == ["750", "750", "750", "7"]
    found = recall.accuracies(more[:3], rows)
    assert found == {"grm": {3: [0.5, 0.5]}, "ssc": {3: [0.5]}}
    assert recall.make_table(found, [3]).row_count == 2
    deep = recall.Run("grm", 3, 0, "dla")
    both = recall.accuracies([more[0], deep], rows | {deep.key: recall.Result(0.75, 1.0, 750, 10, 0.1)})
    assert both == {"swla grm": {3: [0.5]}, "dla grm": {3: [0.75]}}


def test_quick_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "train", lambda run, words: recall.Result(0.5, 1.25, run.steps, 10, 0.1))
    recall.main(["--quick", "--mixers", "grm", "attention", "--out", str(tmp_path)])
    assert [run[:3] for run in recall.read_rows(tmp_path / "recall.csv")] == [
        ("grm", "20", "0"),
        ("attention", "20", "0"),
    ]
    assert "50.0%" in capsys.readouterr().out


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        recall.plot({"grm": {3: [0.5]}}, tmp_path / "plot.png")
