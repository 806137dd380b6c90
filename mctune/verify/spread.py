"""Coverage of the Triton templates: every combination once, configurations spread over the spaces."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product

from mctune.backends import get_backend
from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.problem import AGGREGATIONS, RECURRENCES, STATE_INITS, Problem
from mctune.core.space import SearchSpace
from mctune.core.target import Target
from mctune.runtime.kernels.support import served

_MATRIX = tuple(name for name, row in RECURRENCES.items() if not row.deep)
_SHAPES = ((24, 40, 24), (16, 16, 32), (20, 33, 40), (64, 32, 16), (48, 80, 50), (7, 20, 33))
"""Dk, Dv, segment length."""
_DEEP_SHAPES = ((16, 16, 14, 3, 4), (20, 12, 18, 2, 5), (24, 24, 20, 3, 16), (7, 20, 9, 4, 3))
"""Dk, Dv, segment length, E / Dk, inner chunk."""
_FORMULATIONS: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    "forward": (
        *(
            ("grm", {"formulation": one, "gates": gates})
            for one, gates in product(("per_segment", "gated"), ("precomputed", "fused"))
        ),
        ("grm", {"formulation": "scaled", "gates": "precomputed"}),
        *(
            ("ssc", {"formulation": one, "gates": "precomputed"})
            for one in ("per_segment", "gated", "scaled", "grouped")
        ),
    ),
    "backward": tuple(("ssc", {"formulation": one}) for one in ("per_segment", "grouped")),
}
"""Aggregation and formulation of a pass of matrix memories."""
_FORMS = {"forward": (("grm", "rows"), ("soup", "rows"), ("ssc", "states")), "backward": ()}
"""Aggregation, and what the segments of a deep memory whose errors take all hidden units leave, of a pass."""
FORMULATED = tuple(_FORMULATIONS)
_STEPS, _PATIENCE = 60, 4000


@dataclass(frozen=True)
class Drawn:
    """A problem, and a configuration of its templates."""

    problem: Problem
    config: Config

    def __str__(self) -> str:
        p = self.problem
        how = "".join(f"-{self.config[name]}" for name in ("formulation", "gates", "write_FORM") if name in self.config)
        return f"{p.recurrence}-{p.aggregation}-{p.state_init}{how}-{p.Dk}x{p.Dv}-{p.dtype}"


def recurrences(pass_: str) -> tuple[str, ...]:
    """Those whose pass has templates."""
    families = {row.family for row in served(backend="triton") if pass_ in row.passes}
    return tuple(name for name, row in RECURRENCES.items() if row.family in families)


def draw_defaults(pass_: str, target: Target) -> list[Drawn]:
    """The configurations that calls of the widest use start from: segments of 256, heads of 128 (64 of deep memories,
    for they take long to interpret), in bfloat16."""
    drawn = []
    for recurrence, aggregation in product(recurrences(pass_), AGGREGATIONS):
        deep, reads = RECURRENCES[recurrence].deep, AGGREGATIONS[aggregation]
        if reads.mixes_parameters and not (deep and reads.routed):
            continue
        width = 64 if deep else 128
        problem = Problem(
            recurrence=recurrence, aggregation=aggregation, pass_=pass_, T=16384 + (pass_ == "decode"), H=16,
            Dk=width, Dv=width, segment_length=256, dtype="bfloat16", top_k=4 if aggregation == "ssc" else None,
        )  # fmt: skip
        drawn.append(Drawn(problem, default(problem, target)))
    return drawn


def default(problem: Problem, target: Target) -> Config:
    """The default of the problem's space.

    Raises:
        UsageError: if none of the space is valid on the target.
    """
    space: SearchSpace = get_backend("triton").space(problem)
    config = space.first_valid(lambda candidate: space.valid(candidate, problem, target))
    if config is None:
        raise UsageError(f"{problem} has no valid default on {target.name}")
    return config


def draw(pass_: str, target: Target, dtypes: Sequence[str]) -> list[Drawn]:
    """One candidate for each recurrence, aggregation and state init; ``dtypes`` take turns."""
    rng = random.Random(1)
    shapes, deep_shapes, kinds = cycle(_SHAPES), cycle(_DEEP_SHAPES), cycle(dtypes)
    drawn = []
    for recurrence, aggregation, state_init in product(recurrences(pass_), AGGREGATIONS, STATE_INITS):
        expansion = inner_chunk = None
        if RECURRENCES[recurrence].deep:
            Dk, Dv, C, expansion, inner_chunk = next(deep_shapes)
        else:
            Dk, Dv, C = next(shapes)
        problem = Problem(
            recurrence=recurrence, aggregation=aggregation, state_init=state_init, pass_=pass_, B=2, T=3 * C + 5, H=2,
            Dk=Dk, Dv=Dv, segment_length=C, dtype=next(kinds), top_k=2 if aggregation == "ssc" else None,
            expansion=expansion, inner_chunk=inner_chunk,
        )  # fmt: skip
        drawn.append(Drawn(problem, walk(rng, problem, target)))
    return drawn


def draw_formulations(pass_: str, target: Target, dtypes: Sequence[str]) -> list[Drawn]:
    """Each way to compute the cached read of a pass, or its gradients, for each matrix memory; and titans' writes."""
    drawn = []
    for (recurrence, dtype), (aggregation, fixed) in product(
        zip(_MATRIX, cycle(dtypes), strict=False), _FORMULATIONS[pass_]
    ):
        problem = Problem(
            recurrence=recurrence, aggregation=aggregation, pass_=pass_, T=100, H=1, Dk=20, Dv=33, segment_length=40,
            state_init="checkpoint" if pass_ == "backward" else "independent", dtype=dtype,
            top_k=3 if aggregation == "ssc" else None,
        )  # fmt: skip
        drawn.append(Drawn(problem, walk(random.Random(2), problem, target, **fixed)))
    for (aggregation, form), dtype in zip(_FORMS[pass_], cycle(dtypes), strict=False):
        problem = Problem(
            recurrence="titans", aggregation=aggregation, pass_=pass_, T=60, H=1, Dk=20, Dv=12, segment_length=18,
            expansion=2, inner_chunk=5, dtype=dtype, top_k=2 if aggregation == "ssc" else None,
        )  # fmt: skip
        drawn.append(Drawn(problem, walk(random.Random(2), problem, target, write_FORM=form)))
    return drawn


