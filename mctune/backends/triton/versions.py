"""The Triton that the templates are written for, checked before it is imported, and what may go wrong with it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mctune.core.environment import version
from mctune.core.errors import DeviceError

OLDEST, BEYOND = (3, 6), (3, 10)
_REMEDY = "pip install 'triton>=3.6,<3.10'"
HOPPER = ("sm_90",)
_INTERPRETS, _BEYOND_NUMPY = (3, 7), (2, 4)
"""Older interpreters turn arrays of one element into integers, which these releases of numpy refuse."""


@dataclass(frozen=True)
class Hazard:
    """A way in which some Triton compiles a right kernel wrongly, by public report; none was confirmed on our kernels.

    Attributes:
        name: for tables and for :func:`mctune.backends.triton.exposure.exposed`, which says what kernels have the
            pattern.
        mended: the first release without it; ``None`` where the newest that is supported has it.
        archs: of the GPUs concerned.
        what: goes wrong, in words.
        forms: names of :data:`mctune.backends.triton.safe.FORMS` that avoid it, the cheapest first.
        reports: where it is described.
    """

    name: str
    mended: tuple[int, ...] | None
    archs: tuple[str, ...]
    what: str
    forms: tuple[str, ...]
    reports: str


HAZARDS = (
    Hazard(
        "wgmma wait", (3, 9), HOPPER,
        "with more than 4 warps each group of 4 waits for its own part of a product only, and another may overwrite "
        "the shared memory that is still read",
        ("warps", "mma"), "triton #11047, mended by #11056",
    ),
    Hazard(
        "wgmma buffers", None, HOPPER,
        "an operand that something else reads too has one buffer too few in a pipelined loop, and is overwritten while "
        "a product reads it",
        ("stages", "mma"), "triton #6691",
    ),
    Hazard(
        "wgmma fence", (3, 7, 1), HOPPER,
        "copies into shared memory and the products that read them are not ordered (no fence.proxy.async) where a loop "
        "is pipelined",
        ("stages", "mma"), "triton #9610, in 3.7.1 by #10537",
    ),
    Hazard(
        "wgmma registers", None, HOPPER,
        "a product still in flight reads its left operand from registers that the next pass of the loop fills",
        ("operand", "stages", "mma"), "triton #9433",
    ),
    Hazard(
        "transposed registers", (3, 7, 1), HOPPER,
        "a left operand that was transposed in registers gives wrong results at some widths",
        ("operand", "mma"), "flash-linear-attention #640",
    ),
    Hazard(
        "ptxas", None, HOPPER,
        "ptxas 12.8 and 12.9, which Triton brings along for this architecture, reuses registers of a left operand too "
        "early and miscompiles some kernels of several products; 13.3 is said not to",
        ("operand", "mma", "ptxas"), "triton #11781, flash-linear-attention #1262",
    ),
)  # fmt: skip
"""Those of the supported versions."""


def check_versions() -> None:
    """Refuse a missing or an unknown Triton, and a missing LibCST, which renders the templates.

    Raises:
        DeviceError: naming what is installed and what to install.
    """
    found = version("triton")
    if found is None:
        raise DeviceError(f"triton is not installed; {_REMEDY} (there are wheels for Linux)")
    if not OLDEST <= numbers(found)[:2] < BEYOND:
        raise DeviceError(f"triton {found} is not one that mctune supports; {_REMEDY}")
    if version("libcst") is None:
        raise DeviceError("libcst is not installed; pip install 'libcst>=1.5'")


def misfit(triton: str | None, numpy: str | None) -> str:
    """Why a Triton's interpreter does not run with a numpy, with the remedy; empty if it does, or one is missing."""
    if not triton or not numpy or numbers(triton)[:2] >= _INTERPRETS or numbers(numpy)[:2] < _BEYOND_NUMPY:
        return ""
    return (
        f"the interpreter of triton {triton}, which runs kernels without their GPU, does not work with numpy {numpy}; "
        "pip install 'numpy<2.4', or triton 3.7 or later"
    )


def check_interpreter() -> None:
    """Refuse a Triton whose interpreter does not run with the numpy that is installed.

    Raises:
        DeviceError: naming both and what to install.
    """
    said = misfit(version("triton"), version("numpy"))
    if said:
        raise DeviceError(said)


def hazards(triton: str, arch: str | None = None) -> tuple[Hazard, ...]:
    """What is known to go wrong with a version of Triton, on GPUs of ``arch`` or, without it, on any."""
    return tuple(
        hazard
        for hazard in HAZARDS
        if (hazard.mended is None or numbers(triton) < hazard.mended) and (arch is None or arch in hazard.archs)
    )


def numbers(text: str) -> tuple[int, ...]:
    """``3.7.1+git1234`` as (3, 7, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])
