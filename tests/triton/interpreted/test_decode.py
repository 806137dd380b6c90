"""The rendered decode step, interpreted, against the oracle: y, and the memory that it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from holding import drawn, hold

from mctune.search.spread import Drawn


@pytest.mark.parametrize("one", drawn("decode"), ids=str)
def test_agrees_with_the_oracle(one: Drawn, tmp_path: Path) -> None:
    hold(one, tmp_path)
