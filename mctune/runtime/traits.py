"""The axes as data: what each aggregation and each recurrence is (arXiv:2602.24281, sections 3 and 4).

Whatever treats two of them differently asks for a trait and never for a name, so a new one that combines these traits
is a row here, its formula where one is new, and its line of the oracle. torch is not imported here: the command line
reads these tables too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Aggregation:
    """How a token reads the cached states.

    Attributes:
        name: what users call it.
        routed: gates compare the token's connector u with the segments' mean keys (Eq. 8-10).
        sparse: only the ``top_k`` segments with the largest logits are read (Eq. 16-17). Needs ``routed``.
        averages: what is read is divided by the number of states that there are (section 4.3). Excludes ``routed``.
        mixes_parameters: of a deep memory, the states are mixed and the mixture is read once (Eq. 14-15). The reading
            of a matrix memory is linear in the state: there both are the same.
    """

    name: str
    routed: bool = False
    sparse: bool = False
    averages: bool = False
    mixes_parameters: bool = False

    def __post_init__(self) -> None:
        if self.sparse and not self.routed:
            raise ValueError(f"{self.name}: what is sparse chooses by the gates' logits, so it is routed")
        if self.averages and self.routed:
            raise ValueError(f"{self.name}: what is routed has gates that sum to 1, so it does not average too")

    @property
    def reads(self) -> tuple[bool, bool, bool]:
        """What a kernel of a matrix memory computes: equal for two aggregations that one kernel serves."""
        return self.routed, self.sparse, self.averages

    @property
    def weights(self) -> str:
        """How cached states are read: ``even`` (all alike), ``dense`` (a gate each), ``sparse`` (a few have one)."""
        return "sparse" if self.sparse else "dense" if self.routed else "even"


@dataclass(frozen=True)
class Recurrence:
    """How a memory is written.

    Attributes:
        name: what users call it.
        family: ``matrix`` (a state is [Dk, Dv]) or ``deep`` (a two-layer MLP). Kernels are written for a family.
        gates: the gates [B, T, H] that it takes, in the order of the signature.
        momentum: the surprise of past tokens is carried along (Titans, Eq. 34-36).
        convolves: what is written mixes a token's key and value with those of the one before (SWLA, Eq. 26-27).
    """

    name: str
    family: str = "matrix"
    gates: tuple[str, ...] = ()
    momentum: bool = False
    convolves: bool = False

    @property
    def deep(self) -> bool:
        """Whether the memory is a two-layer MLP."""
        return self.family == "deep"

    @property
    def gated(self) -> bool:
        """Whether it takes gates."""
        return bool(self.gates)


FAMILIES = ("matrix", "deep")
SEGMENTATIONS = ("constant", "logarithmic", "packed")
STATE_INITS = ("independent", "checkpoint")
PASSES = ("forward", "backward", "decode")
AGGREGATIONS = {
    row.name: row
    for row in (
        Aggregation("residual"),
        Aggregation("grm", routed=True),
        Aggregation("soup", routed=True, mixes_parameters=True),
        Aggregation("ssc", routed=True, sparse=True),
        Aggregation("mean", averages=True, mixes_parameters=True),
    )
}
RECURRENCES = {
    row.name: row
    for row in (
        Recurrence("linear"),
        Recurrence("swla", gates=("g", "beta", "lam"), convolves=True),
        Recurrence("dla", family="deep", gates=("eta",)),
        Recurrence("titans", family="deep", gates=("g", "eta", "mu"), momentum=True),
    )
}


def gates_of(family: str) -> tuple[str, ...]:
    """The gates that any recurrence of a family takes: what its kernels have arguments for."""
    return tuple(dict.fromkeys(name for row in RECURRENCES.values() if row.family == family for name in row.gates))


def alike(aggregation: str, family: str) -> str:
    """The first aggregation of the table whose kernels serve this one too: for a matrix memory, soup is grm."""
    row = AGGREGATIONS[aggregation]
    if family != "matrix":
        return aggregation
    return next(name for name, other in AGGREGATIONS.items() if other.reads == row.reads)


def any_of(trait: str, table: dict[str, Aggregation] | dict[str, Recurrence]) -> str:
    """The names that have a trait, for a message: ``'grm' or 'ssc'``."""
    return " or ".join(repr(name) for name, row in table.items() if getattr(row, trait))
