"""The card of a repository for the `kernels` library: its README.md, with the metadata that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mctune.emit.card import ON_A_CPU, PREDICTED, needs, predicted_in, rows

_LANGUAGES = {"cuda": ("cuda", "triton"), "hip": ("rocm", "triton"), "cpu": ("cpu",)}
_MADE_WITH = ("mctune", "python", "torch", "triton", "apache-tvm", "apache-tvm-ffi")
_ON_A_GPU = (
    "The kernels are Python, compiled by Triton when they first run and kept in its cache. They were held to the "
    "float64 oracle in Triton's interpreter, those of bfloat16 in float16."
)
_MACHINE_CODE = (
    "These kernels are machine code for Linux on x86-64, made by TVM, which a variant of pure Python must not hold. "
    "They contain no extension of torch: `stable-abi211` says that every torch from 2.11 on serves. Without "
    "`apache-tvm-ffi` the variant loads all the same and runs the PyTorch path. A torch built for CUDA takes it only "
    'when asked: `get_kernel(..., backend="cpu")`.'
)


def hub_card(name: str, version: int, tables: Mapping[str, Sequence[dict[str, Any]]], plain: str) -> str:
    """Markdown for the repository ``name``; ``tables``: the tuned tables by their variant's folder."""
    every = [table for documents in tables.values() for table in documents]
    targets = ", ".join(dict.fromkeys(_title(table) for table in every))
    return "\n".join(
        [
            *_front_matter(every),
            f"# {name}: Memory Caching tuned for {targets}",
            "",
            "Kernels for [Memory Caching](https://arxiv.org/abs/2602.24281): recurrent layers that also read their own",
            "past states. For training and inference, under `torch.compile` too; emitted by mctune.",
            "",
            *_usage(name, version),
            "## What is in it",
            "",
            "| folder | kernels for | needs, besides torch 2.11 and Python 3.10 or later |",
            "|---|---|---|",
            *(
                f"| `build/{folder}` | {', '.join(_title(table) for table in documents)} | {_needs(documents[0])} |"
                for folder, documents in tables.items()
            ),
            f"| `build/{plain}` | none: the PyTorch path, on any CPU | nothing |",
            "",
            "A call runs on the kernel tuned on its device, at the shape nearest to its own. A device that was not",
            "tuned for gets the kernels of the one most like it, by architecture and number of cores. A call that no",
            "kernel fits runs on the PyTorch path and says so once. A variant that is loaded holds its files to",
            "`manifest.json` (SHA-256) before any of them runs; `metadata.json` has the digest for `kernels`.",
            "",
            *_measured(tables),
            *_layers(),
            "## Benchmarks",
            "",
            f"`kernels benchmark ./{name}`, or `kernels benchmark USER/{name} --version {version}`, times the problems",
            "that were tuned beside the PyTorch path on the device at hand, and holds the two to each other first.",
            "",
        ]
    )


def _front_matter(tables: Sequence[dict[str, Any]]) -> list[str]:
    kinds = dict.fromkeys(table["target"]["kind"] for table in tables)
    languages = dict.fromkeys(tag for kind in kinds for tag in _LANGUAGES[kind])
    tags = ("kernels", "kernel", "memory-caching", "linear-attention", "arxiv:2602.24281", *languages)
    return ["---", "library_name: kernels", "license: apache-2.0", "tags:", *(f"- {tag}" for tag in tags), "---", ""]


def _usage(name: str, version: int) -> list[str]:
    return [
        "```python",
        "from kernels import get_kernel  # pip install kernels",
        "",
        f'kernel = get_kernel("USER/{name}", version={version}, trust_remote_code=True)',
        f'# From a folder: kernel = kernels.get_local_kernel(pathlib.Path("{name}"))',
        'y = kernel.memory_caching(q, k, v, u, aggregation="grm", segment_length=256)  # [B, T, H, D]',
        "layer = kernel.MemoryCaching(hidden_size=1024, num_heads=16)  # hidden states in, hidden states out",
        "```",
        "",
        "It holds `memory_caching`, `MemoryCaching`, `MemoryCache` for decoding, `attach_memory_caching` for trained",
        "models, `layers`, and `ops`: its operators, `torch.ops.<id>`, with the `id` of `metadata.json`, which follows",
        "from the content. Several versions can be loaded in one process.",
        "",
    ]


def _measured(tables: Mapping[str, Sequence[dict[str, Any]]]) -> list[str]:
    lines = []
    for folder, documents in tables.items():
        for table in documents:
            target = table["target"]
            versions = table["versions"]
            made = ", ".join(f"{package} {versions[package]}" for package in _MADE_WITH if package in versions)
            lines += [
                f"## {_title(table)}",
                "",
                f"{target['name']}, {target['arch']}, in `build/{folder}`. Made with {made}.",
                "",
                *((PREDICTED, "") if predicted_in(table) else ()),
                *rows(table),
                "",
                *((ON_A_CPU, _MACHINE_CODE) if target["kind"] == "cpu" else (_ON_A_GPU,)),
                "",
            ]
    return lines


def _layers() -> list[str]:
    return [
        "## Layers",
        "",
        "`layers.MemoryCachingCore` is the operation alone, without state of its own, for `kernelize`: its",
        "`forward(q, k, v, u=None)` takes the place of that of a layer with the attributes `aggregation`,",
        "`segment_length` and `top_k`.",
        "",
    ]


def _title(table: dict[str, Any]) -> str:
    return str(table["target"]["title"] or table["target"]["name"])


def _needs(table: dict[str, Any]) -> str:
    return needs(table["target"]["kind"] == "cpu", table["versions"]).partition(":")[0]
