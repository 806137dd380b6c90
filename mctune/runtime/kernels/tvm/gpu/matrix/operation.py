"""What the operations of a configuration have in common: its kernels, and what it was tuned for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .....traits import AGGREGATIONS, RECURRENCES
from ....results import padded
from ..functions import Function, Grid

Tensor = torch.Tensor


class Operation:
    """An operation of one configuration.

    Args:
        functions: its kernels by name.
        problem, config: of the entry in the tuned table.
    """

    def __init__(
        self, functions: Mapping[str, Function], problem: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        self.functions, self.config = functions, config
        self.gated = RECURRENCES[problem["recurrence"]].gated
        self.routed = AGGREGATIONS[problem["aggregation"]].routed
        self.DK, self.SK, self.SV = problem["Dk"], padded(problem["Dk"]), padded(problem["Dv"])

    def launch(self, kernel: str, grid: Grid, like: Tensor, **values: Any) -> None:
        """Launch a kernel; ``like``, which it only reads, stands for arrays that it does not touch: ``None``."""
        for name, value in values.items():
            if value is None:
                values[name] = like
        self.functions[f"{kernel}_kernel"](grid, values)

    def of_swla(self, decays: Any, *names: str) -> dict[str, Any]:
        """The decays that a kernel takes, none for linear."""
        return {name: getattr(decays, name) for name in names} if self.gated else {}
