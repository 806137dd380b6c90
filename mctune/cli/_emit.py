"""From a search report to a package: what `mctune search` ends with and `mctune emit` does again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mctune.cli._output import say
from mctune.core.errors import MctuneError
from mctune.core.interrupt import held
from mctune.core.work import cached_state_bytes, cached_states
from mctune.core.workload import Case
from mctune.runtime.kernels.support import served
from mctune.runtime.kernels.table import NAME as TABLE
from mctune.study.events import FrontierPoint, SearchReport, SearchRequest, StudyReport

if TYPE_CHECKING:
    from mctune.core.winner import Winner
    from mctune.emit import Signer
    from mctune.workers.pool import Workers

_replace = click.option(
    "--replace", is_flag=True, help="Write over the package in DIR. Without it, what that holds is kept where better."
)


def replace_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--replace``."""
    return _replace(command)


def emit_report(
    request: SearchRequest,
    report: SearchReport,
    workers: Workers,
    over: bool,
    signer: Signer | None = None,
    repository: Path | None = None,
) -> Path | None:
    """Write the package of every point of every frontier into ``request.out``, or as a ``repository`` for the `kernels`
    library; ``None`` if there is none.

    It is the better, for each problem, of that and of the package that is there, unless it is written ``over``.
    """
    from mctune.emit import emit_package, emit_repository, merge, package_before, place_of
    from mctune.emit.merge import Before
    from mctune.runtime.errors import KernelError
    from mctune.study.frontier import recommend
    from mctune.study.run import ship

    with held():  # a package is written whole
        found = {
            (point.problem.key, study.maker.partition(".")[0]) for study in report.studies for point in study.frontier
        }
        if not found:
            return None
        place = (request.out, TABLE) if repository is None else place_of(repository, request.target)
        before = Before() if over else package_before(place[0], say, place[1])
        again = tuple(_study(winner) for winner in before.stale if winner.key not in found)
        winners = ship(request, replace(report, studies=(*report.studies, *again)), say, workers)
        if not winners:
            return None
        rule: Callable[[Sequence[Winner]], Winner] = partial(recommend, max_slowdown=request.max_slowdown)
        merged = merge(before.winners, winners, rule)
        if kept := len({winner.key for winner in before.winners} - found):
            say(f"{kept} kernels of the package before this one go on in it; --replace leaves them out")
        try:
            if repository is not None:
                return emit_repository(repository, request.target, merged, signer, replace=over)
            return emit_package(request.out, request.target, merged, signer)
        except KernelError as error:
            raise MctuneError(str(error)) from error


def _study(winner: Winner) -> StudyReport:
    """What a study would have found that recommends just this kernel."""
    problem = winner.problem
    point = FrontierPoint(problem, cached_states(problem), cached_state_bytes(problem), winner.config, winner.outcome)
    lengths = (problem.segment_length,) if problem.segment_length else ()
    row = served(winner.device, problem.writes.family, winner.backend)[0]
    return StudyReport(Case(problem, lengths), (), (point,), point, maker=row.maker)
