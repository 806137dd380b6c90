"""A Triton backend whose rendered read fails in the way that ``config["fault"]`` says."""

from __future__ import annotations

from pathlib import Path

from mctune.backends.protocol import Built
from mctune.backends.triton.backend import TritonBackend
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import Target

_REPLACED = """
import torch

right = read_forward


def read_forward(**arguments):
    return {}
"""
_PLANTED = """
import torch

right = read_forward


@triton.jit
def planted_kernel(flag, far):
    {}


def read_forward(**arguments):
    y = right(**arguments)
    planted_kernel[(1,)](flag=torch.zeros(1, dtype=torch.int32, device=y.device), far=1 << 44)
    return y
"""
_FAULTS = {
    "none": "",
    "illegal": _PLANTED.format("tl.store(flag + far, 1)"),
    "endless": _PLANTED.format("while tl.load(flag, volatile=True) == 0:\n        tl.debug_barrier()"),
    "raises": 'raise ValueError("planted: the template\\nrefuses this")\n',
    "hangs": "import time\n\ntime.sleep(600)\n",
    "aborts": "import os\n\nos.abort()\n",
    "wrong": _REPLACED.format("1.01 * right(**arguments)"),
    "overwrites": _PLANTED.format("tl.store(flag, 1.0)").replace(
        "flag=torch.zeros(1, dtype=torch.int32, device=y.device)", 'flag=arguments["v"]'
    ),
    "unwritten": _REPLACED.format("torch.empty_like(right(**arguments))"),
}


class FaultyBackend(TritonBackend):
    """The Triton backend, with something added to the module of the read."""

    name = "triton"

    def build(self, problem: Problem, config: Config, target: Target, folder: Path) -> Built:
        fault = str(config["fault"])
        real = Config.of({name: value for name, value in config.items if name != "fault"})
        built = super().build(problem, real, target, folder / fault)
        text = built.source.read_text()
        if _FAULTS[fault] not in text:
            built.source.write_text(text + _FAULTS[fault])
        return built
