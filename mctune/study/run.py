"""A whole search: a study for each problem, and what becomes of the winners."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mctune.backends import get_backend, makers
from mctune.backends.presence import present
from mctune.backends.protocol import Backend
from mctune.backends.registry import device_of, refuse
from mctune.core.errors import DeviceError, MctuneError, UsageError
from mctune.core.host import needed_flags
from mctune.core.interrupt import Held, held
from mctune.core.winner import Winner
from mctune.core.workload import Case
from mctune.study.events import FrontierPoint, Listener, SearchReport, SearchRequest, StudyReport
from mctune.study.frontier import recommend
from mctune.study.one import OneStudy
from mctune.study.prior import judged, predict_first
from mctune.study.samplers.named import check
from mctune.study.storage import alone, sqlite_url, url_of
from mctune.study.study import CutShort
from mctune.workers.pool import Workers
from mctune.workers.worker import WorkerDied

PORTABLE_ARCH = "x86-64-v3"
"""What a shipped kernel is built for besides the CPU that it was tuned on."""
_Result = TypeVar("_Result")
_Shipped = tuple[FrontierPoint, dict[str, Any]]
"""A point, and the worker's reply about it."""


def at_work(request: SearchRequest) -> Workers:
    """The processes that a request's kernels are compiled, timed and verified in, of :func:`search` and :func:`ship`.

    To be entered. Nothing is started or written before it is needed.
    """
    folder = request.out / "search" / "kernels"
    made_by = makers(request.target, request.backend)
    return Workers(request.target, folder, seed=request.seed, measure=request.measure, made_by=made_by)


def search(request: SearchRequest, listener: Listener, workers: Workers) -> SearchReport:
    """Run every study of ``request``, or go on with them; the default storage is ``<out>/search/study.db``.

    Each has an equal share of the time that is left; one that has no time of any candidate by the end of its share lets
    those under way finish, in at most half of what is left for the others. Where a share is too little to get anywhere,
    those that have the fewest candidates are searched, and of the others what earlier runs have left is reported.

    Where the machine or the storage fails on the way, what was found until then is reported, with the failure.

    Raises:
        DeviceError: if there is no such device here, or what compiles for it is missing.
        UsageError: for a problem that no template computes, a sampler that does not exist, or a storage that cannot be
            opened.
    """
    started = time.monotonic()
    check(request.sampler)
    prepared = _studies(request)
    reports: dict[int, StudyReport] = {}
    interrupted = False
    # How long the last study took beyond its share to decide between its finalists, for each segment length: the next
    # one will need as much.
    deciding = 0.0
    failure: MctuneError | None = None
    on_gpu = request.measure and not request.target.on_cpu
    with held() as ctrl_c, alone(_storage(request)):
        workers.start()
        turns = _turns(request, prepared, workers.least_s)
        for number, turn in enumerate(turns):
            study, begun, share, at_most = prepared[turn], time.monotonic(), None, None
            if request.timeout_s is not None:
                left = request.timeout_s - (begun - started)
                if left < min(workers.least_s, request.timeout_s / 2):
                    break
                needed = deciding * max(len(study.case.segment_lengths), 1)
                share = min(left, max(workers.least_s, left / (len(turns) - number) - needed))
                at_most = (share + left) / 2
            try:
                spent = predict_first(study, workers, listener, share) if on_gpu else 0.0
                rest = None if share is None else max(share - spent, 0.0)
                reports[turn], interrupted = study.run(workers, listener, rest, at_most)
                if on_gpu and (told := judged(study)):
                    listener.note(told)
            except CutShort as error:
                reports[turn], failure = study.report(error.trials), error
            if share is not None:
                deciding = max(0.0, time.monotonic() - begun - share) / max(len(study.case.segment_lengths), 1)
            listener.study_done(reports[turn])
            interrupted = interrupted or ctrl_c.taken()
            if interrupted or failure:
                break
        if not (request.measure or interrupted or failure) and request.decide:
            try:
                interrupted = _verified_side_by_side(prepared, reports, workers, listener, ctrl_c)
            except MctuneError as error:
                failure = error
    for turn in sorted(set(turns) - set(reports)) if failure is None else ():
        reports[turn] = prepared[turn].report(prepared[turn].so_far())
        listener.note(f"not reached: {prepared[turn].case}, {reports[turn].trials} trials of earlier runs")
    found = tuple(reports[turn] for turn in sorted(reports))
    return SearchReport(request.target, request.out, found, time.monotonic() - started, interrupted, failure)


