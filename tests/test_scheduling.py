"""Who runs which test: what is interpreted apart, groups whole, half of a file for who is free, alone what must be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.scheduling import Scheduler

FILES = [f"tests/{file}.py::test_{number}" for file in "ab" for number in range(6)]
GROUPED = [f"tests/c.py::test_{number}" for number in range(3)]
ALONE = ["tests/a.py::test_clock", "tests/b.py::test_memory"]
APART = [f"tests/triton/interpreted/test_x.py::test_{number}" for number in range(3)]
GROUPS = dict.fromkeys(GROUPED, "g") | dict.fromkeys(ALONE, "alone")


class Node:
    """Stands in for a worker: it begins a test when it knows the next, or that there is none."""

    def __init__(self, name: str, tests: Sequence[str], folder: Path, interprets: bool = False) -> None:
        self.name, self.tests, self.queue, self.ended = name, tests, list[int](), False
        spec = SimpleNamespace(env={"TRITON_INTERPRET": "1"} if interprets else {})
        self.gateway, self.workerinput = SimpleNamespace(spec=spec), {"groups": str(folder / name)}
        Path(self.workerinput["groups"]).write_text(json.dumps({k: v for k, v in GROUPS.items() if k in tests}))

    def send_runtest_some(self, indices: Sequence[int]) -> None:
        self.queue += indices

    def shutdown(self) -> None:
        self.ended = True

    @property
    def running(self) -> str | None:
        return self.tests[self.queue[0]] if len(self.queue) > 1 or (self.queue and self.ended) else None


@pytest.fixture
def nodes(tmp_path: Path) -> list[Node]:
    native = [*FILES, *GROUPED, *ALONE]
    return [Node("0", native, tmp_path), Node("1", native, tmp_path), Node("2", APART, tmp_path, interprets=True)]


def scheduler(nodes: Sequence[Node]) -> Any:
    session = SimpleNamespace()
    config = SimpleNamespace(
        getoption=lambda name: nodes, pluginmanager=SimpleNamespace(getplugin=lambda name: session)
    )
    made: Any = Scheduler(config, None)  # type: ignore[arg-type]
    for node in nodes:
        made.add_node(node)
        made.add_node_collection(node, node.tests)
    assert made.collection_is_completed
    made.schedule()
    assert session.testscollected == len([*FILES, *GROUPED, *ALONE, *APART])
    return made


def finish(made: Any, nodes: Sequence[Node], slow: Node | None = None) -> list[tuple[str, tuple[str, ...]]]:
    """Every test in the order of their ends, with what ran beside it; ``slow`` ends one when nobody else can."""
    done = []
    while running := [node for node in nodes if node.running]:
        node = next((node for node in reversed(running) if node is not slow), running[0])
        test, beside = node.running, tuple(str(other.running) for other in running if other is not node)
        assert test is not None
        done.append((test, beside))
        made.mark_test_complete(node, node.queue.pop(0))
        if made.tests_finished:
            for each in nodes:
                each.shutdown()
    return done


@pytest.mark.parametrize("slow", (None, 0, 1, 2))
def test_everything_runs_once_by_as_many_as_were_asked_for(nodes: list[Node], slow: int | None) -> None:
    done = finish(scheduler(nodes), nodes, None if slow is None else nodes[slow])
    assert sorted(test for test, _ in done) == sorted([*FILES, *GROUPED, *ALONE, *APART])
    assert max(len(beside) for _, beside in done) == 1
    # What must be alone is last, beside nothing.
    assert [test for test, _ in done[-2:]] == ALONE and not any(beside for _, beside in done[-2:])


def test_groups_stay_together_and_files_are_halved(nodes: list[Node]) -> None:
    made = scheduler(nodes)
    owner: dict[str, str] = {}
    send = Node.send_runtest_some

    def noted(node: Node, indices: Sequence[int]) -> None:
        owner.update({node.tests[index]: node.name for index in indices})
        send(node, indices)

    owner.update({node.tests[index]: node.name for node in nodes for index in node.queue})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Node, "send_runtest_some", noted)
        finish(made, nodes, nodes[1])
    assert len({owner[test] for test in GROUPED}) == 1 and {owner[test] for test in APART} == {"2"}
    assert any({owner[test] for test in FILES if name in test} == {"0", "1"} for name in ("a.py", "b.py"))


def test_a_worker_that_dies_loses_one_test(nodes: list[Node], tmp_path: Path) -> None:
    made = scheduler(nodes)
    dying, *others = nodes
    crashed = dying.running
    assert made.remove_node(dying) == crashed
    after = Node("3", dying.tests, tmp_path)
    made.add_node(after)
    made.add_node_collection(after, after.tests)
    made.schedule()
    done = [test for test, _ in finish(made, [*others, after])]
    assert sorted([*done, str(crashed)]) == sorted([*FILES, *GROUPED, *ALONE, *APART])
    assert done[-2:] == ALONE
