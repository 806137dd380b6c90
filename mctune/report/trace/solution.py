"""Solutions: an entry of a tuned table with all that launches it, a package of that one kernel.

Sources are text, so compiled kernels are there in base64 and become files when the solution is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from mctune.core.errors import UsageError
from mctune.core.problem import Problem
from mctune.report.rows import Row
from mctune.report.trace.definition import inputs_of, name_of, workload
from mctune.report.trace.reference import token_inputs

AUTHOR = "mctune"
TOLD = "mctune.json"
"""The source that says what a Solution has no field for."""
_ENTRY = "main.py"
_THREADS = "kernels/threads.so"
_NEEDS = {("tvm", "cpu"): ("apache-tvm-ffi",), ("triton", "cuda"): ("triton",), ("triton", "hip"): ("triton",)}
"""What a solution needs beside torch, by backend and kind of target."""
_SERVED = ("recurrence", "aggregation", "state_init", "Dk", "Dv", "dtype")
"""What the problems of a backward kernel and of the forward kernel before it have in common."""

_UNPACK = """\
import base64
import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
for packed in sorted(HERE.glob("binaries/*.b64")):
    data, file = base64.b64decode(packed.read_text()), HERE / "package" / "kernels" / packed.stem
    if not file.is_file() or file.read_bytes() != data:
        beside = file.with_name(f".{os.getpid()}-{file.name}")
        file.parent.mkdir(exist_ok=True)
        beside.write_bytes(data)
        os.replace(beside, file)

