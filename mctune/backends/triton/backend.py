"""One configuration of Triton templates, from rendering it to calling it."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path

from mctune.backends.kept import scratch_in, write_whole
from mctune.backends.protocol import Built, Kernel, Launch, OperationError, Watch, unwatched
from mctune.backends.registry import computes, refuse
from mctune.backends.spaces import load_space
from mctune.backends.triton.calls import call_on_meta
from mctune.backends.triton.device import DoesNotFit, VirtualDevice
from mctune.backends.triton.interpreter import quicken
from mctune.backends.triton.templates import digest, operations, write_parts
from mctune.backends.triton.versions import check_interpreter, check_versions
from mctune.backends.triton.watched import watched
from mctune.core.config import Config
from mctune.core.environment import version
from mctune.core.errors import MctuneError
from mctune.core.outcome import TooLarge
from mctune.core.problem import Problem
from mctune.core.space import SearchSpace
from mctune.core.target import Target
from mctune.runtime.kernels.support import Support
from mctune.runtime.kernels.triton.deep.backward import TritonDeepBackward
from mctune.runtime.kernels.triton.deep.decode import TritonDeepDecode
from mctune.runtime.kernels.triton.deep.forward import TritonDeepForward
from mctune.runtime.kernels.triton.loader import load_parts
from mctune.runtime.kernels.triton.matrix.backward import TritonBackward
from mctune.runtime.kernels.triton.matrix.decode import TritonDecode
from mctune.runtime.kernels.triton.matrix.forward import TritonForward

LAUNCHERS = {
    ("matrix", "forward"): TritonForward,
    ("matrix", "backward"): TritonBackward,
    ("matrix", "decode"): TritonDecode,
    ("deep", "forward"): TritonDeepForward,
    ("deep", "backward"): TritonDeepBackward,
    ("deep", "decode"): TritonDeepDecode,
}
"""By family and pass."""
WIDEST = 256
"""A program holds a row of q whole."""
LONGEST_CHUNK = 128
"""Tokens of an inner chunk: a program holds the product of its rows with each other."""


class TritonBackend:
    """Templates of ``templates/triton`` for a GPU."""

    name = maker = "triton"
    measured = False

    def space(self, problem: Problem) -> SearchSpace:
        """The parameters that the templates of ``problem`` take."""
        refuse(self.supports(problem))
        return load_space("triton", problem.writes.family, problem.pass_, self.measured)

    def measuring(self) -> TritonBackend:
        """The same with spaces that also have what Triton's interpreter cannot verify."""
        backend = type(self)()
        backend.measured = True
        return backend

    def supports(self, problem: Problem, target: Target | None = None) -> Support:
        """Whether a Triton template computes a problem."""
        answer = computes("triton", problem)
        for name, width in (("Dk", problem.Dk), ("Dv", problem.Dv)):
            if answer and width > WIDEST:
                answer = Support.no(f"{name}={width}: Triton's templates take at most {WIDEST}; take more heads")
        if answer and problem.deep and (problem.inner_chunk or 1) > LONGEST_CHUNK:
            reason = f"inner_chunk={problem.inner_chunk}: Triton's templates take at most {LONGEST_CHUNK}"
            answer = Support.no(f"{reason}; take a shorter inner_chunk, or the eager path")
        return answer

    def ready(self, here: bool = True) -> None:
        """Refuse a missing or unknown Triton, and for an absent GPU one whose interpreter does not run.

        Raises:
            DeviceError: with what to install.
        """
        check_versions()
        if not here:
            check_interpreter()

    def try_out(self, target: Target, folder: Path) -> None:
        """Compile a kernel that adds 1, or, in a process that interprets, run it.

        Raises:
            Exception: what then fails for every candidate.
        """
        trial = importlib.import_module(f"{__package__}.trial")  # it imports Triton
        with scratch_in(folder, "trial") as cache:
            trial.try_out(target, Path(cache))

    def identity(self) -> dict[str, str]:
        """The Triton and the templates that results depend on."""
        return {"name": self.name, "triton": version("triton") or "", "templates": digest()[:16]}

    def build(self, problem: Problem, config: Config, target: Target, folder: Path) -> Built:
        """Render ``config`` into ``folder``: a module an operation, and an index of them. Triton compiles at a launch.

        Raises:
            ValueError: if the configuration breaks a constraint of the space; it could compile and be wrong.
        """
        config = self.measuring().space(problem).checked(config, problem, target)
        parts = write_parts(problem, config, folder)
        index = json.dumps({"problem": problem.to_dict(), "config": config.to_dict(), "parts": dict(parts)}, indent=1)
        name = f"{problem.pass_}_{problem.recurrence}_{problem.aggregation}_{problem.state_init}"
        library = folder / f"{name}_{hashlib.sha256(index.encode()).hexdigest()[:12]}.json"
        write_whole(library, f"{index}\n")
        return Built(library, folder / dict(parts)[operations(problem, config)[-1]], parts)

    def compile(self, problem: Problem, config: Config, built: Built, target: Target) -> tuple[Launch, ...] | TooLarge:
        """What one call launches on the GPU, present or absent, or why the GPU cannot hold it.

        Raises:
            OperationError: with whatever Triton raises on a kernel that does not compile.
        """
        device = VirtualDevice(target)
        try:
            with device:
                call_on_meta(problem, self.load(problem, config, built, device.watch))
        except DoesNotFit as error:
            return TooLarge(str(error), error.need, error.limit, error.unit, device.operation)
        except (MctuneError, OSError):
            raise
        except Exception as error:
            raise OperationError(device.operation) from error
        return tuple(device.launches)

    def load(self, problem: Problem, config: Config, built: Built, watch: Watch = unwatched) -> Kernel:
        """The rendered candidate, through the same launcher that an emitted package uses."""
        quicken()
        record = built.record(problem, config)
        parts = None if watch is unwatched else watched(load_parts(built.library.parent, record["parts"]), watch)
        return LAUNCHERS[problem.writes.family, problem.pass_](built.library, record, parts)
