"""A package with kernels of both backends for one device: a backend asked for by name is the one that runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from holding import TARGET

from mctune.backends import get_backend
from mctune.core.problem import PASSES, Problem
from mctune.core.target import resolve
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.api.step import memory_caching_step
from mctune.runtime.kernels import dispatch
from mctune.runtime.kernels.table import Entry, Table
from mctune.runtime.memory import Rules
from mctune.verify.inputs import make_inputs
from mctune.verify.passes import memory_of

PROBLEM = Problem(T=20, H=1, Dk=8, Dv=8, segment_length=4)
MACHINES = {"tvm": resolve("cpu")[0], "triton": TARGET}
"""Under Triton's interpreter both run on the CPU."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Entry]]:
    """The defaults of every pass, by backend."""
    folder, found = tmp_path_factory.mktemp("kernels"), {}
    for name, target in MACHINES.items():
        backend, found[name] = get_backend(name), []
        for problem in (PROBLEM.replace(pass_=pass_) for pass_ in PASSES):
            space = backend.space(problem)
            config = space.first_valid(lambda c, s=space, p=problem, t=target: s.valid(c, p, t))
            assert config is not None
            built = backend.build(problem, config, target, folder)
            record = built.record(problem, config)
            found[name].append(Entry(problem.to_dict(), name, built.library, record))
    return found


@pytest.fixture(params=("tvm first", "triton first"))
def launched(
    request: pytest.FixtureRequest, both: dict[str, list[Entry]], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, str]]:
    """(backend, pass) of every kernel that is launched, whichever stands first in the table."""
    first, second = ("tvm", "triton") if request.param == "tvm first" else ("triton", "tvm")
    seen: list[tuple[str, str]] = []
    real = dispatch.launcher

    def launcher(entry: Entry) -> Any:
        launch = real(entry)

        class Noted:
            device, dtype = launch.device, launch.dtype

            def __call__(self, *args: Any, **options: Any) -> Any:
                seen.append((entry.backend, entry.pass_))
                return launch(*args, **options)

        return Noted()

    monkeypatch.setattr(dispatch, "TABLE", Table((*both[first], *both[second])))
    monkeypatch.setattr(dispatch, "launcher", launcher)
    return seen


@pytest.mark.parametrize("backend", MACHINES)
@pytest.mark.parametrize("how", ("eager", "compiled"))
def test_forward_and_backward_are_of_the_backend_asked_for(
    backend: str, how: str, launched: list[tuple[str, str]]
) -> None:
    arguments = make_inputs(PROBLEM, 0).arguments(PROBLEM)
    leaves = {name: x.requires_grad_() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    torch._dynamo.reset()
    operation = memory_caching if how == "eager" else torch.compile(memory_caching, backend="aot_eager", fullgraph=True)
    operation(**arguments, backend=backend).sum().backward()
    assert launched == [(backend, "forward"), (backend, "backward")]
    wanted = torch.autograd.grad(memory_caching(**arguments, backend="eager").sum(), list(leaves.values()))
    for x, dx in zip(leaves.values(), wanted, strict=True):
        torch.testing.assert_close(x.grad, dx, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("backend", MACHINES)
def test_decode_is_of_the_backend_asked_for(backend: str, launched: list[tuple[str, str]]) -> None:
    inputs = make_inputs(PROBLEM, 0)
    y = {}
    for name in (backend, "eager"):
        memory = memory_of(PROBLEM, inputs, 9)
        memory.rules = Rules("linear", "independent", 4, 16, True)
        memory.states[0].nan_to_num_()
        memory.descriptors.nan_to_num_()
        q, k, v, u = (x[:, 9:10] for x in (inputs.q, inputs.k, inputs.v, inputs.u))
        y[name] = memory_caching_step(q, k, v, u, memory=memory, segment_length=4, backend=name)
    assert launched == [(backend, "decode")]
    torch.testing.assert_close(y[backend], y["eager"], atol=1e-5, rtol=1e-4)
