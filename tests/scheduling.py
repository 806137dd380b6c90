"""Which worker runs which test, when `pytest -n` runs them in parallel.

Triton chooses its interpreter when it is imported, so one more worker than was asked for has ``TRITON_INTERPRET=1`` and
runs what is interpreted; until it has finished, one of the others waits. A worker takes a file, or an ``xdist_group``
across files, and keeps it while there is other work; at the end the free ones take half of a file that has not been
run yet. What is marked ``alone`` comes last, on one worker, when nothing else runs.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest
    from xdist.workermanage import WorkerController

INTERPRETED = "tests/triton/interpreted"
ALONE = "alone"
_AHEAD = 2
"""Tests that a worker knows: it begins one when it knows which comes next, and tears down what that does not need."""


def interpreting() -> bool:
    """Whether this process interprets Triton's kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def workers(config: pytest.Config) -> list[str]:
    """Execnet's names for the workers of this run: each has one thread, and the last one interprets."""
    threads = "//".join(f"env:{name}=1" for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"))
    return [f"popen//{threads}"] * len(config.getoption("tx")) + [f"popen//{threads}//env:TRITON_INTERPRET=1"]


def groups_file(node: WorkerController) -> str:
    """Where a worker leaves the groups of the tests that it collects; xdist tells names alone."""
    folder = Path(__file__).parents[1] / "build" / "test-groups"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{node.workerinput['testrunuid']}-{node.gateway.id}.json")


def group_of(item: pytest.Item) -> str | None:
    """What a test must run with, on one worker; that nothing may run beside it is a group too."""
    if item.get_closest_marker(ALONE):
        return ALONE
    mark = item.get_closest_marker("xdist_group")
    return None if mark is None else str((*mark.args, *mark.kwargs.values())[0])


@dataclass
class Unit:
    """Tests that one worker should run one after the other; a group must not be split."""

    name: str
    tests: deque[str] = field(default_factory=deque)

    @property
    def whole(self) -> bool:
        return self.name.startswith("@")


@dataclass
class Worker:
    """A worker process: what it has collected, what it was sent and has not finished, what it will be sent."""

    node: WorkerController
    interprets: bool
    index: dict[str, int] | None = None
    sent: list[str] = field(default_factory=list)
    unit: Unit = field(default_factory=lambda: Unit(""))
    leaving: bool = False

    def send(self, tests: Sequence[str]) -> None:
        assert self.index is not None
        self.sent += tests
        self.node.send_runtest_some([self.index[test] for test in tests])

    def leave(self) -> None:
        """It finishes what it was sent."""
        if not self.leaving:
            self.leaving = True
            self.node.shutdown()


class Scheduler:
    """What pytest-xdist asks for: ``xdist.scheduler.protocol.Scheduling``."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        self.config, self.expected = config, len(config.getoption("tx"))
        self.members: dict[WorkerController, Worker] = {}
        self.queues: dict[bool, deque[Unit]] = {}
        """Units that no worker has, by whether they are interpreted."""
        self.groups: dict[str, str] = {}
        self.alone: deque[str] = deque()
        self.begun = False

    # --- what pytest-xdist tells

    @property
    def nodes(self) -> list[WorkerController]:
        return list(self.members)

    @property
    def collection_is_completed(self) -> bool:
        return self.begun or (
            len(self.members) >= self.expected and all(one.index is not None for one in self.members.values())
        )

    @property
    def has_pending(self) -> bool:
        return bool(self.alone) or any(self.queues.values()) or any(one.unit.tests for one in self.members.values())

    @property
    def tests_finished(self) -> bool:
        """Whether every worker may be told that nothing comes any more: it then begins the last that it knows."""
        busy = [one for one in self.members.values() if one.sent]
        held = len(busy) > 1 and any(self._alone(test) for one in busy for test in one.sent)
        return self.begun and not self.has_pending and not held

    def add_node(self, node: WorkerController) -> None:
        environment = node.gateway.spec.env or {}
        self.members[node] = Worker(node, environment.get("TRITON_INTERPRET") == "1")

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        groups = Path(node.workerinput["groups"])
        self.groups |= json.loads(groups.read_text(encoding="utf-8"))
        groups.unlink()
        self.members[node].index = {test: number for number, test in enumerate(collection)}

    def mark_test_complete(self, node: WorkerController, item_index: int, duration: float = 0) -> None:
        worker = self.members[node]
        assert worker.index is not None
        worker.sent.remove(next(test for test in worker.sent if worker.index[test] == item_index))
        self.schedule()

    def mark_test_pending(self, item: str) -> None:
        """Part of xdist's interface, which asks for it to run a crashed test again: here none is."""
        raise NotImplementedError

    def remove_pending_tests_from_node(self, node: WorkerController, indices: Sequence[int]) -> None:
        """Part of xdist's interface: a worker's answer when tests are stolen from it, and this scheduler takes only
        what was not sent yet."""
        raise NotImplementedError

    def remove_node(self, node: WorkerController) -> str | None:
        """The test that it died of, if it died; the others that it had go to its successor."""
        worker = self.members.pop(node)
        crashed, *rest = worker.sent or [None]
        kept = [test for test in rest if test is not None]
        self.alone.extendleft(test for test in reversed(kept) if self._alone(test))
        worker.unit.tests.extendleft(test for test in reversed(kept) if not self._alone(test))
        if worker.unit.tests:
            self.queues[worker.interprets].appendleft(worker.unit)
        if self.begun:
            self.schedule()
        return crashed

    # --- who gets what

    def _alone(self, test: str) -> bool:
        return self.groups.get(test) == ALONE

    def _unit(self, test: str) -> str:
        """The group of a test, or its file."""
        return f"@{self.groups[test]}" if test in self.groups else test.partition("::")[0]

    def schedule(self) -> None:
        """Every worker that can go on gets what it needs for that."""
        if not self.begun:
            self._begin()
        for worker in self._ready():
            while len(worker.sent) < _AHEAD and (worker.unit.tests or self._take(worker)):
                worker.send([worker.unit.tests.popleft()])
        self._finish()

    def _begin(self) -> None:
        self.begun, total = True, 0
        for interprets in (False, True):
            units: dict[str, Unit] = {}
            collected = next((one.index for one in self.members.values() if one.interprets == interprets), None)
            for test in collected or ():
                name = self._unit(test)
                if self._alone(test):
                    self.alone.append(test)
                else:
                    units.setdefault(name, Unit(name)).tests.append(test)
            total += len(collected or ())
            # What cannot be split must not come last.
            self.queues[interprets] = deque(sorted(units.values(), key=lambda unit: not unit.whole))
        # xdist takes what one worker has collected for all there is, and says how far it is by that.
        self.config.pluginmanager.getplugin("session").testscollected = total

    def _ready(self) -> list[Worker]:
        """Those that may be sent something: as many as were asked for, with the one that interprets."""
        some = [one for one in self.members.values() if one.index is not None and not one.leaving]
        interprets = [one for one in self.members.values() if one.interprets and self._busy(one)]
        others = [one for one in some if not one.interprets]
        return [one for one in interprets if one in some] + others[: self.expected - 1 - len(interprets)]

    def _busy(self, worker: Worker) -> bool:
        return bool(worker.sent or worker.unit.tests or (self.queues[worker.interprets] and not worker.leaving))

    def _take(self, worker: Worker) -> bool:
        """Whether there was a unit for it, or half of another's."""
        queue = self.queues[worker.interprets]
        if queue:
            worker.unit = queue.popleft()
            return True
        peers = [one for one in self.members.values() if one.interprets == worker.interprets]
        others = [one.unit for one in peers if not one.unit.whole]
        most = max(others, key=lambda unit: len(unit.tests), default=worker.unit)
        if len(most.tests) < 2:
            return False
        half = [most.tests.pop() for _ in range(len(most.tests) // 2)]
        worker.unit = Unit(most.name, deque(reversed(half)))
        return True

    def _finish(self) -> None:
        """Workers with nothing to come leave; the last one takes what must be alone when the others are done."""
        idle = [one for one in self.members.values() if one.index is not None and not one.leaving]
        idle = [one for one in idle if not one.unit.tests and not self.queues[one.interprets]]
        stays = next((one for one in idle if not one.interprets), None)
        for worker in idle:
            if worker.interprets or (worker is not stays and not self.has_unsent):
                worker.leave()
        if stays is None or self.has_unsent or not self.alone:
            return
        if not any(self._alone(test) for test in stays.sent):
            # It waits with this one, until it knows of another, but goes on with what it had before.
            stays.send([self.alone.popleft()])
        if not any(one.sent for one in self.members.values() if one is not stays):
            stays.send([*self.alone])
            self.alone.clear()

    @property
    def has_unsent(self) -> bool:
        """Whether anything that may run beside something else has not been sent to a worker."""
        return any(self.queues.values()) or any(one.unit.tests for one in self.members.values())
