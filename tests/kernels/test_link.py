"""The machine's linker: what happens to it from outside is tried once more, what it says itself is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mctune.backends.tvm.link import try_linking
from mctune.core.errors import DeviceError


def test_a_linker_that_was_killed_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linker, runs = tmp_path / "cc", tmp_path / "runs"
    monkeypatch.setenv("CXX", str(linker))
    for deaths in (1, 2):
        runs.write_text("")
        ends = f"echo run >> {runs}; test $(wc -l < {runs}) -gt {deaths} || kill -9 $$"
        linker.write_text(f'#!/bin/sh\n{ends}\nexec g++ "$@"\n')
        linker.chmod(0o755)
        if deaths == 1:
            try_linking(tmp_path)
        else:
            with pytest.raises(DeviceError, match="exit status -9"):
                try_linking(tmp_path)
        assert runs.read_text().count("run") == 2
