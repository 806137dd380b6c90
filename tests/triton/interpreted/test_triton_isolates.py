"""What is not finite reaches exactly the tokens that see it, on the GPU's kernels too: the pattern is the oracle's.

Kernels and inputs are other ones in each run; the seed is printed when it fails, and ``MCTUNE_SEED`` repeats one.
``MCTUNE_CASES`` is how many kernels a pass has (all of them: 0).
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from holding import DTYPES, TARGET, drawn

from mctune.backends import get_backend
from mctune.core.problem import Problem
from mctune.verify.inputs import Inputs
from mctune.verify.judge import decided_inputs
from mctune.verify.passes import PASSES
from mctune.verify.spread import FORMULATED, Drawn, draw_formulations

SEED = int(os.environ.get("MCTUNE_SEED", random.SystemRandom().randrange(2**31)))
CASES = int(os.environ.get("MCTUNE_CASES", 2))
ROUNDS = 2


def chosen(pass_: str) -> list[Drawn]:
    every = drawn(pass_)
    if pass_ in FORMULATED:
        every = [*every, *draw_formulations(pass_, TARGET, DTYPES), *draw_formulations(pass_, TARGET, DTYPES[::-1])]
    return random.Random(f"{SEED} {pass_}").sample(every, CASES) if CASES else every


def case_of(rng: random.Random, tuned: Problem) -> Problem:
    """A small problem that a kernel serves."""
    B, T, C = rng.randint(1, 2), rng.randint(3, 36), rng.choice((2, 5, 16, 40))
    if tuned.pass_ == "decode":
        return tuned.replace(B=B, T=rng.randint(2, 16), H=1, segment_length=rng.choice((2, 3, 8)))
    if rng.random() < 0.4:
        return tuned.replace(B=1, T=T, H=1, segmentation="packed", segment_length=min(C, T))
    return tuned.replace(B=B, T=T, H=1, segment_length=C)


def spoil(rng: random.Random, problem: Problem, inputs: Inputs) -> tuple[Inputs, str, int]:
    """One entry of one token that is not finite, where, and the token."""
    names = ["q", "k", "v", "u", *(["dy"] if problem.pass_ == "backward" else [])]
    name = rng.choice([*names, *(gate for gate in inputs.gates if gate != "g")])  # the oracle takes no such decay
    x = (inputs.gates[name] if name in inputs.gates else getattr(inputs, name)).clone()
    place = tuple(rng.randrange(size) for size in x.shape)
    # An infinite key may make a logit of -inf: a gate of 0.
    x[place] = bad = rng.choice((float("nan"), float("inf"))) if name in ("v", "q", "dy") else float("nan")
    changed = {"gates": inputs.gates | {name: x}} if name in inputs.gates else {name: x}
    return replace(inputs, **changed), f"{name}{list(place)} = {bad}", place[1]


def pattern(x: torch.Tensor) -> torch.Tensor:
    """bool [B, T, H]: tokens of a head with anything that is not finite."""
    return ~x.isfinite() if x.dim() == 3 else ~x.isfinite().all(-1)


def check(one: Drawn, folder: Path, rng: random.Random) -> list[str]:
    """What differs from the oracle's pattern."""
    backend = get_backend("triton")
    kernel = backend.load(one.problem, one.config, backend.build(one.problem, one.config, TARGET, folder))
    wrong = []
    for _ in range(ROUNDS):
        problem = case_of(rng, one.problem)
        seed = rng.randrange(2**31)
        inputs, where, token = spoil(rng, problem, decided_inputs(problem, seed))
        run = PASSES[problem.pass_]
        expected, found = run.expected(problem, inputs), run.run(kernel, problem, inputs)
        for name in ("y",) if problem.pass_ != "backward" else ("dq", "dk", "dv", "du"):
            ours, right = pattern(found[name]), pattern(expected[name])
            # The oracle multiplies by zero: what ssc does not choose by a gradient, and the beta of a first token,
            # before which there is none to weigh.
            more = problem.pass_ == "backward" and (problem.reads.sparse or where.startswith("beta"))
            reached = ours & ~right
            if name in ("dk", "dv"):
                reached[:, token + 1 : token + int(one.config["dkv_BJ"])] = False  # within a block of tokens
            for word, places in (("reached", reached), ("spared", right & ~ours)):
                if places.any() and not (more and word == "spared"):
                    cuts = "" if inputs.cu_seqlens is None else f" of {inputs.cu_seqlens.tolist()}"
                    size = f"B={problem.B}, T={problem.T}{cuts}, C={problem.segment_length}"
                    wrong.append(f"{where} {word} {name}{places.nonzero()[:4].tolist()}, {size}: {one} {one.config}")
    return wrong


@pytest.mark.parametrize("pass_", ["forward", "backward", "decode"])
def test_isolation(pass_: str, tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} {pass_} cases")
    wrong = [line for number, one in enumerate(chosen(pass_)) for line in check(one, tmp_path / str(number), rng)]
    assert not wrong, "\n".join([f"MCTUNE_SEED={SEED}: {len(wrong)} patterns differ", *wrong[:20]])
