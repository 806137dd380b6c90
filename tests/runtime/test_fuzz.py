"""Random arguments, and random operations of a cache, for some seconds each; the seed is new and printed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from mctune.runtime.kernels import dispatch
from tests.fuzz import arguments, cache, kernels
from tests.fuzz.driver import in_suite


@pytest.fixture
def tuned(kernel_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TABLE", kernels.table(kernel_folder))


def test_operations_of_a_cache() -> None:
    in_suite("cache", cache.case)


def test_arguments() -> None:
    in_suite("arguments", arguments.case)


def test_operations_of_a_cache_on_kernels(tuned: None) -> None:
    in_suite("cache", partial(cache.case, served=kernels.layer_served))


def test_arguments_on_kernels(tuned: None) -> None:
    in_suite("arguments", partial(arguments.case, served=kernels.call_served))
