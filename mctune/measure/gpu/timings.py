"""How `mctune bench` checks and times the contenders of a shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from mctune.core.errors import MctuneError
from mctune.core.outcome import Timed
from mctune.core.remark import say
from mctune.measure.clocks import clock_and_heat
from mctune.measure.gpu.contenders import Contender, eager
from mctune.measure.gpu.goals import Rates, Timing
from mctune.measure.gpu.record import ALL, Trying
from mctune.measure.gpu.shapes import Call, Data, Results, Shape
from mctune.measure.timing import host_ms, summary, time_rotated
from mctune.reference import error_ratio
from mctune.runtime.kernels.triton.tables import DEVICE
from mctune.verify.judge import tolerance

CHECKED = 2048
"""Tokens of the first sequence that results are held to float32 on."""
UNDECIDED = 1e-3
"""Share of ssc's tokens that may differ: where two logits are closer than rounding, the other segment is right too."""


class Lost(Exception):
    """The contender ``name`` has left this process unusable."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name, self.why = name, why


def measured(shape: Shape, chosen: Sequence[Contender], rounds: int, trying: Trying) -> list[Timing]:
    """Check and time every contender that runs here; what does not is left out, with a note.

    Raises:
        Lost: by a fault after which another process must go on.
    """
    data, calls, about = Data.of(shape), dict[Contender, Call](), dict[Contender, tuple[float, dict[str, Any]]]()
    # Several contenders share one reference.
    wanted = cache(lambda aggregation: reference(shape, data, aggregation))
    for contender in chosen:
        trying.begin(shape, contender.name)
        try:
            call = contender.make(shape, data)
            off = checked(contender, shape, data, call(), wanted)
            about[contender] = off, contender.config(shape).to_dict() if contender.config else {}
        except Exception as error:
            _left_out(contender, error)
            continue
        calls[contender] = call
    trying.begin(shape, ALL)
    times = _timed(calls, rounds)
    state = clock_and_heat(DEVICE)
    found = []
    for contender, samples in times.items():
        off, config = about[contender]
        timed = Timed(*summary(samples), len(samples), off, *state)
        found.append(Timing(contender.name, contender.computes, timed, host_ms(calls[contender]), config))
    trying.end()
    return found


def _timed(calls: Mapping[Contender, Call], rounds: int) -> dict[Contender, list[float]]:
    """Milliseconds of each; without those that run alone and not beside the others, for lack of memory for example."""
    left = dict(calls)
    while left:
        running: list[Contender] = []

        def named(contender: Contender, running: list[Contender] = running) -> Call:
            def call() -> Results:
                running[:] = [contender]
                return left[contender]()

            return call

        try:
            samples = time_rotated([named(one) for one in left], rounds=rounds, limit_s=30.0, device=DEVICE)
            return dict(zip(left, samples, strict=True))
        except Exception as error:
            if not running:
                raise
            _left_out(running[0], error)
            del left[running[0]]
    return {}


def _left_out(contender: Contender, error: Exception) -> None:
    say(f"  {contender.name} left out: {told(error)}")
    if lost(error):
        raise Lost(contender.name, told(error)) from error
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def told(error: Exception) -> str:
    """The type of an error, its first line, and its last, which of a compiler's is what it is about."""
    lines = [line.strip()[:200] for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}"


def lost(error: Exception) -> bool:
    """Whether an error is of the kind after which a CUDA context is of no more use, or it is of none."""
    fatal = getattr(torch, "AcceleratorError", None)
    if (fatal and isinstance(error, fatal)) or any(s in str(error) for s in ("CUDA error", "Triton Error [CUDA]")):
        return True
    try:
        torch.zeros(1, device=DEVICE).add_(1)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


def reference(shape: Shape, data: Data, aggregation: str) -> Results:
    """What the results of the first sequence must be: of the last token for decode, else of the first tokens."""
    if shape.kind == "decode":
        whole = replace(shape, kind="forward", B=1)
        return {"y": eager(whole, data.prefix(shape.T), aggregation)()["y"][:, -1:]}
    prefix = _prefix(shape)
    return eager(replace(shape, B=1, T=prefix), data.prefix(prefix), aggregation)()


def _prefix(shape: Shape) -> int:
    return min(shape.T, max(CHECKED, 4 * shape.C))


def checked(
    contender: Contender, shape: Shape, data: Data, results: Results, reference: Callable[[str], Results]
) -> float:
    """The error of a contender; 0 of one that has nothing to be held to.

    Raises:
        MctuneError: if it is wrong, or not finite.
    """
    if not all(bool(x.isfinite().all()) for x in results.values()):
        raise MctuneError("the result is not finite")
    if not contender.computes:
        return 0.0
    prefix, wanted = _prefix(shape), reference(contender.computes)
    if shape.kind == "decode":
        found: Results = {"y": results["y"][:1]}
    elif shape.kind == "forward":
        found = {"y": results["y"][:1, :prefix]}
    elif contender.late:  # the first tokens alone would take as long to compile
        found, wanted = {"y": results["y"][:1, :prefix]}, {"y": wanted["y"]}
    else:
        # A token's gradients depend on later tokens, its y does not: compare the first ones with a run over them alone.
        found = contender.make(replace(shape, B=1, T=prefix), data.prefix(prefix))()
    if set(found) != set(wanted):
        raise MctuneError(f"it has {', '.join(found)}, wanted are {', '.join(wanted)}")
    error = max(error_ratio(*_decided(found[name], wanted[name], contender.computes)) for name in wanted)
    limit = tolerance(shape.problem(contender.computes))
    if not error <= limit:
        raise MctuneError(f"wrong: error {error:.2e} over {limit:.0e}")
    return error


def _decided(found: torch.Tensor, wanted: torch.Tensor, aggregation: str) -> tuple[torch.Tensor, torch.Tensor]:
    found, wanted = found.float().flatten(0, 2), wanted.float().flatten(0, 2)
    if aggregation != "ssc":
        return found, wanted
    off = (found - wanted).square().sum(-1)
    kept = off.argsort()[: off.numel() - int(UNDECIDED * off.numel())]
    return found[kept], wanted[kept]


def rates(small: bool) -> Rates:
    """The medians of a few."""
    size, count = (256, 1 << 20) if small else (8192, 1 << 28)
    dtype = torch.float32 if small else torch.bfloat16
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    source, target = (torch.zeros(count, device=DEVICE) for _ in range(2))
    product, copy = (
        summary(one)[0] / 1e3
        for one in time_rotated([lambda: a @ b, lambda: target.copy_(source)], rounds=11, device=DEVICE)
    )
    return Rates(2.0 * size**3 / product, 8.0 * count / copy)