def draw_specialized(target: Target) -> list[Drawn]:
    """The read by specialised warps, which only the device itself can verify; none where it has no such warps."""
    drawn = []
    for dtype, state_init in (("bfloat16", "independent"), ("float16", "checkpoint")):
        problem = Problem(
            aggregation="grm", state_init=state_init, T=900, H=1, Dk=128, Dv=128, segment_length=256, dtype=dtype
        )
        space = get_backend("triton").measuring().space(problem)
        configs = (config.replace(formulation="specialized") for config in (space.default, *space.fallbacks))
        found = next((config for config in configs if space.valid(config, problem, target)), None)
        drawn += [Drawn(problem, found)] if found is not None else []
    return drawn


def walk(rng: random.Random, problem: Problem, target: Target, **fixed: str) -> Config:
    """A valid configuration, far along a random walk that changes one parameter at a time; ``fixed`` ones stay."""
    space: SearchSpace = get_backend("triton").space(problem)

    def valid(config: Config) -> bool:
        return space.valid(config, problem, target)

    config = next(c.replace(**fixed) for c in (space.default, *space.fallbacks) if valid(c.replace(**fixed)))
    steps = 0
    for _ in range(_PATIENCE):
        param = rng.choice(space.params)
        other = config.replace(**{param.name: rng.choice(param.values)})
        if param.name not in fixed and other != config and valid(other):
            config, steps = other, steps + 1
        if steps == _STEPS:
            break
    return config


def odd_cases(problem: Problem) -> Iterator[Problem]:
    """Odd-sized problems that a candidate for ``problem`` serves, whatever segment length it was tuned at."""
    C = problem.segment_length
    assert C is not None
    match problem.pass_:
        case "forward":
            yield problem.replace(B=1, T=1, H=1)
            # Heads that take turns, in several groups.
            yield problem.replace(B=2, T=C + C // 2 + 1, H=3)
            # More segments than a tile of logits holds, and than ssc reads.
            yield problem.replace(B=1, T=74, H=1, segment_length=4)
            yield problem.replace(B=1, T=45, H=1, segmentation="logarithmic", segment_length=None)
            yield problem.replace(B=1, T=3 * C + 7, H=1, segmentation="packed")
        case "backward" if problem.deep:
            # Fewer tokens: an inner chunk takes long to interpret.
            yield problem.replace(B=2, T=C + C // 2 + 1, H=1)
            yield problem.replace(B=1, T=C + 9, H=1, segmentation="packed", segment_length=7)
        case "backward":
            yield problem.replace(B=1, T=2 * C + C // 2 + 1, H=1)
            yield problem.replace(B=2, T=38, H=1, segment_length=5)
            yield problem.replace(B=1, T=C + 9, H=1, segmentation="packed", segment_length=11)
        case _:
            # The first token; a block of tokens that ends several segments; more cached states than a tile holds.
            yield problem.replace(B=1, T=1, H=1)
            yield problem.replace(B=2, T=11, H=1, segment_length=3)
            yield problem.replace(B=1, T=26, H=1, segment_length=2)