def _verified_side_by_side(
    studies: Sequence[OneStudy],
    reports: dict[int, StudyReport],
    workers: Workers,
    listener: Listener,
    ctrl_c: Held,
) -> bool:
    """Decide between the predicted candidates of all studies, which are interpreted, slowly; whether Ctrl-C ended it.

    What was not verified by then is before it ships.

    Raises:
        MctuneError: if the machine fails.
    """
    waiting = [turn for turn, report in reports.items() if report.frontier]
    if waiting:
        listener.note(f"verifying the fastest of {len(waiting)} studies, side by side")
    jobs = {turn: partial(studies[turn].decided, workers, listener, studies[turn].so_far()) for turn in waiting}
    try:
        for number, (turn, report) in enumerate(_as_done(jobs, workers.count, ctrl_c), 1):
            reports[turn] = report
            listener.note(f"  {number}/{len(jobs)} verified")
    except KeyboardInterrupt:
        return True
    return False


def _as_done(jobs: Mapping[int, Callable[[], _Result]], at_once: int, ctrl_c: Held) -> Iterator[tuple[int, _Result]]:
    """The result of each job, ``at_once`` of them side by side, as they come; Ctrl-C comes while one is waited for."""
    pool = ThreadPoolExecutor(at_once)
    try:
        futures = {pool.submit(job): number for number, job in jobs.items()}
        done = as_completed(futures)
        for _ in futures:
            with ctrl_c.let_in():
                future = next(done)
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _turns(request: SearchRequest, studies: Sequence[OneStudy], least_s: float) -> list[int]:
    """Which study comes when: those with the fewest parameters first, whose candidates take least, so that what they
    leave of their shares is the others'; but those that got least so far first, if there is no time for all."""
    turns = sorted(range(len(studies)), key=lambda turn: len(studies[turn].space().params))
    if request.timeout_s is not None and request.timeout_s < len(studies) * least_s:
        turns = sorted(range(len(studies)), key=lambda turn: len(studies[turn].so_far()))
    return turns


def stored(request: SearchRequest) -> SearchReport:
    """What the studies of ``request`` have found so far; nothing is evaluated.

    Raises:
        UsageError: if one of them was never begun.
    """
    return SearchReport(request.target, request.out, tuple(study.stored() for study in _studies(request)), 0.0)


def ship(request: SearchRequest, report: SearchReport, note: Callable[[str], None], workers: Workers) -> list[Winner]:
    """Every point of every frontier, built and verified; on a CPU that can be x86-64-v3 also for all of them.

    What ``workers`` have held to everything before, when the study was decided, is not verified again.

    What is not right gives way to the next best at its segment length, or is left out, and ``note`` is told. The
    recommended points come first: Ctrl-C leaves out those that are not verified by then.

    Raises:
        MctuneError: if there are points, and none of them can ship.
    """
    points = [(study, point) for study in report.studies for point in study.frontier]
    runs_here = set(needed_flags(PORTABLE_ARCH)) <= set(needed_flags(request.target.arch))
    portable_arch = PORTABLE_ARCH if runs_here else None
    shipped: dict[int, _Shipped] = {}
    failures: list[str] = []
    left = 0 if request.measure else sum(not workers.holds(_candidate(study, point)) for study, point in points)
    if left:  # they are interpreted, which takes minutes
        note(f"verifying {left} kernels; Ctrl-C ships those that are done")
    with held() as ctrl_c:
        workers.prepare()
        order = sorted(range(len(points)), key=lambda index: points[index][1] != points[index][0].recommended)
        jobs = {index: partial(_ship_one, workers, portable_arch, request.holding_s, *points[index]) for index in order}
        try:
            for index, (found, why) in _as_done(jobs, workers.count, ctrl_c):
                failures += why
                for text in why:
                    note(text)
                if found is not None:
                    shipped[index] = found
                    if left:
                        note(f"  {len(shipped)}/{len(points)} verified")
        except KeyboardInterrupt:
            if not shipped:
                raise
            note(f"interrupted: {len(shipped)} of {len(points)} kernels were verified and ship")
    if points and not shipped:
        raise MctuneError(failures[0])
    winners = []
    for study in report.studies:
        kept = [shipped[index] for index, (of, _) in enumerate(points) if of is study and index in shipped]
        winners += _winners(request, study.maker, kept)
    return winners


