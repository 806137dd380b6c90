"""What every test shares: hypothesis's profile, folders of what was compiled before, and who runs what beside what."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import compiled_before, scheduling

# Few examples, the same ones in each run, no stop-watch.
settings.register_profile("mctune", max_examples=10, deadline=None, derandomize=True, database=None)
settings.load_profile("mctune")

compiled_before.keep()

ROOT = Path(__file__).parents[1]
INTERPRETED = ROOT / scheduling.INTERPRETED


def pytest_configure(config: pytest.Config) -> None:
    if _parallel(config):
        if scheduling.interpreting():
            raise pytest.UsageError("with -n a worker of its own interprets: leave TRITON_INTERPRET unset")
        config.option.tx = scheduling.workers(config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["groups"] = scheduling.groups_file(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> scheduling.Scheduler:
    return scheduling.Scheduler(config, log)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Nothing but what is interpreted in the worker for it."""
    if not (_worker(config) and scheduling.interpreting()):
        return None
    related = collection_path in (INTERPRETED, *INTERPRETED.parents) or INTERPRETED in collection_path.parents
    return None if related else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each worker has what it can run, and tells which of it belongs together."""
    if not _worker(config):
        return
    items[:] = [one for one in items if (INTERPRETED in one.path.parents) == scheduling.interpreting()]
    groups = {item.nodeid: group for item in items if (group := scheduling.group_of(item))}
    if scheduling.interpreting() and scheduling.ALONE in groups.values():
        raise pytest.UsageError("what is interpreted cannot run alone")
    Path(config.workerinput["groups"]).write_text(json.dumps(groups), encoding="utf-8")


@pytest.fixture(scope="session")
def kernel_folder() -> Path:
    """Where TVM's kernels are compiled, unless a test is about that."""
    return compiled_before.kernels()


def _worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _parallel(config: pytest.Config) -> bool:
    """Whether this process hands the tests to others."""
    return not _worker(config) and bool(getattr(config.option, "tx", None)) and config.option.dist != "no"
