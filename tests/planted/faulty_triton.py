"""A Triton backend whose rendered read fails in the way that ``config["fault"]`` says."""

from __future__ import annotations

from pathlib import Path

from mctune.backends.protocol import Built
from mctune.backends.triton.backend import TritonBackend
from mctune.core.config import Config
from mctune.core.problem import Problem
from mctune.core.target import Target

_FAULTS = {
    "none": "",
    "raises": 'raise ValueError("planted: the template\\nrefuses this")',
    "hangs": "import time\ntime.sleep(600)",
    "aborts": "import os\nos.abort()",
    "wrong": "right = read_forward\n\n\ndef read_forward(**arguments):\n    return 1.01 * right(**arguments)",
    "unwritten": "import torch\n\nright = read_forward\n\n\ndef read_forward(**arguments):\n    return torch.empty_like(right(**arguments))",
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
            built.source.write_text(f"{text}\n\n{_FAULTS[fault]}\n")
        return built