"""
_FORWARD = Template('''\
from .package import memory_caching  # noqa: E402

OPTIONS = $options


def run($inputs):
    """y [B, T, H, Dv]."""
    return memory_caching($call, **OPTIONS)
''')
_BACKWARD = Template('''\
import torch  # noqa: E402

from .package import memory_caching  # noqa: E402

OPTIONS = $options


def run($inputs):
    """The gradients of the inputs before dy: the forward, then the backward by autograd."""
    leaves = [x.detach().requires_grad_() for x in ($tokens)]
    $tokens = leaves
    with torch.enable_grad():
        return torch.autograd.grad(memory_caching($call, **OPTIONS), leaves, dy)
''')
_DECODE = Template('''\
import torch  # noqa: E402

from .package.runtime.api.step import memory_caching_step  # noqa: E402
from .package.runtime.memory import LayerMemory, Rules  # noqa: E402

OPTIONS = $options
RULES = Rules(OPTIONS["recurrence"], OPTIONS["state_init"], OPTIONS["segment_length"], 16, True)


def run($inputs):
    """y [B, H, Dv] of one token, and the online memory after it; what is given stays as it is."""
    B, N, C = states.shape[0], states.shape[2], RULES.segment_length
$absent    if filled == 0:
        key_sum = torch.zeros_like(key_sum)
        if not RULES.carried:
            online, last_key, last_value = (torch.zeros_like(x) for x in (online, last_key, last_value))
    stores = (descriptors, (online.clone(),), *(x.clone() for x in (key_sum, last_key, last_value)), (), ())
    counts = (torch.full((B,), count, dtype=torch.int32) for count in (N, filled))
    memory = LayerMemory((states,), *stores, *counts, RULES)
    with torch.no_grad():
        $tokens = (x.unsqueeze(1) for x in ($tokens))
        y = memory_caching_step($call, memory=memory, **OPTIONS)
    return y[:, 0], memory.states[0][:, :, N] if filled + 1 == C else memory.online[0]
''')
_ABSENT = {
    "descriptors": "descriptors = states.new_zeros(states.shape[:4])",
    "key_sum": "key_sum = online.new_zeros(online.shape[:3])",
    "last_key": "last_key = online.new_zeros(online.shape[:3])",
    "last_value": "last_value = 0 * online[:, :, 0]",
}
"""What stands for a part of a memory that the operation does not use."""
_MAINS = {"forward": _FORWARD, "backward": _BACKWARD, "decode": _DECODE}


def solution(
    row: Row, tuned: Mapping[str, Any], entry: Mapping[str, Any], files: Mapping[str, bytes]
) -> dict[str, Any]:
    """The Solution of an entry of a tuned table.

    Args:
        row: the entry's row.
        tuned: the table.
        entry: the entry, as :meth:`mctune.core.winner.Winner.record` writes it.
        files: the bytes of every file of the package, by their paths there.

    Raises:
        UsageError: if the package has not what it takes to launch it.
    """
    entries = [entry]
    if row.problem.pass_ == "backward":
        entries.append(_forward_of(row.problem, tuned, entry))
    sources = {
        _ENTRY: _entry_point(row.problem, row.backend),
        TOLD: json.dumps(_told(row), indent=1) + "\n",
        **_package(tuned, entries, files),
    }
    listed = [{"path": path, "content": content} for path, content in sources.items()]
    key = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12]
    return {
        "name": f"{AUTHOR}_{row.target}_{row.backend}_{row.problem.pass_}_{key}",
        "definition": name_of(row.problem),
        "author": AUTHOR,
        "description": _description(row),
        "spec": {
            "language": "triton" if row.backend == "triton" else "python",
            "target_hardware": [str(tuned["target"].get("title") or row.target)],
            "entry_point": f"{_ENTRY}::run",
            "dependencies": ["torch", *_NEEDS.get((row.backend, tuned["target"]["kind"]), ())],
            "destination_passing_style": False,
        },
        "sources": listed,
    }


def _description(row: Row) -> str:
    config = " ".join(f"{name}={value}" for name, value in row.config.to_dict().items())
    text = f"mctune's kernel for {row.problem}, tuned for {row.target} by {row.backend}: {config}."
    if row.how == "measured":
        return text
    return text + f" Its time was not measured: a cost model predicts {row.ms:.4g} ms."


def _told(row: Row) -> dict[str, Any]:
    """What a Solution has no field for. A predicted time is here alone: no Trace has it."""
    told: dict[str, Any] = {
        "target": row.target,
        "backend": row.backend,
        "config": row.config.to_dict(),
        "workload": workload(row.problem),
        "versions": dict(row.versions),
    }
    if row.how == "predicted":
        told["predicted"] = rest_of(row) | {"ms": row.ms}
    return told


def rest_of(row: Row) -> dict[str, Any]:
    """What stands in a row besides what it is of and its time; what is absent there is here too."""
    names = ("low", "high", "repeats", "error", "fraction_of_bound", "sm_mhz", "celsius", "date")
    found = {name: getattr(row, name) for name in names if getattr(row, name) is not None}
    pairs = {name: [list(pair) for pair in getattr(row, name)] for name in ("baselines", "shares")}
    return found | {name: listed for name, listed in pairs.items() if listed}


def _entry_point(problem: Problem, backend: str) -> str:
    tokens = token_inputs(problem)
    names = [f"{name}={name}" if name in problem.writes.gates else name for name in tokens]
    fields = ("recurrence", "aggregation", "state_init", "segment_length", "top_k")
    options = {name: value for name, value in problem.to_dict().items() if name in fields}
    if problem.pass_ != "decode":
        options["segmentation"] = problem.segmentation
    inputs = inputs_of(problem)
    absent = [line for name, line in _ABSENT.items() if name not in inputs]
    text = _MAINS[problem.pass_].substitute(
        options=repr(options | {"backend": backend}),
        inputs=", ".join(inputs),
        tokens=", ".join(tokens),
        call=", ".join(names),
        absent="".join(f"    {line}\n" for line in absent),
    )
    return f'"""{problem}: the kernel of the package beside this file, emitted by mctune."""\n\n' + _UNPACK + text


def _forward_of(problem: Problem, tuned: Mapping[str, Any], entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry whose kernel runs before a backward one.

    Raises:
        UsageError: if there is none.
    """
    fields = problem.to_dict()
    for other in tuned["entries"]:
        same = all(other["problem"].get(name) == fields.get(name) for name in _SERVED)
        if other["problem"].get("pass") == "forward" and other["backend"] == entry["backend"] and same:
            return dict(other)
    raise UsageError(f"{problem}: the package has no forward kernel by {entry['backend']} to run before it")


def _package(
    tuned: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], files: Mapping[str, bytes]
) -> dict[str, str]:
    """Sources of a package of these entries alone."""
    wanted = {name for name in files if name.startswith("runtime/")} | {"__init__.py"}
    wanted |= {_THREADS} & set(files)
    for entry in entries:
        parts = [f"kernels/{part}" for part in entry.get("parts", {}).values()]
        wanted |= {name for name in (entry["kernel"], entry["source"], entry.get("portable"), *parts) if name}
    missing = sorted(wanted - set(files))
    if missing:
        raise UsageError(f"{missing[0]} is not in the package; emit it again with `mctune emit`")
    # A source may not be empty.
    held = {name: files[name] or b"\n" for name in sorted(wanted)}
    held["tuned.json"] = (json.dumps({**tuned, "entries": list(entries)}, indent=1, sort_keys=True) + "\n").encode()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(held.items())}
    held["manifest.json"] = (json.dumps({"files": digests}, indent=1) + "\n").encode()
    return dict(_source(name, data) for name, data in sorted(held.items()))


def _source(name: str, data: bytes) -> tuple[str, str]:
    """A file of the package as a source: its text, or base64 beside the package."""
    try:
        text = data.decode()
        if "\r" not in text and "\0" not in text:
            return f"package/{name}", text
    except UnicodeDecodeError:
        pass
    return f"binaries/{name.rpartition('/')[2]}.b64", base64.encodebytes(data).decode()
