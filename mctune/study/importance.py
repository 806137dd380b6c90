"""How much each parameter of a search matters to the time: PED-ANOVA, of Optuna, over a study's candidates."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from mctune.core.config import Config

LEAST = 10
"""Candidates with a time, below which nothing is said."""


def importance(timed: Sequence[tuple[Config, float]]) -> Mapping[str, float]:
    """Shares of 1 by parameter: how much being among the fastest of ``timed`` (configuration, ms) depends on it.

    Empty where fewer than :data:`LEAST` candidates have a time, or no parameter that all of them have varies.
    """
    if len(timed) < LEAST or len({cost for _, cost in timed}) < 2:
        return {}
    shared = set.intersection(*(set(config) for config, _ in timed))
    values = {
        name: sorted({config[name] for config, _ in timed}, key=lambda v: (isinstance(v, str), v)) for name in shared
    }
    spaces = {name: CategoricalDistribution(found) for name, found in sorted(values.items()) if len(found) > 1}
    if not spaces:
        return {}
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study = optuna.create_study()
            study.add_trials([
                create_trial(params={name: config[name] for name in spaces}, distributions=dict(spaces), value=cost)
                for config, cost in timed
            ])  # fmt: skip
            return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    finally:
        optuna.logging.set_verbosity(level)
