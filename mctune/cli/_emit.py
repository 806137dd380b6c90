"""From a search report to a package: what `mctune search` ends with and `mctune emit` does again."""

from __future__ import annotations

from pathlib import Path

from mctune.core.errors import MctuneError
from mctune.search.events import SearchReport, SearchRequest


def emit_report(request: SearchRequest, report: SearchReport) -> Path | None:
    """Write the package of every point of every frontier into ``request.out``; ``None`` if there is none."""
    from mctune.emit import Winner, emit_package
    from mctune.runtime.tvm_loader import KernelError
    from mctune.search.run import ship

    shipments = ship(request, report)
    if not shipments:
        return None
    winners = [
        Winner(
            problem=item.point.problem,
            config=item.point.config,
            outcome=item.point.outcome,
            backend=item.backend,
            library=item.library,
            source=item.source,
            portable=item.portable,
            cpu_flags=item.cpu_flags,
            recommended=item.recommended,
            verified=item.verified,
        )
        for item in shipments
    ]
    try:
        return emit_package(request.out, request.target, winners)
    except KernelError as error:
        raise MctuneError(str(error)) from error
