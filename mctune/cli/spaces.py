"""``mctune spaces``: what is searched, and the named sets of problems."""

from __future__ import annotations

from typing import Any

import click

from mctune.backends.spaces import load_space
from mctune.cli._output import json_option, print_json, text_table
from mctune.core.errors import UsageError
from mctune.core.paths import search_spaces_dir
from mctune.core.problem import FAMILIES
from mctune.core.space import SearchSpace
from mctune.core.workload import Case, Workload, load_workload, workload_names


@click.command()
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the search spaces and workloads, or show NAME (a space, as backend/pass, or a workload) in full."""
    spaces, workloads = _spaces(), {known: load_workload(known) for known in workload_names()}
    if name is not None:
        if name.count("/") == 1:
            name = name.replace("/", f"/{FAMILIES[0]}/")
        if name not in spaces and name not in workloads:
            raise UsageError(f"no search space or workload {name!r}; known: {', '.join([*spaces, *workloads])}")
        spaces = {known: space for known, space in spaces.items() if known == name}
        workloads = {known: workload for known, workload in workloads.items() if known == name}
    if as_json:
        print_json(
            {
                "spaces": [_space_json(known, space) for known, space in spaces.items()],
                "workloads": [_workload_json(workload) for workload in workloads.values()],
            }
        )
    elif name is None:
        lines = [(known, str(len(space.params)), f"{space.size:,}") for known, space in spaces.items()]
        click.echo(text_table(("space", "parameters", "points before constraints"), lines))
        click.echo()
        about = [(w.name, str(len(w.cases)), str(w.trials), w.description) for w in workloads.values()]
        click.echo(text_table(("workload", "studies", "trials each", "what"), about))
    else:
        for space in spaces.values():
            click.echo(_space_text(space))
        for workload in workloads.values():
            click.echo(_workload_text(workload))


def _spaces() -> dict[str, SearchSpace]:
    """Every ``SPACE`` under ``search_spaces``, by its path: ``backend/family/pass``."""
    found = {}
    for path in sorted(search_spaces_dir().rglob("*.py")):
        if not path.stem.startswith("_"):
            *maker, family, pass_ = path.relative_to(search_spaces_dir()).with_suffix("").parts
            found["/".join((*maker, family, pass_))] = _load(".".join(maker), family, pass_)
    return found


def _load(maker: str, family: str, pass_: str) -> SearchSpace:
    try:
        return load_space(maker, family, pass_)
    except AttributeError:
        raise UsageError(f"{maker}/{family}/{pass_}.py defines no SPACE = SearchSpace(...)") from None


def _space_json(name: str, space: SearchSpace) -> dict[str, Any]:
    return {
        "name": name,
        "size": space.size,
        "params": [
            {"name": p.name, "values": list(p.values), "ordered": p.ordered, "help": p.help} for p in space.params
        ],
        "constraints": [{"name": c.name, "reason": c.reason} for c in space.constraints],
        "default": space.default.to_dict(),
    }


def _workload_json(workload: Workload) -> dict[str, Any]:
    return {
        "name": workload.name,
        "description": workload.description,
        "trials": workload.trials,
        "timeout_s": workload.timeout_s,
        "cases": [
            {
                "problem": case.problem.to_dict(),
                "segment_lengths": list(case.segment_lengths),
                "trials": case.trials or workload.trials,
            }
            for case in workload.cases
        ],
    }


def _space_text(space: SearchSpace) -> str:
    params = [
        (
            p.name,
            " ".join(map(str, p.values)),
            str(space.default[p.name]) if p.name in space.default else "-",
            p.help,
        )
        for p in space.params
    ]
    constraints = [(c.name, c.reason) for c in space.constraints]
    text = text_table(("parameter", "values", "default", "meaning"), params)
    return text + ("\n\n" + text_table(("constraint", "rejects because"), constraints) if constraints else "")


def _workload_text(workload: Workload) -> str:
    limit = f", {workload.timeout_s:g} s for all of them" if workload.timeout_s else ""
    head = f"{workload.name}: {workload.description}\n{workload.trials} trials a study{limit}\n"
    return head + "\n".join(f"  {case}{_own_trials(case)}" for case in workload.cases)


def _own_trials(case: Case) -> str:
    return f", {case.trials} trials" if case.trials else ""
