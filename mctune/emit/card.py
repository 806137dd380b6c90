"""The README of an emitted package: what it holds, how it was measured, how to import it."""

from __future__ import annotations

from typing import Any

from mctune.core.outcome import describe as describe_outcome
from mctune.core.outcome import from_dict
from mctune.core.problem import Problem


def card(name: str, table: dict[str, Any]) -> str:
    """Markdown for the package ``name`` with the tuned ``table`` (the document of tuned.json)."""
    target, versions = table["target"], table["versions"]
    lines = [
        f"# {name}: Memory Caching tuned for {target['title'] or target['name']}",
        "",
        "Kernels for [Memory Caching](https://arxiv.org/abs/2602.24281), emitted by mctune.",
        "",
        "```python",
        f"from {name} import memory_caching, MemoryCaching",
        "",
        "y = memory_caching(q, k, v, u, aggregation='grm', segment_length=256)  # [B, T, H, D] float32 on the CPU",
        "```",
        "",
        f"It needs torch and `apache-tvm-ffi=={versions.get('apache-tvm-ffi', '0.1.14.post1')}`: no mctune, no TVM, no "
        "Optuna. A call that no kernel here fits runs on the eager path and says so once.",
        "",
        f"Target: {target['name']} ({target['arch']}, {target['cores']} cores). Made with "
        + ", ".join(f"{package} {version}" for package, version in versions.items())
        + ".",
        "",
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
    lines += [
        "",
        "Each time is of the library compiled for the CPU that it was tuned on. Another CPU runs the build of the same "
        "source for x86-64-v3, which was verified and not timed; one without AVX2 runs the eager path.",
        "`manifest.json` holds the SHA-256 of every file: a file that was changed is refused when the package is "
        "imported.",
        "",
    ]
    return "\n".join(lines)
