"""Multi-query associative recall: which mixers can look up what they have read?

The task is MQAR (Arora et al. 2024, "Zoology", arXiv:2312.04927). A sequence holds pairs of a key and a value; later,
each key comes once more and the model has to name its value there. A memory of fixed size gets worse as the pairs grow
in number, attention does not, and Memory Caching (arXiv:2602.24281) claims the ground between. This script trains one
small model for each mixer and seed, alike in everything but the mixer, and asks it with few and with many pairs::

    python examples/recall.py --quick                                # a minute: linear memories, one seed, few steps
    python examples/recall.py --out docs/recall --plots docs/images  # what docs/recall.md shows: an hour of one core

Rows are written to ``recall.csv`` as they are measured, and a row that is already there is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from mctune import MemoryCaching, __version__

IGNORED = -100  # what cross_entropy leaves out
SOLVED = 0.995  # training ends early at this accuracy
# Arguments of MemoryCaching; what they leave open is the same for all. One segment is the recurrence itself.
MIXERS: dict[str, dict[str, str]] = {
    "attention": {},
    "base": {"aggregation": "residual"},
    "residual": {"aggregation": "residual"},
    "mean": {"aggregation": "mean"},
    "grm": {"aggregation": "grm"},
    "soup": {"aggregation": "soup"},
    "ssc": {"aggregation": "ssc"},
    "log-linear": {"aggregation": "grm", "segmentation": "logarithmic"},
}
PARTS = ("linear", "swla", "titans", "segments")
PAIRS = (8, 16, 24, 32, 40)
SEGMENT_LENGTHS = (4, 8, 32, 64)  # besides the one that every run has by default


@dataclass(frozen=True)
class Words:
    """Which tokens are keys, values and filler: numbers in this order."""

    keys: int = 64
    values: int = 64
    filler: int = 16

    @property
    def total(self) -> int:
        """How many tokens there are."""
        return self.keys + self.values + self.filler


@dataclass(frozen=True)
class Run:
    """One training run: the settings that tell it from another in the CSV."""

    mixer: str
    recurrence: str
    seed: int
    segment_length: int = 16
    pairs: tuple[int, ...] = PAIRS  # every batch has one of these numbers of pairs
    length: int = 127  # seven spans in logarithmic segmentation: 64 32 16 8 4 2 1
    width: int = 32
    heads: int = 2
    head_dim: int = 8
    top_k: int = 2
    batch: int = 16
    steps: int = 2000
    learning_rate: float = 0.02

    @property
    def key(self) -> tuple[str, ...]:
        """The settings as the CSV spells them."""
        return tuple(" ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in asdict(self).values())

    @property
    def states(self) -> int:
        """What the last token of a sequence reads: a state for each segment; attention reads every token."""
        other = {"attention": self.length, "base": 1, "log-linear": self.length.bit_count()}
        return other.get(self.mixer, math.ceil(self.length / self.segment_length))


@dataclass(frozen=True)
class Result:
    """What a run ended with: accuracy by the number of pairs asked of, steps taken, seconds of one core."""

    accuracy: dict[int, float]
    steps_taken: int
    parameters: int
    cpu_seconds: float
    date: str
    torch: str
    mctune: str


def make_batch(words: Words, batch: int, length: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets [batch, length]; targets are ``IGNORED`` everywhere but at the queries.

    ``pairs`` keys, all different, stand in front of their values, all different; each key comes once more, anywhere
    later, as the query. Pairs, queries and single filler tokens are shuffled over the whole sequence.

    Raises:
        ValueError: if the sequence or the vocabulary is too short for the pairs.
    """
    if 3 * pairs > length:
        raise ValueError(
            f"pairs={pairs} take {3 * pairs} tokens, more than length={length}; lower one or raise the other"
        )
    if pairs > min(words.keys, words.values):
        raise ValueError(f"pairs={pairs}: there are only {words.keys} keys and {words.values} values")
    items = length - pairs  # a pair is one item of two tokens
    order = torch.rand(batch, items, generator=generator).argsort(-1)
    two = order[:, : 2 * pairs].view(batch, pairs, 2)
    pair, query = two.amin(-1), two.amax(-1)
    size = torch.ones(batch, items, dtype=torch.long).scatter_(1, pair, 2)
    begin = size.cumsum(-1) - size
    keys = torch.rand(batch, words.keys, generator=generator).argsort(-1)[:, :pairs]
    values = torch.rand(batch, words.values, generator=generator).argsort(-1)[:, :pairs] + words.keys
    tokens = torch.randint(words.keys + words.values, words.total, (batch, length), generator=generator)
    at, asked = begin.gather(1, pair), begin.gather(1, query)
    tokens.scatter_(1, at, keys).scatter_(1, at + 1, values).scatter_(1, asked, keys)
    return tokens, torch.full_like(tokens, IGNORED).scatter_(1, asked, values)


def with_previous(x: Tensor) -> Tensor:
    """[B, T, D] to [B, T, 2 D]: every token beside the one before it, a convolution over two tokens without weights."""
    return torch.cat([x, F.pad(x, (0, 0, 1, -1))], -1)


