"""The rendered forward kernels, interpreted, against the oracle: odd sizes of every segmentation, poisoned memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from holding import DTYPES, TARGET, drawn, hold

from mctune.verify.spread import Drawn, draw_formulations


@pytest.mark.parametrize("one", drawn("forward"), ids=str)
def test_agrees_with_the_oracle(one: Drawn, tmp_path: Path) -> None:
    hold(one, tmp_path)


@pytest.mark.parametrize("one", draw_formulations("forward", TARGET, DTYPES[::-1]), ids=str)
def test_formulations_agree_with_the_oracle(one: Drawn, tmp_path: Path) -> None:
    hold(one, tmp_path)
