"""The README of an emitted package: what it holds, how it was measured, how to import it."""

from __future__ import annotations

from typing import Any

from mctune.core.outcome import describe as describe_outcome
from mctune.core.outcome import from_dict
from mctune.core.problem import Problem

PREDICTED = (
    "**Its choices are predicted, not measured**: the kernels were compiled for this GPU where there was none, and "
    "ranked by a cost model. On one, `mctune search` with the same options measures them."
)
ON_A_CPU = (
    "Each time is of the library compiled for the CPU that it was tuned on. Another CPU runs the build of the same "
    "source for x86-64-v3, which was verified and not timed; one without AVX2 runs the eager path."
)
_ON_A_GPU = (
    "The kernels are Python, compiled by Triton when they first run and kept in its cache; `mctune warm` compiles them "
    "beforehand. They were verified in Triton's interpreter, those of bfloat16 in float16."
)


def card(name: str, table: dict[str, Any]) -> str:
    """Markdown for the package ``name`` with the tuned ``table`` (the document of tuned.json)."""
    target, versions = table["target"], table["versions"]
    on_cpu = target["kind"] == "cpu"
    cores = "cores" if on_cpu else "compute units" if target["kind"] == "hip" else "multiprocessors"
    arrays = "float32 on the CPU" if on_cpu else "bfloat16 on the GPU"
    lines = [
        f"# {name}: Memory Caching tuned for {target['title'] or target['name']}",
        "",
        "Kernels for [Memory Caching](https://arxiv.org/abs/2602.24281), emitted by mctune.",
        "",
        *((PREDICTED, "") if predicted_in(table) else ()),
        "```python",
        f"from {name} import memory_caching, MemoryCaching",
        "",
        f"y = memory_caching(q, k, v, u, aggregation='grm', segment_length=256)  # [B, T, H, D] {arrays}",
        "```",
        "",
        f"It needs torch and {needs(on_cpu, versions)}. A call that no kernel here fits runs on the eager path and "
        "says so once.",
        "",
        f"Target: {target['name']} ({target['arch']}, {target['cores']} {cores}). Made with "
        + ", ".join(f"{package} {version}" for package, version in versions.items())
        + ".",
        "",
        *rows(table),
        "",
        ON_A_CPU if on_cpu else _ON_A_GPU,
        "`manifest.json` holds the SHA-256 of every file: one that was changed, removed or added is refused when the "
        "package is imported, before any of it runs.",
        "",
    ]
    return "\n".join(lines)


def rows(table: dict[str, Any]) -> list[str]:
    """The entries of a tuned table as a table in Markdown, a line each."""
    lines = [
        "| problem | time | error against the float64 oracle | recommended | configuration |",
        "|---|---|---|---|---|",
    ]
    for entry in table["entries"]:
        problem = Problem.from_dict(entry["problem"])
        error = entry["verified"].get("error")
        lines.append(
            f"| {problem} | {describe_outcome(from_dict(entry['outcome']))} | "
            f"{'' if error is None else f'{error:.1e}'} | {'yes' if entry['recommended'] else ''} | "
            f"`{' '.join(f'{key}={value}' for key, value in entry['config'].items())}` |"
        )
    return lines


def predicted_in(table: dict[str, Any]) -> bool:
    """Whether a time of the table is predicted."""
    return any(entry["outcome"]["kind"] == "predicted" for entry in table["entries"])


def needs(on_cpu: bool, versions: dict[str, str]) -> str:
    """What the kernels need besides torch, and what they do not."""
    if on_cpu:
        ffi = versions.get("apache-tvm-ffi", "0.1.14.post1")
        return f"`apache-tvm-ffi=={ffi}`: no mctune, no TVM, no Optuna"
    return "Triton 3.6 to 3.9, the one that torch brings: no mctune, no Optuna"
