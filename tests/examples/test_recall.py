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


def small(mixer: str, **settings: object):
    """A run on sequences of 19 tokens with segments of 4."""
    recurrence = "none" if mixer == "attention" else "linear"
    return recall.replace(recall.Run(mixer, recurrence, 0, 4, (5,), 19), **settings)


def test_every_token_stands_beside_the_one_before() -> None:
    x = torch.randn(2, 5, 3)
    both = recall.with_previous(x)
    assert torch.equal(both[..., :3], x) and torch.equal(both[:, 1:, 3:], x[:, :-1])
    assert (both[:, 0, 3:] == 0).all()


@pytest.mark.parametrize("recurrence", ["linear", "swla", "titans"])
@pytest.mark.parametrize("mixer", list(recall.MIXERS))
def test_models_are_causal_and_alike(mixer: str, recurrence: str) -> None:
    torch.manual_seed(0)
    model = recall.Model(small(mixer, recurrence=recurrence), WORDS)
    tokens, _ = batch(size=2)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % WORDS.total
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])
    outside = {name: p.shape for name, p in model.named_parameters() if not name.startswith("mixer.")}
    attention = recall.Model(small("attention"), WORDS).named_parameters()
    assert outside == {name: p.shape for name, p in attention if not name.startswith("mixer.")}


@pytest.mark.parametrize(
    ("mixer", "other", "tolerance"),
    [("base", "residual", 1e-4), ("grm", "soup", 1e-4), ("residual", "mean", 2e-2)],  # the norm's eps
)
def test_left_out_mixers_equal_others(mixer: str, other: str, tolerance: float) -> None:
    """Identities of the linear memory; mean differs by the factor s, which the output's RMS norm takes out again."""
    tokens, _ = batch(size=2)
    torch.manual_seed(0)
    weights = recall.Model(small("grm"), WORDS).state_dict()
    logits = {}
    for name in (mixer, other, "ssc"):
        model = recall.Model(small(name), WORDS)
        assert not model.load_state_dict(weights, strict=False).missing_keys
        logits[name] = model(tokens)
    torch.testing.assert_close(logits[mixer], logits[other], rtol=0, atol=tolerance)
    assert (logits[mixer] - logits["ssc"]).abs().max() > 0.05


@pytest.mark.parametrize("mixer", ["attention", "grm"])
def test_a_small_task_is_learnt(mixer: str) -> None:
    run = small(mixer, pairs=(2, 4), steps=300)
    result = recall.train(run, WORDS)
    assert list(result.accuracy) == [2, 4]
    assert min(result.accuracy.values()) > 0.7, result  # guessing among the values: 1 in 8
    assert result.steps_taken <= 300 and result.parameters > 0


def test_a_memory_that_may_not_look_back_stays_at_guessing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shift alone does not give answers away."""
    monkeypatch.setattr(recall.Attention, "forward", lambda self, x: (torch.zeros_like(x),))
    result = recall.train(small("attention", steps=100), WORDS)
    assert result.accuracy[5] < 0.35


def test_rate_warms_up_and_ends_at_zero() -> None:
    rates = [recall.rate(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1 and rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("mixer", "segment_length", "states"),
    [("base", 16, 1), ("log-linear", 16, 7), ("grm", 16, 8), ("grm", 64, 2), ("attention", 16, 127)],
)
def test_states_are_counted(mixer: str, segment_length: int, states: int) -> None:
    assert recall.Run(mixer, "linear", 0, segment_length).states == states


def test_the_plan_has_no_run_twice_in_a_part() -> None:
    for part in recall.PARTS:
        runs = recall.plan(part, 3)
        assert len(set(runs)) == len(runs) and {run.seed for run in runs} == {0, 1, 2}
    everything = [run for part in recall.PARTS for run in recall.plan(part, 1)]
    twice = {run for run in everything if everything.count(run) > 1}
    assert {run.mixer for run in twice} == {"attention"}, "attention is measured once for all recurrences"


def pretended(run, words):
    """A result without training."""
    return recall.Result({p: p / 100 + run.seed / 10 for p in run.pairs}, run.steps, 10, 0.5, "2026-11-23", "2", "0")


def test_the_csv_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[object] = []
    monkeypatch.setattr(recall, "train", lambda run, words: measured.append(run) or pretended(run, words))
    path, console = tmp_path / "new" / "recall.csv", Console(quiet=True)
    first = [small("grm", seed=seed, pairs=(8, 16)) for seed in (0, 1)]
    before = recall.study(first, WORDS, path, console)
    assert before == {run.key: pretended(run, WORDS) for run in first}
    more = [*first, small("ssc"), small("grm", pairs=(8, 16), steps=7)]
    rows = recall.study(more, WORDS, path, console)
    assert measured == more, "what the file holds is not measured again; other settings are another run"
    assert rows == {run.key: pretended(run, WORDS) for run in more} == recall.read_rows(path)
    with path.open(newline="") as file:
        assert [(row["steps_taken"], row["asked"]) for row in csv.DictReader(file)] == [
            *(("2000", "8"), ("2000", "16")) * 2, ("2000", "5"), ("7", "8"), ("7", "16"),
        ]  # fmt: skip
    assert recall.accuracies(first, rows) == {("linear", "grm", 5): {8: [0.08, 0.18], 16: [0.16, pytest.approx(0.26)]}}


def test_a_run_whose_rows_were_cut_off_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "train", pretended)
    path, console = tmp_path / "recall.csv", Console(quiet=True)
    runs = [small("grm", pairs=(8, 16)), small("ssc", pairs=(8, 16))]
    recall.study(runs, WORDS, path, console)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    measured: list[object] = []
    monkeypatch.setattr(recall, "train", lambda run, words: measured.append(run) or pretended(run, words))
    rows = recall.study(runs, WORDS, path, console)
    assert measured == runs[1:] and rows == recall.read_rows(path)


def test_quick_writes_rows_a_table_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "train", pretended)
    recall.main(["--quick", "--out", str(tmp_path)])
    rows = recall.read_rows(tmp_path / "recall.csv")
    assert [key[0] for key in rows] == ["attention", "base", "grm", "ssc", "log-linear"]
    shown = capsys.readouterr().out
    assert "linear grm" in shown and "40.0±0.0" in shown
    pytest.importorskip("matplotlib").use("Agg")
    recall.main(["--parts", *recall.PARTS, "--seeds", "2", "--out", str(tmp_path), "--plots", str(tmp_path / "images")])
    assert all((tmp_path / "images" / name).stat().st_size for name in ("recall.png", "recall_segments.png"))


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        recall.plot({("linear", "grm", 5): {3: [0.5]}}, tmp_path / "plots")
