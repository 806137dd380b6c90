"""A whole search: a study for each problem, and what becomes of the winners."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mctune.backends import backend_for, get_backend
from mctune.backends.protocol import Backend
from mctune.core.errors import DeviceError, MctuneError
from mctune.core.host import needed_flags
from mctune.core.winner import Winner
from mctune.search.events import Listener, SearchReport, SearchRequest, StudyReport
from mctune.search.one import OneStudy
from mctune.search.presence import present
from mctune.search.verify import tolerance
from mctune.search.worker import WorkerDied
from mctune.search.workers import Workers

PORTABLE_ARCH = "x86-64-v3"
"""What a shipped kernel is built for besides the CPU that it was tuned on."""
_SHIP_LIMIT_S = 300.0


def search(request: SearchRequest, listener: Listener) -> SearchReport:
    """Run every study of ``request``, or go on with them; the default storage is ``<out>/search/study.db``.

    Raises:
        DeviceError: if there is no such device here, or what compiles for it is missing.
        UsageError: for a problem that no template computes, or a storage that cannot be opened.
    """
    started = time.monotonic()
    prepared = _studies(request)
    reports: list[StudyReport] = []
    interrupted = False
    # What the last study took beyond its share, to decide between its best: the next one will too.
    deciding = 0.0
    with Workers(request) as workers:
        for number, study in enumerate(prepared):
            begun, share = time.monotonic(), None
            if request.timeout_s is not None:
                left = request.timeout_s - (begun - started)
                share = max(1.0, left / (len(prepared) - number) - deciding)
            report, interrupted = study.run(workers, listener, share)
            if share is not None:
                deciding = max(0.0, time.monotonic() - begun - share)
            reports.append(report)
            listener.study_done(report)
            if interrupted:
                break
    return SearchReport(request.target, request.out, tuple(reports), time.monotonic() - started, interrupted)


def stored(request: SearchRequest) -> SearchReport:
    """What the studies of ``request`` hold, as far as they went; nothing is evaluated.

    Raises:
        UsageError: if one of them was never begun.
    """
    return SearchReport(request.target, request.out, tuple(study.stored() for study in _studies(request)), 0.0)


def ship(request: SearchRequest, report: SearchReport) -> list[Winner]:
    """Every point of every frontier, built and verified once more; for a CPU also for any x86-64-v3.

    Raises:
        MctuneError: if a build or its verification fails.
    """
    backend = backend_for(request.target)
    winners = []
    with Workers(request) as workers:
        for study in report.studies:
            for point in study.frontier:
                candidate = {"problem": point.problem.to_dict(), "config": point.config.to_dict()}
                reply = workers.ship(candidate, PORTABLE_ARCH if request.target.on_cpu else None, _SHIP_LIMIT_S)
                if not isinstance(reply, dict):
                    what = reply.message if isinstance(reply, WorkerDied) else f"no answer in {reply.seconds:g} s"
                    raise MctuneError(f"cannot ship {point.problem} [{point.config}]: {what}")
                winners.append(
                    Winner(
                        problem=point.problem,
                        config=point.config,
                        outcome=point.outcome,
                        recommended=point == study.recommended,
                        backend=backend,
                        library=Path(reply["library"]),
                        source=Path(reply["source"]),
                        portable=Path(reply["portable"]) if reply["portable"] else None,
                        cpu_flags=needed_flags(request.target.arch) if request.target.on_cpu else (),
                        verified=_verified(reply, tolerance(point.problem)),
                        parts=tuple((name, Path(path)) for name, path in reply["parts"].items()),
                    )
                )
    return winners


def _verified(reply: dict[str, Any], tolerance: float) -> dict[str, Any]:
    error, *portable_error = reply["errors"]
    return {
        "against": "mctune.reference: token by token, float64",
        "inputs": "random, drawn for this check; memory that a kernel does not write holds NaN",
        "measure": "RMS(difference) / RMS(reference)",
        "by": reply["by"],
        "tolerance": tolerance,
        "error": error,
        "portable_error": portable_error[0] if portable_error else None,
        "cases": reply["cases"],
    }


def _studies(request: SearchRequest) -> list[OneStudy]:
    """The studies of a request, every problem checked before the first one starts."""
    if request.measure and not present(request.target):
        raise DeviceError(
            f"{request.target.name} ({request.target.title}) is not on this machine, so nothing can be measured on it; "
            "without --measure its kernels are compiled and their times predicted"
        )
    backend: Backend = get_backend(backend_for(request.target))
    for case in request.cases:
        backend.check(case.problem)
    backend.ready()
    folder = request.out / "search"
    folder.mkdir(parents=True, exist_ok=True)
    storage = request.storage or f"sqlite:///{(folder / 'study.db').resolve()}"
    return [OneStudy(request, backend, case, storage) for case in request.cases]
