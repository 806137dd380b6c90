"""What a problem asks of the templates, as flags: they never look at the name of a recurrence or an aggregation."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flags:
    """Kernels of one set of flags differ in sizes alone.

    Args:
        gated: writes have gates g, beta and lam, and the token before takes part in each (Eq. 26-27).
        checkpoint: a segment starts from the state before it instead of from nothing.
        routed: gates compare a token's connector u with the segments' mean keys.
        sparse: of the cached segments, a token reads the ``top_k`` whose logits are largest.
        averages: the gates of a token are all the same and add up to 1.
    """

    gated: bool
    checkpoint: bool
    routed: bool
    sparse: bool
    averages: bool


def flags_of(problem: Any) -> Flags:
    """The flags of a ``Problem``."""
    return Flags(
        gated=problem.writes.gated,
        checkpoint=problem.state_init == "checkpoint",
        routed=problem.reads.routed,
        sparse=problem.reads.sparse,
        averages=problem.reads.averages,
    )
