"""Multi-query associative recall: which mixers can look up what they have read?

The task is MQAR (Arora et al. 2024, "Zoology", arXiv:2312.04927). A sequence holds pairs of a key and a value; later,
each key comes once more and the model has to name its value there. A memory of fixed size gets worse as the pairs grow
in number, attention does not, and Memory Caching (arXiv:2602.24281) claims the ground between. This script trains one
small model for each mixer, number of pairs and seed, alike in everything but the mixer::

    python examples/recall.py --quick                 # a minute: one number of pairs, one seed, few steps
    python examples/recall.py --out docs/recall        # the table in docs/recall.md

Rows are written to ``recall.csv`` as they are measured, and a row that is already there is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from mctune import MemoryCaching

IGNORED = -100  # what cross_entropy leaves out
SOLVED = 0.995  # training ends early at this accuracy

# Arguments of MemoryCaching; what they leave open is the same for all. One segment is the recurrence itself.
MIXERS: dict[str, dict[str, str]] = {
    "base": {"aggregation": "residual"},
    "residual": {"aggregation": "residual"},
    "grm": {"aggregation": "grm"},
    "ssc": {"aggregation": "ssc"},
    "log-linear": {"aggregation": "grm", "segmentation": "logarithmic"},
    "attention": {},
    "mean": {"aggregation": "mean"},
    "soup": {"aggregation": "soup"},
}
DEFAULT_MIXERS = tuple(name for name in MIXERS if name != "soup")  # soup of a linear memory is grm


@dataclass(frozen=True)
class Words:
    """Which tokens are keys, values and filler: numbers in this order."""

    keys: int = 32
    values: int = 32
    filler: int = 16

    @property
    def total(self) -> int:
        """How many tokens there are."""
        return self.keys + self.values + self.filler


@dataclass(frozen=True)
class Run:
    """One training run; the settings that tell one row of the CSV from another."""

    mixer: str
    pairs: int
    seed: int
    recurrence: str = "swla"
    length: int = 63  # six spans in logarithmic segmentation: 32 16 8 4 2 1
    segment_length: int = 8
    width: int = 48
    heads: int = 2
    head_dim: int = 8
    top_k: int = 2
    inner_chunk: int = 4  # of dla and titans: two to a segment
    batch: int = 16
    steps: int = 750
    learning_rate: float = 0.01

    @property
    def key(self) -> tuple[str, ...]:
        """The settings as the CSV spells them."""
        return tuple(str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Result:
    """What a run ended with: accuracy over the queries of 256 unseen sequences, steps taken, seconds of one core."""

    accuracy: float
    loss: float
    steps_taken: int
    parameters: int
    cpu_seconds: float


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


class ShortConv(nn.Module):
    """A causal depthwise convolution over three tokens: every mixer gets the token before, by the same means."""

    def __init__(self, width: int, taps: int = 3) -> None:
        super().__init__()
        self.taps = taps
        self.conv = nn.Conv1d(width, width, taps, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] to the same."""
        return self.conv(F.pad(x.mT, (self.taps - 1, 0))).mT


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
    """The layer under test."""
    if run.mixer == "attention":
        return Attention(run.width, run.heads, run.head_dim)
    return MemoryCaching(
        run.width,
        run.heads,
        head_dim=run.head_dim,
        recurrence=run.recurrence,
        segment_length=run.length if run.mixer == "base" else run.segment_length,
        top_k=run.top_k,
        inner_chunk=run.inner_chunk,
        backend="eager",
        **MIXERS[run.mixer],
    )


class Model(nn.Module):
    """Embedding, one short convolution, one mixer, each behind an RMS norm and with a residual; then the logits."""

    def __init__(self, run: Run, words: Words) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words.total, run.width)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.conv_norm, self.conv = nn.RMSNorm(run.width), ShortConv(run.width)
        self.mixer_norm, self.mixer = nn.RMSNorm(run.width), make_mixer(run)
        self.norm, self.logits = nn.RMSNorm(run.width), nn.Linear(run.width, words.total, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T] to logits [B, T, words]."""
        x = self.embedding(tokens)
        x = x + self.conv(self.conv_norm(x))
        x = x + self.mixer(self.mixer_norm(x))[0]
        return self.logits(self.norm(x))


def rate(step: int, steps: int) -> float:
    """Warm-up over a tenth of the steps, then a cosine down to zero; as a part of the highest learning rate."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tensor, targets: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy over the queries."""
    asked = targets != IGNORED
    logits, right = model(tokens)[asked], targets[asked]
    return (logits.argmax(-1) == right).float().mean().item(), F.cross_entropy(logits, right).item()


