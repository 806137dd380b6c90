"""The facts of `benchmarks/contact.py` as a table for people, and its times as rows for `mctune calibrate`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from contact_guard import Facts

Fact = Mapping[str, Any]


def table(facts: Facts) -> str:
    """Everything that matters, the worst news first."""
    parts = [_machine(facts), _steps(facts), _right(facts), _forms(facts), _times(facts), _kernels(facts), _held(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _lines(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in (header, *rows))  # fmt: skip


def _machine(facts: Facts) -> str:
    lines = []
    for fact in facts.of("versions"):
        found = ", ".join(f"{name} {text}" for name, text in fact["packages"].items() if text)
        lines.append(f"python {fact['python']}, {found}; {fact['cores']} cores")
    for fact in facts.of("properties"):
        lines.append(
            f"{fact['name']}: {fact['multi_processor_count']} multiprocessors, L2 {(fact['L2_cache_size'] or 0) >> 20} "
            f"MiB, {fact['shared_memory_per_block_optin']} B of shared memory a block"
        )
    lines += [f"ptxas {fact['version']} ({fact['which']})" for fact in facts.of("ptxas")]
    for fact in facts.of("rates"):
        lines.append(f"bfloat16 products {fact['matrix'] / 1e12:.0f} TFLOP/s, copy {fact['copy'] / 1e9:.0f} GB/s")
    lines += [f"a rehearsal: {fact['why']}" for fact in facts.of("rehearsal")]
    return "\n".join(lines)


def _steps(facts: Facts) -> str:
    """Those that did not end well, and why."""
    lost = [(f["step"], f["outcome"], f"{f['seconds']} s") for f in facts.of("step") if f["outcome"] != "ok"]
    lost += [(f["step"], "raised", f["error"][:150]) for f in facts.of("raised")]
    lost += [(f["step"], "left out", f"{f.get('name', '')}: {f['error'][:150]}") for f in facts.of("left out")]
    lost += [(f["step"], "not compiled", f"{f['job']}: {f['error'][:150]}") for f in facts.of("not compiled")]
    return _lines(("step", "outcome", ""), lost)


def _right(facts: Facts) -> str:
    rows = [
        (f["aggregation"], f["tensor"], f"{f['error']:.1e}", f"{f['limit']:.0e}", "right" if f["right"] else "WRONG")
        for f in facts.of("compared")
    ]
    rows += [
        (f["aggregation"], f"{f['runs']} repeats at T {f['T']}", "", "",
         "bitwise equal" if f["equal"] else f"DIFFERENT {json.dumps(f['differing'])}")
        for f in facts.of("repeats")
        if not f["step"].startswith("form ")
    ]  # fmt: skip
    return _lines(("aggregation", "result", "error", "limit", ""), rows)


def _forms(facts: Facts) -> str:
    """What the search for a kernel that is not right has found."""
    rows = [
        (f["aggregation"], f["form"], f["only"] or "all kernels",
         "right" if f["right"] else "wrong", "equal" if f["equal"] else "differs")
        for f in facts.of("form")
    ]  # fmt: skip
    rows += [
        (f["aggregation"], "first to differ", json.dumps(f["operations"]) if f["operations"] else "none", "", "")
        for f in facts.of("first to differ")
    ]
    wrong = [f for f in facts.of("operation") if not f["right"]]
    rows += [(f["aggregation"], "operation", f"{f['operation']}[{f['result']}] off {f['error']:.1e}", "", "")
             for f in wrong[:6]]  # fmt: skip
    return _lines(("aggregation", "form", "of", "is", "repeats"), rows)


def _times(facts: Facts) -> str:
    rows = []
    for f in facts.of("timed"):
        share = fraction(f, facts)
        rows.append(
            (f["name"], str(f["T"]), f"{f['ms']:.3f}", f"{f['low']:.3f} to {f['high']:.3f}", f"{f['host_ms']:.3f}",
             f"{share:.0%}" if share else "", "" if f.get("variant") is None else _briefly(f["variant"]))
        )  # fmt: skip
    return _lines(("measured", "T", "ms", "20% to 80%", "host ms", "of the bound", ""), rows)


def _briefly(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name.removeprefix('read_')}={value}" for name, value in values.items())


def fraction(fact: Fact, facts: Facts) -> float | None:
    """The shortest possible time at the rates that this GPU reached, over a measured one."""
    from mctune.core.problem import Problem
    from mctune.core.work import attention_operations, bound, work

    found = facts.of("rates")
    if not found or "part" not in fact or (not fact.get("problem") and "sizes" not in fact):
        return None
    matrix, copy = found[-1]["matrix"], found[-1]["copy"]
    problem = Problem.from_dict(fact.get("problem") or fact["sizes"])
    if "sdpa" in fact["name"] or "attention" in fact["name"]:
        if fact["part"] == "decode":
            return None
        # A backward is two and a half forwards: five products instead of two.
        return attention_operations(problem) * (3.5 if fact["part"] == "training" else 1.0) / matrix * 1e3 / fact["ms"]
    if problem.aggregation == "residual" and fact["part"] != "decode":
        problem = problem.replace(segment_length=problem.T)  # what is computed has no segments
    forward, backward = problem.replace(pass_="forward"), problem.replace(pass_="backward")
    parts = {"forward": [forward], "backward": [backward], "training": [forward, backward]}.get(fact["part"], [problem])
    seconds = sum(bound(work(part), matrix, copy) for part in parts)
    if fact.get("state_dtype", "torch.float32") != "torch.float32":
        seconds *= 0.5  # nearly all of the bytes are states
    return seconds * 1e3 / fact["ms"]


def _kernels(facts: Facts) -> str:
    """Measured beside predicted: calibration points."""
    told = {f["job"]: f["kernels"] for f in facts.of("predicted")}
    rows = []
    for f in facts.of("kernel time"):
        ours = told.get(f"{f['aggregation']} {f['part']} {f['T']}", [])
        same = [k for k in facts.of("kernel time", aggregation=f["aggregation"], part=f["part"], T=f["T"],
                                    kernel=f["kernel"]) if k["place"] <= f["place"]]  # fmt: skip
        fit = [k for k in ours if k["kernel"] == f["kernel"]]
        guess = fit[len(same) - 1] if len(same) <= len(fit) else None
        rows.append(
            (f"{f['aggregation']} {f['part']} T {f['T']}", f["kernel"][:60], f"{f['us']:.0f}",
             f"{guess['us']:.0f}" if guess else "", f"{f['us'] / guess['us']:.2f}" if guess else "",
             guess["bound"] if guess else "")
        )  # fmt: skip
    return _lines(("pass", "kernel", "measured us", "predicted us", "ratio", "bound"), rows)


def _held(facts: Facts) -> str:
    rows = [(f["problem"], f["failure"] or f"{f['error']:.1e}") for f in facts.of("held") if f["failure"]]
    done = facts.of("verified")
    told = [f"mctune verify: {f['count']} of {f['of']} candidates, {f['wrong']} not right" for f in done[-1:]]
    return "\n".join([*told, *([_lines(("candidate", "failure"), rows)] if rows else [])])


def rows(facts: Facts, target: Any) -> dict[str, Any]:
    """What `mctune calibrate` and `mctune report` read: the passes of mctune that were timed."""
    from mctune.core.environment import environment, today
    from mctune.core.outcome import Timed
    from mctune.report.rows import Row

    made = []
    for f, problem, config in _passes(facts):
        errors = [c["error"] for c in facts.of("compared", aggregation=problem.aggregation) if c["right"]]
        timed = Timed(f["ms"], f["low"], f["high"], f["repeats"], max(errors, default=0.0), f["sm_mhz"], f["celsius"])
        others = {o["name"]: o["ms"] for o in facts.of("timed", T=f["T"], part=f["part"]) if not o.get("config")}
        made.append(Row.of(target.name, problem, f.get("backend", "triton"), config, timed, baselines=others,
                           fraction_of_bound=fraction(f, facts), versions=environment(target)["versions"],
                           date=today()))  # fmt: skip
    return {
        "rows": [row.to_dict() for row in made],
        "environment": {
            **environment(target),
            **({"rehearsal": "times mean nothing"} if facts.of("rehearsal") else {}),
        },
        "rates": [{"matrix_gflops": f["matrix"] / 1e9, "copy_gbs": f["copy"] / 1e9} for f in facts.of("rates")],
    }


def _passes(facts: Facts) -> Iterator[tuple[Fact, Any, Any]]:
    from mctune.core.config import Config
    from mctune.core.problem import Problem

    for f in facts.of("timed"):
        whole = f.get("part") in ("forward", "backward", "decode") and f.get("config")
        if whole and f.get("state_dtype", "torch.float32") == "torch.float32":
            yield f, Problem.from_dict(f["problem"]), Config.of(f["config"])
