"""``mctune targets``: the machines that kernels can be tuned for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from mctune.cli._output import json_option, number, print_json, say, text_table
from mctune.core.errors import UsageError
from mctune.core.target import FIGURES, Target, resolve, targets

_UNITS = {
    "cores": "cores / SMs / CUs",
    "clock_ghz": "GHz",
    "matrix_tflops": "matrix TFLOP/s",
    "dram_gbs": "DRAM GB/s",
    "cache_mb": "cache MiB",
    "cache_tbs": "cache TB/s",
    "shared_bytes": "shared B/block",
    "shared_kb_per_core": "shared KiB/SM",
    "threads_per_core": "threads/SM",
}


@click.command()
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the targets, or show NAME with the source of each figure."""
    if name is None:
        found = targets()
        if as_json:
            print_json([_json(target) for target in found])
        else:
            click.echo(text_table(("target", "aliases", "backend", "arch", *_UNITS.values()), map(_line, found)))
            for target in found:
                if (why := _backend(target)[1]) is not None:
                    say(f"none: {why}")
            say("? marks a figure without a trusted source; mctune targets NAME says where each comes from")
        return
    target, note = resolve(name)
    if note:
        say(note)
    if as_json:
        print_json(_json(target))
    else:
        backend, reason = _backend(target)
        click.echo(f"{target.name}: {target.title}, {target.kind} {target.arch}")
        click.echo(f"kernels by {backend}" if backend else f"no kernels: {reason}")
        click.echo(text_table(("figure", "value", "source"), _figures(target)))


def _json(target: Target) -> dict[str, Any]:
    backend, reason = _backend(target)
    return {**asdict(target), "sources": dict(target.sources), "backend": backend, "no_backend": reason}


def _backend(target: Target) -> tuple[str | None, str | None]:
    """What compiles for the target, or why nothing does."""
    from mctune.backends import makers

    try:
        return ", ".join(maker.partition(".")[0] for maker in makers(target)), None
    except UsageError as error:
        return None, str(error)


def _line(target: Target) -> list[str]:
    figures = [number(getattr(target, field)) + "?" * (field in target.unsure) for field in FIGURES]
    return [target.name, ",".join(target.aliases) or "-", _backend(target)[0] or "none", target.arch, *figures]


def _figures(target: Target) -> list[list[str]]:
    lines = []
    for field, source in target.sources:
        unit = f"{target.matrix_dtype} {_UNITS[field]}" if field == "matrix_tflops" else _UNITS[field]
        remark = " (unsure)" if field in target.unsure else ""
        lines.append([unit, number(getattr(target, field)), source + remark])
    if target.on_cpu:
        lines.append(["float32 lanes", str(target.vector_floats), f"the widest registers of {target.arch}"])
    return lines
