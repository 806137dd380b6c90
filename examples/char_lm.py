"""Train a small character language model on the sources of Python's standard library, then let it write.

    python examples/char_lm.py                                     # a few minutes on two CPU cores
    python examples/char_lm.py --quick                             # under a minute, to see that everything works
    python examples/char_lm.py --package build/mctune_cpu          # with the kernels that `mctune search` tuned
    python examples/char_lm.py --mixer memory-caching linear attention --out char_lm.png

Every layer is a token mixer and an MLP. The mixer is one of

- ``memory-caching``: the layer of mctune (arXiv:2602.24281), gated residual memory over segments of the context;
- ``linear``: the same layer with one segment as long as the context, which is plain linear attention;
- ``attention``: torch's scaled dot-product attention with rotary positions.

The text is split by file: every tenth file is kept for validation. Losses are in nats a character.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

MIXERS = ("memory-caching", "linear", "attention")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127))) + "\ufffd"
"""The vocabulary; the last one stands for every other character."""
PROMPTS = ("def read(self, ", "import os\nimport ")


@dataclass(frozen=True)
class Size:
    """Model and training sizes. Heads are 64 wide, as the kernels of ``mctune search --workload quick``."""

    context: int = 1024
    batch: int = 4
    steps: int = 400
    hidden: int = 128
    heads: int = 2
    head_dim: int = 64
    layers: int = 4
    segment: int = 128
    validation: int = 24
    sample: int = 400


QUICK = Size(context=256, batch=4, steps=200, layers=2, segment=64, validation=16, sample=120)


@dataclass(frozen=True)
class Row:
    """One point of a loss curve."""

    mixer: str
    step: int
    tokens: int
    seconds: float
    train: float
    validation: float


def texts() -> tuple[str, str]:
    """The standard library's top-level modules, in the order of their names: for training, and every tenth file."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    # _sysconfigdata describes one machine; the other files are the same wherever this Python is.
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_sysconfigdata"))
    if len(files) < 20:
        raise SystemExit(f"char_lm.py: error: {folder} holds {len(files)} sources; use a Python that has its library's")
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    kept = sources[9::10]
    del sources[9::10]
    return "\n".join(sources), "\n".join(kept)


def encode(text: str) -> Tensor:
    """int64 [characters]."""
    places = {character: place for place, character in enumerate(CHARACTERS)}
    return torch.tensor([places.get(character, len(CHARACTERS) - 1) for character in text])


def decode(tokens: Tensor) -> str:
    return "".join(CHARACTERS[place] for place in tokens.tolist())


class KeyValues:
    """The cache of ``attention``: keys and values of each layer, [B, H, T, D]."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def length(self, layer: int) -> int:
        return self.layers[layer][0].shape[2] if layer in self.layers else 0

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            k, v = (torch.cat(pair, 2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Causal softmax attention with rotary positions, called as ``MemoryCaching`` is."""

    def __init__(self, hidden: int, heads: int, head_dim: int, layer_idx: int) -> None:
        super().__init__()
        self.heads, self.layer_idx = heads, layer_idx
        self.qkv = nn.Linear(hidden, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, hidden, bias=False)
        self.register_buffer("rates", 10_000.0 ** -torch.linspace(0, 1, head_dim // 2), persistent=False)

    def forward(
        self, x: Tensor, past_key_values: KeyValues | None = None, use_cache: bool = False
    ) -> tuple[Tensor, None, KeyValues | None]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        past = past_key_values.length(self.layer_idx) if past_key_values is not None else 0
        angles = torch.arange(past, past + x.shape[1])[:, None] * self.rates
        q, k = (_rotated(part, angles.cos(), angles.sin()) for part in (q, k))
        if past_key_values is not None:
            k, v = past_key_values.add(self.layer_idx, k, v)
        # A token sees all that came before this call, and of this call what is not after it.
        mask = torch.ones(x.shape[1], k.shape[2], dtype=torch.bool).tril(past) if past else None
        y = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2)), None, past_key_values


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], -1)


class Block(nn.Module):
    """Mix the tokens, then an MLP on each; both added to what came in."""

    def __init__(self, hidden: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp_norm = nn.RMSNorm(hidden), mixer, nn.RMSNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        mixed, _, _ = self.mixer(self.norm(x), past_key_values=cache, use_cache=cache is not None)
        x = x + mixed
        return x + self.down(gelu(self.up(self.mlp_norm(x))))


class CharLM(nn.Module):
    """Characters in, logits of the next ones out: [B, T] to [B, T, characters]."""

    def __init__(self, mixer: str, size: Size, runtime: ModuleType) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), size.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(size.hidden, _mixer(mixer, size, i, runtime)) for i in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden)
        self.new_cache: Callable[[], Any] = KeyValues if mixer == "attention" else runtime.MemoryCache

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cache)
        return self.norm(x) @ self.embedding.weight.T


