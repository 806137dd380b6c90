"""A search as it looks on stderr: a moving bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

from mctune.core.config import Config
from mctune.core.outcome import Outcome, Predicted, cost, describe, kind
from mctune.core.workload import Case
from mctune.study.events import StudyReport

_SHOWN_PER_KIND = 3
_PLAIN_STEPS = 10


class SearchProgress:
    """The listener of ``mctune search``; a context manager that puts the terminal back in order.

    Both forms say the same: trials done, best so far, what failed and why (the first few of each kind), time left.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[best]}"), TextColumn("{task.fields[failed]}", style="yellow"),
                TimeElapsedColumn(), Remaining(), console=self._console, transient=True,
            )  # fmt: skip
        self._task: TaskID | None = None
        self._label, self._total, self._done, self._first = "", 0, 0, 0
        self._began = time.monotonic()
        self._best: float | None = None
        self._how = ""
        self._failed: Counter[str] = Counter()

    def __enter__(self) -> SearchProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def study_started(self, case: Case, total: int, done: int) -> None:
        """See :class:`mctune.study.events.Listener`; so are the next three."""
        self._label, self._total, self._done, self._first = str(case), total, done, done
        self._began, self._best, self._failed = time.monotonic(), None, Counter()
        self._how = ""
        self._print(f"searching {self._label}: {total} trials" + (f", {done} done before" if done else ""))
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task("trials", total=total, completed=done, best="", failed="")

    def trial_done(self, number: int, config: Config, outcome: Outcome, best_ms: float | None) -> None:
        self._done += 1
        if cost(outcome) is None:
            name = kind(outcome)
            self._failed[name] += 1
            if self._failed[name] <= _SHOWN_PER_KIND:
                self._print(f"  trial {number} {describe(outcome)}  [{config}]")
            if self._failed[name] == _SHOWN_PER_KIND:
                self._print(f"  further {name.replace('_', ' ')} trials are only counted")
        else:
            self._how = _how(outcome)
        improved = best_ms is not None and (self._best is None or best_ms < self._best)
        self._best = best_ms
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, best=self._best_text(), failed=self._failed_text())
        elif improved or self._at_step():
            failed = self._failed_text()
            parts = (f"{self._done}/{self._total}", self._best_text(), failed, self._left_text())
            self._print("  " + ", ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        self._print(f"  {text}")

    def study_done(self, report: StudyReport) -> None:
        outcomes = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.outcomes)
        best = report.recommended
        found = "best" if best and best.outcome.error is None else "recommended"  # until it is verified
        result = f"{found} {_how(best.outcome)}{best.outcome.ms:.3f} ms" if best else "no valid configuration"
        self._print(f"  done: {result}; {report.trials} trials: {outcomes or 'none'}")

    def _print(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a terminal that was closed is no reason to end
            self._console.print(escape(text), soft_wrap=True)

    def _best_text(self) -> str:
        return f"best {self._how}{self._best:.3f} ms" if self._best is not None else ""

    def _failed_text(self) -> str:
        return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self._failed.items())

    def _at_step(self) -> bool:
        step = max(1, self._total // _PLAIN_STEPS)
        return self._done % step == 0 or self._done == self._total

    def _left_text(self) -> str:
        here = self._done - self._first
        seconds = (time.monotonic() - self._began) / here * max(0, self._total - self._done)
        return f"about {seconds:.0f} s left"


def _how(outcome: Outcome) -> str:
    """A predicted time is never shown without this word."""
    return "predicted " if isinstance(outcome, Predicted) else ""