class Attention(nn.Module):
    """Causal softmax attention with heads of the same width as the memories', without positions."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """[B, T, width] to a tuple that begins with the same, as from MemoryCaching."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)),)


def make_mixer(run: Run) -> nn.Module:
    """The layer under test, twice ``width`` wide."""
    if run.mixer == "attention":
        return Attention(2 * run.width, run.heads, run.head_dim)
    return MemoryCaching(
        2 * run.width,
        run.heads,
        head_dim=run.head_dim,
        recurrence=run.recurrence,
        segment_length=run.length if run.mixer == "base" else run.segment_length,
        top_k=run.top_k,
        backend="eager",
        **MIXERS[run.mixer],
    )


class Model(nn.Module):
    """Embedding, one mixer, logits, in one residual stream; the logits' weights are the embedding's.

    The mixer sees every token beside the one before it: otherwise no single layer could tie a value to the key in front
    of it, attention neither. The half of its output that has the stream's width joins the stream.
    """

    def __init__(self, run: Run, words: Words) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words.total, run.width)
        nn.init.normal_(self.embedding.weight, std=run.width**-0.5)
        self.mixer_norm, self.mixer, self.norm = nn.RMSNorm(run.width), make_mixer(run), nn.RMSNorm(run.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to logits [B, T, words]."""
        x = self.embedding(tokens)
        x = x + self.mixer(with_previous(self.mixer_norm(x)))[0][..., : x.shape[-1]]
        return F.linear(self.norm(x), self.embedding.weight)


def rate(step: int, steps: int) -> float:
    """Warm-up over a tenth of the steps, then a cosine down to zero; as a part of the highest learning rate."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def evaluate(model: nn.Module, run: Run, words: Words, pairs: int) -> float:
    """Accuracy over the queries of 256 sequences, the same for every model and none that it was trained on."""
    tokens, targets = make_batch(words, 256, run.length, pairs, torch.Generator().manual_seed(1_000_000))
    asked = targets != IGNORED
    return (model(tokens)[asked].argmax(-1) == targets[asked]).float().mean().item()


def train(run: Run, words: Words, checks: int = 10) -> Result:
    """Train one model from scratch, each batch with a number of pairs drawn from ``run.pairs``.

    Looks ``checks`` times whether the model solves the largest number of pairs, and then stops.
    """
    torch.manual_seed(run.seed)
    began, model = time.thread_time(), Model(run, words)
    generator = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), run.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, run.steps))
    every = max(1, run.steps // checks)
    for step in range(1, run.steps + 1):
        pairs = run.pairs[int(torch.randint(len(run.pairs), (), generator=generator))]
        tokens, targets = make_batch(words, run.batch, run.length, pairs, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 and step < run.steps and evaluate(model, run, words, max(run.pairs)) >= SOLVED:
            break
    accuracy = {pairs: round(evaluate(model, run, words, pairs), 4) for pairs in run.pairs}
    size = sum(parameter.numel() for parameter in model.parameters())
    seconds = round(time.thread_time() - began, 1)
    return Result(accuracy, step, size, seconds, date.today().isoformat(), torch.__version__, __version__)


Rows = dict[tuple[str, ...], Result]
"""Results by the run's key."""


def read_rows(path: Path) -> Rows:
    """What the CSV holds so far; nothing if there is no file yet."""
    rows: Rows = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = tuple(row[field.name] for field in fields(Run))
                numbers = int(row["steps_taken"]), int(row["parameters"]), float(row["cpu_seconds"])
                found = Result({}, *numbers, row["date"], row["torch"], row["mctune"])
                rows.setdefault(key, found).accuracy[int(row["asked"])] = float(row["accuracy"])
    return rows


def append_rows(path: Path, run: Run, result: Result) -> None:
    """Add the rows of one run, one for each number of pairs that was asked, and the header before the first."""
    one = dict(zip(asdict(run), run.key, strict=True)) | {"states": run.states, "asked": 0} | asdict(result)
    lines = [one | {"asked": pairs, "accuracy": share} for pairs, share in result.accuracy.items()]
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(lines)


def study(runs: Sequence[Run], words: Words, path: Path, console: Console) -> Rows:
    """Measure what ``path`` does not hold yet; returns the results of ``runs`` alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = read_rows(path)
    # A run that was cut off while it was written is measured again.
    rows = {run.key: held[run.key] for run in runs if run.key in held and len(held[run.key].accuracy) == len(run.pairs)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("recall", total=len(runs), completed=len(rows))
        for run in runs:
            if run.key in rows:
                continue
            label = f"{run.recurrence} {run.mixer}, states: {run.states}, seed {run.seed}"
            progress.update(task, description=label)
            rows[run.key] = result = train(run, words)
            append_rows(path, run, result)
            shown = ", ".join(f"{share:.1%} of {pairs}" for pairs, share in result.accuracy.items())
            progress.console.print(f"{label}: {shown}, after {result.steps_taken} steps")
            progress.advance(task)
    return rows


def plan(part: str, seeds: int) -> list[Run]:
    """The runs of one part of the study.

    ``linear``, ``swla`` and ``titans`` vary the mixer, without those that equal another by an identity; ``segments``
    varies the length of grm's segments. ``titans`` is slow and gets half the steps.
    """
    if part == "segments":
        runs = [Run("grm", recurrence, 0, length) for recurrence in ("linear", "swla") for length in SEGMENT_LENGTHS]
    elif part == "titans":
        runs = [Run(name, part, 0, steps=1000) for name in ("base", "residual", "mean", "grm", "soup", "ssc")]
    else:
        names = ["base", "grm", "ssc", "log-linear", *(("residual", "mean") if part == "swla" else ())]
        runs = [Run("attention", "none", 0), *(Run(name, part, 0) for name in names)]
    return [replace(run, seed=seed) for seed in range(seeds) for run in runs]


Found = dict[tuple[str, str, int], dict[int, list[float]]]
"""Accuracy of each seed by pairs, by recurrence, mixer and states."""


def accuracies(runs: Sequence[Run], rows: Rows) -> Found:
    """What was measured of ``runs``."""
    found: Found = {}
    for run in runs:
        line = found.setdefault((run.recurrence, run.mixer, run.states), {})
        for pairs, share in rows[run.key].accuracy.items():
            line.setdefault(pairs, []).append(share)
    return found


def spread(values: list[float]) -> float:
    """Standard deviation over seeds; 0 for one seed."""
    return stdev(values) if len(values) > 1 else 0.0


def make_table(found: Found) -> Table:
    """Mean and standard deviation over seeds."""
    pairs = sorted({number for line in found.values() for number in line})
    seeds = max(len(values) for line in found.values() for values in line.values())
    table = Table("", "states", *map(str, pairs), box=SIMPLE_HEAD, padding=0)
    table.title = f"accuracy in % by number of pairs; mean±deviation of {seeds} seeds"
    for (recurrence, mixer, states), line in found.items():
        shown = (f"{100 * fmean(line[n]):.1f}±{100 * spread(line[n]):.1f}" if n in line else "" for n in pairs)
        table.add_row(f"{recurrence} {mixer}".removeprefix("none "), str(states), *shown)
    return table


def plot(found: Found, folder: Path) -> None:
    """``recall.png``, accuracy over pairs, and ``recall_segments.png``, that of grm over states, ± a deviation.

    Raises:
        SystemExit: if matplotlib is not there.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.axes import Axes
    except ImportError:
        raise SystemExit("--plots needs matplotlib; get it with: pip install matplotlib") from None
    folder.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams.update({"axes.grid": True, "grid.alpha": 0.3})

    def draw(axes: Axes, cells: dict[float, list[float]], label: str) -> None:
        means, bars = [fmean(values) for values in cells.values()], [spread(values) for values in cells.values()]
        axes.errorbar(list(cells), means, bars, label=label, marker="o", capsize=3)

    figure, panels = pyplot.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")
    for axes, recurrence in zip(panels, ("linear", "swla", "titans"), strict=True):
        for place, mixer in enumerate(MIXERS):
            of = "none" if mixer == "attention" else recurrence
            line = found.get((of, mixer, Run(mixer, of, 0).states), {})
            # Beside each other: bars must not hide bars. Also when empty: a mixer has one colour in all panels.
            draw(axes, {number + 0.2 * (place - 3): line[number] for number in line}, mixer)
        axes.set(title=recurrence, xlabel="key-value pairs", xticks=PAIRS)
    panels[0].set(ylabel="recall accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(folder / "recall.png", dpi=130)

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axes, recurrence in zip(panels, ("linear", "swla"), strict=True):
        lines = {cell[2]: line for cell, line in found.items() if cell[0] == recurrence and cell[1] in ("base", "grm")}
        for number in PAIRS:
            draw(axes, {states: lines[states][number] for states in sorted(lines)}, f"{number} pairs")
        axes.set(title=f"{recurrence}, grm", xlabel="states (1: the recurrence itself)")
        axes.semilogx(base=2)
    panels[0].set(ylabel="recall accuracy")
    panels[1].legend(fontsize="small")
    figure.savefig(folder / "recall_segments.png", dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """Run the study that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="linear memories, one seed, few steps: about a minute")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted from 0")
    parser.add_argument("--out", type=Path, default=Path("recall"), help="folder of recall.csv")
    parser.add_argument("--plots", type=Path, help="folder for two PNG files; needs matplotlib")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # such small products only lose by a second thread
    if chosen.quick:
        runs = [replace(run, steps=700) for run in plan("linear", 1)]
    else:
        runs = list(dict.fromkeys(run for part in chosen.parts for run in plan(part, chosen.seeds)))
        runs.sort(key=lambda run: run.seed)  # a study that was stopped has whole seeds
    console = Console()
    measured = accuracies(runs, study(runs, Words(), chosen.out / "recall.csv", console))
    console.print(make_table(measured))
    if chosen.plots is not None:
        plot(measured, chosen.plots)


if __name__ == "__main__":
    main()