def _ship_one(
    workers: Workers, portable_arch: str | None, limit_s: float, study: StudyReport, point: FrontierPoint
) -> tuple[_Shipped | None, list[str]]:
    """The point, or what stands in for it, with what its worker says; and what failed before it."""
    failures: list[str] = []
    for choice in (point, *(spare for spare in study.spare if spare.problem == point.problem)):
        candidate = _candidate(study, choice)
        reply = workers.ship(candidate, portable_arch, limit_s)
        if isinstance(reply, WorkerDied) and reply.fault:
            reply = workers.ship(candidate, portable_arch, limit_s, again=True)
        if isinstance(reply, dict):
            return (choice, reply), failures
        what = reply.message if isinstance(reply, WorkerDied) else f"no answer in {reply.seconds:g} s"
        failures.append(f"cannot ship {choice.problem} [{choice.config}]: {what}")
    return None, failures


def _candidate(study: StudyReport, point: FrontierPoint) -> dict[str, Any]:
    """What workers take for a point."""
    return {"problem": point.problem.to_dict(), "config": point.config.to_dict(), "maker": study.maker}


def _winners(request: SearchRequest, maker: str, shipped: Sequence[_Shipped]) -> list[Winner]:
    """The winners of one study, the one to be recommended among them marked."""
    if not shipped:
        return []
    best = recommend([point for point, _ in shipped], request.max_slowdown)
    return [
        Winner(
            problem=point.problem,
            config=point.config,
            outcome=point.outcome,
            recommended=point == best,
            backend=get_backend(maker).name,
            device=device_of(request.target),
            library=Path(reply["library"]),
            source=Path(reply["source"]),
            portable=Path(reply["portable"]) if reply["portable"] else None,
            cpu_flags=needed_flags(request.target.arch) if request.target.on_cpu else (),
            verified=_verified(reply),
            parts=tuple((name, Path(path)) for name, path in reply["parts"].items()),
        )
        for point, reply in shipped
    ]


def _verified(reply: dict[str, Any]) -> dict[str, Any]:
    error, *portable_error = reply["errors"]
    return {
        "against": "mctune.reference: token by token, float64",
        "inputs": "random, drawn for this check; memory that a kernel does not write holds NaN",
        "measure": "RMS(difference) / RMS(reference)",
        "by": reply["by"],
        "tolerance": reply["tolerance"],
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
    backends: list[Backend] = [get_backend(maker) for maker in makers(request.target, request.backend)]
    if request.measure:
        backends = [backend.measuring() for backend in backends]
    pairs: list[tuple[Backend, Case]] = []
    for case in request.cases:
        answers = [(backend, backend.supports(case.problem, request.target)) for backend in backends]
        pairs += [(backend, case) for backend, answer in answers if answer]
        if not any(answer for _, answer in answers):
            refuse(answers[0][1])
    for backend in backends:
        backend.ready(here=request.measure)
    try:
        (request.out / "search").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"nothing can be written to {request.out}: {error.strerror}; give another --out") from error
    return [OneStudy(request, backend, case, _storage(request)) for backend, case in pairs]


def _storage(request: SearchRequest) -> str:
    """The URL of a request's studies."""
    return url_of(request.storage) if request.storage else sqlite_url(request.out.resolve() / "search" / "study.db")
