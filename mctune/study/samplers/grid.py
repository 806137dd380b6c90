"""The space from end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from mctune.study.feasible import Point, Stratum
from mctune.study.samplers.discrete import DiscreteSampler
from mctune.study.samplers.reading import Tried


class OrderedSampler(DiscreteSampler):
    """Every valid point in lexicographic order, without a default first.

    Optuna's ``GridSampler`` lists the whole product of the values first, which no memory holds for the spaces here.
    """

    def _propose(self, history: Sequence[Tried], salt: int = 0) -> tuple[Point | None, Mapping[str, Any]]:
        return self._points.next_in_order({tried.point for tried in history}), {}

    def choose(
        self,
        history: Sequence[Tried],
        seen: AbstractSet[Point],
        rng: np.random.Generator,
        stratum: Stratum | None,
        tried: int,
    ) -> tuple[Point | None, Mapping[str, Any]]:
        """The next point of the stratum."""
        return self._points.next_in_order(seen, stratum), {}
