"""CUDA kernels that run on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mctune.verify.cuda_cpu.folder import environment


@pytest.fixture(scope="session")
def cuda_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of kernels, in a process that the stand-in serves."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    before = dict(os.environ)
    os.environ.update(environment(folder))
    yield folder
    os.environ.clear()
    os.environ.update(before)