def _mixer(name: str, size: Size, layer_idx: int, runtime: ModuleType) -> nn.Module:
    if name == "attention":
        return Attention(size.hidden, size.heads, size.head_dim, layer_idx)
    return runtime.MemoryCaching(
        size.hidden,
        size.heads,
        head_dim=size.head_dim,
        aggregation="grm",
        segment_length=size.segment if name == "memory-caching" else size.context,
        use_short_conv=True,
        layer_idx=layer_idx,
    )


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean nats a character of windows [B, T + 1]."""
    return cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, size: Size) -> float:
    """The mean loss over windows spread evenly over the text: always the same ones."""
    starts = torch.linspace(0, len(text) - size.context - 1, size.validation).long()
    windows = torch.stack([text[start : start + size.context + 1] for start in starts.tolist()])
    losses = [loss_of(model, part) * len(part) for part in windows.split(size.batch)]
    return float(sum(losses)) / size.validation


def train(mixer: str, size: Size, runtime: ModuleType, seed: int, console: Console) -> tuple[CharLM, list[Row]]:
    """A model and its loss curve."""
    training, validation = (encode(text) for text in texts())
    torch.manual_seed(seed)
    model = CharLM(mixer, size, runtime)
    # Weight decay is for matrices; norms and biases go without.
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1}]
    groups += [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    warmup = max(1, size.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.05 + 0.475 * (1 + math.cos(math.pi * step / size.steps)))
    )
    draw = torch.Generator().manual_seed(seed)
    count = sum(p.numel() for p in model.parameters())
    told = f"{mixer}: {count:,} parameters, {len(training):,} characters to train on, {len(validation):,} to validate"
    console.print(told, soft_wrap=True)
    rows, since, seconds = [], [], 0.0
    with _progress(console) as progress:
        bar = progress.add_task(mixer, total=size.steps, loss=math.nan, rate=0.0)
        for step in range(1, size.steps + 1):
            began = time.perf_counter()
            starts = torch.randint(len(training) - size.context, (size.batch,), generator=draw).tolist()
            loss = loss_of(model, torch.stack([training[start : start + size.context + 1] for start in starts]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seconds += time.perf_counter() - began
            since.append(loss.item())
            tokens = step * size.batch * size.context
            progress.update(bar, advance=1, loss=since[-1], rate=tokens / seconds)
            if step % max(1, size.steps // 10) == 0 or step == size.steps:
                rows.append(
                    Row(mixer, step, tokens, seconds, sum(since) / len(since), validate(model, validation, size))
                )
                console.print(said(rows[-1]), soft_wrap=True)
                since = []
    return model, rows


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )


def said(row: Row) -> str:
    """One line."""
    return (
        f"{row.mixer} step {row.step}: train {row.train:.3f}, validation {row.validation:.3f} nats a character "
        f"({row.validation / math.log(2):.3f} bits), {row.tokens / row.seconds:,.0f} tokens/s"
    )


@torch.no_grad()
def generate(model: CharLM, prompt: Tensor, length: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """``length`` more tokens of each prompt [B, n]: the prompt in one forward, then one token at a time.

    ``choose`` takes logits [B, characters] and gives tokens [B].
    """
    cache = model.new_cache()
    tokens, given = prompt, prompt
    for _ in range(length):
        given = choose(model(given, cache)[:, -1])[:, None]
        tokens = torch.cat([tokens, given], 1)
    return tokens[:, prompt.shape[1] :]


def sampler(seed: int, temperature: float = 0.7) -> Callable[[Tensor], Tensor]:
    """Draws from the softmax of the logits."""
    draw = torch.Generator().manual_seed(seed)
    return lambda logits: torch.multinomial((logits / temperature).softmax(-1), 1, generator=draw)[:, 0]


def write(rows: Sequence[Row], out: Path) -> None:
    """The loss curves, as a picture or as a table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        plot(rows, out)
        return
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, tuple(Row.__dataclass_fields__), lineterminator="\n")
        table.writeheader()
        table.writerows(vars(row) for row in rows)


def plot(rows: Sequence[Row], out: Path) -> None:
    """Validation loss over characters seen, one line a mixer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for mixer in dict.fromkeys(row.mixer for row in rows):
        own = [row for row in rows if row.mixer == mixer]
        axes.plot(
            [row.tokens / 1e6 for row in own],
            [row.validation for row in own],
            marker="o",
            markersize=3,
            label=f"{mixer}: {own[-1].validation:.3f}",
        )
    axes.set(xlabel="million characters trained on", ylabel="validation loss, nats a character")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def load(package: Path | None) -> ModuleType:
    """mctune's own runtime, or the package that ``mctune search`` left in a directory."""
    if package is None:
        return importlib.import_module("mctune")
    if not (package / "tuned.json").is_file():
        raise SystemExit(f"char_lm.py: error: {package} is no tuned package; `mctune search --out {package}` makes one")
    sys.path.insert(0, str(package.resolve().parent))
    return importlib.import_module(package.resolve().name)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mixer", nargs="+", choices=MIXERS, default=["memory-caching"], help="one or more, in turn")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps, under a minute")
    parser.add_argument("--steps", type=int, help=f"training steps (default {Size.steps}, quick {QUICK.steps})")
    parser.add_argument("--package", type=Path, metavar="DIR", help="take the layer from this tuned package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("char_lm.csv"), help="loss curve, .csv or .png")
    options = parser.parse_args(arguments)
    if options.out.suffix not in (".csv", ".png"):
        parser.error(f"--out {options.out}: the name must end in .csv or .png")
    if options.out.suffix == ".png" and find_spec("matplotlib") is None:
        parser.error(f"--out {options.out} needs matplotlib: pip install matplotlib; or name a file that ends in .csv")
    size = QUICK if options.quick else Size()
    if options.steps is not None:
        size = Size(**{**vars(size), "steps": options.steps})
    runtime, console, rows = load(options.package), Console(stderr=True, highlight=False), []
    for mixer in options.mixer:
        model, curve = train(mixer, size, runtime, options.seed, console)
        rows += curve
        write(rows, options.out)
        choose = sampler(options.seed)
        for prompt in PROMPTS:
            began = time.perf_counter()
            written = generate(model, encode(prompt)[None], size.sample, choose)[0]
            rate = size.sample / (time.perf_counter() - began)
            print(f"--- {mixer}, {rate:,.0f} characters/s\n{prompt}{decode(written)}\n")
    for mixer in options.mixer:
        print(said([row for row in rows if row.mixer == mixer][-1]))
    print(f"loss curve in {options.out}")


if __name__ == "__main__":
    main()
