"""From a search report to a package: what `mctune search` ends with and `mctune emit` does again."""

from __future__ import annotations

from pathlib import Path

from mctune.cli._output import say
from mctune.core.errors import MctuneError
from mctune.core.interrupt import held
from mctune.study.events import SearchReport, SearchRequest


def emit_report(request: SearchRequest, report: SearchReport) -> Path | None:
    """Write the package of every point of every frontier into ``request.out``; ``None`` if there is none."""
    from mctune.emit import emit_package
    from mctune.runtime.errors import KernelError
    from mctune.study.run import ship

    with held():  # a package is written whole
        winners = ship(request, report, say)
        if not winners:
            return None
        try:
            return emit_package(request.out, request.target, winners)
        except KernelError as error:
            raise MctuneError(str(error)) from error