def train(run: Run, words: Words, checks: int = 5) -> Result:
    """Train one model from scratch; looks ``checks`` times at unseen sequences and stops early once it solves them."""
    torch.manual_seed(run.seed)
    began, model = time.thread_time(), Model(run, words)
    generator = torch.Generator().manual_seed(run.seed)
    unseen = make_batch(words, 256, run.length, run.pairs, torch.Generator().manual_seed(1_000_000))
    optimizer = torch.optim.AdamW(model.parameters(), run.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, run.steps))
    every, step = max(1, run.steps // checks), 0
    for step in range(1, run.steps + 1):
        tokens, targets = make_batch(words, run.batch, run.length, run.pairs, generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 and step < run.steps and evaluate(model, *unseen)[0] >= SOLVED:
            break
    accuracy, unseen_loss = evaluate(model, *unseen)
    size = sum(parameter.numel() for parameter in model.parameters())
    return Result(round(accuracy, 4), round(unseen_loss, 4), step, size, round(time.thread_time() - began, 1))


def read_rows(path: Path) -> dict[tuple[str, ...], Result]:
    """Results so far by the run's key; nothing if there is no file yet."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            tuple(row[field.name] for field in fields(Run)): Result(
                float(row["accuracy"]), float(row["loss"]), int(row["steps_taken"]), int(row["parameters"]),
                float(row["cpu_seconds"]),
            )
            for row in csv.DictReader(file)
        }  # fmt: skip


def append_row(path: Path, run: Run, result: Result) -> None:
    """Add one row, and the header before the first."""
    row = asdict(run) | asdict(result)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def study(runs: list[Run], words: Words, path: Path, console: Console) -> dict[tuple[str, ...], Result]:
    """Measure what ``path`` does not hold yet; returns the results of ``runs`` alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("recall", total=len(runs), completed=sum(run.key in rows for run in runs))
        for run in runs:
            if run.key in rows:
                continue
            label = f"{run.recurrence} {run.mixer}, {run.pairs} pairs, seed {run.seed}"
            progress.update(task, description=label)
            rows[run.key] = result = train(run, words)
            append_row(path, run, result)
            progress.console.print(f"{label}: {result.accuracy:.1%} after {result.steps_taken} steps")
            progress.advance(task)
    return {run.key: rows[run.key] for run in runs}


def accuracies(runs: list[Run], rows: dict[tuple[str, ...], Result]) -> dict[str, dict[int, list[float]]]:
    """Accuracy of each seed by mixer, and recurrence if there are several, and number of pairs."""
    found: dict[str, dict[int, list[float]]] = {}
    several = len({run.recurrence for run in runs}) > 1
    for run in runs:
        if run.key in rows:
            label = f"{run.recurrence} {run.mixer}" if several else run.mixer
            found.setdefault(label, {}).setdefault(run.pairs, []).append(rows[run.key].accuracy)
    return found


def spread(values: list[float]) -> float:
    """Standard deviation over seeds; 0 for one seed."""
    return stdev(values) if len(values) > 1 else 0.0


def make_table(found: dict[str, dict[int, list[float]]], pairs: list[int]) -> Table:
    """Mean and standard deviation over seeds, in per cent."""
    table = Table(
        "mixer", *(f"{number} pairs" for number in pairs), title="accuracy, mean ± standard deviation (seeds)"
    )
    for mixer, by_pairs in found.items():
        cells = [by_pairs.get(number, []) for number in pairs]
        table.add_row(mixer, *(f"{fmean(c):.1%} ± {spread(c):.1%} ({len(c)})" if c else "" for c in cells))
    return table


def plot(found: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Accuracy over the number of pairs, one line a mixer, bars for the standard deviation.

    Raises:
        SystemExit: if matplotlib is not there.
    """
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("--plot needs matplotlib; get it with: pip install matplotlib") from None
    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for place, (mixer, by_pairs) in enumerate(found.items()):
        numbers = sorted(by_pairs)
        beside = [number + 0.15 * (place - (len(found) - 1) / 2) for number in numbers]  # bars must not hide each other
        means, bars = [fmean(by_pairs[n]) for n in numbers], [spread(by_pairs[n]) for n in numbers]
        axes.errorbar(beside, means, bars, label=mixer, marker="o", capsize=3)
    axes.set(xlabel="key-value pairs", ylabel="recall accuracy", xticks=sorted({n for b in found.values() for n in b}))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """Run the study that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one number of pairs, one seed, few steps: about a minute")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=DEFAULT_MIXERS)
    parser.add_argument("--recurrence", nargs="+", choices=("linear", "swla", "dla", "titans"), default=["swla"])
    parser.add_argument("--pairs", nargs="+", type=int, default=[12, 20])
    parser.add_argument("--seeds", type=int, default=2, help="how many, counted from 0")
    parser.add_argument("--steps", type=int, default=Run.steps)
    parser.add_argument("--out", type=Path, default=Path("recall"), help="folder of recall.csv")
    parser.add_argument("--plot", type=Path, help="write a PNG here; needs matplotlib")
    chosen = parser.parse_args(arguments)
    pairs, seeds, steps = (chosen.pairs[-1:], 1, 250) if chosen.quick else (chosen.pairs, chosen.seeds, chosen.steps)
    torch.set_num_threads(1)  # such small products only lose by a second thread
    runs = [
        Run(mixer, number, seed, recurrence, steps=steps)
        for seed in range(seeds)
        for recurrence in chosen.recurrence
        for number in pairs
        for mixer in chosen.mixers
    ]
    console = Console()
    found = accuracies(runs, study(runs, Words(), chosen.out / "recall.csv", console))
    console.print(make_table(found, pairs))
    if chosen.plot is not None:
        plot(found, chosen.plot)


if __name__ == "__main__":
    main()
