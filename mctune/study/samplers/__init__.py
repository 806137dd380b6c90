"""Optuna samplers over constrained discrete spaces, one a file; see :class:`DiscreteSampler`."""

from mctune.study.samplers.chain import ChainSampler
from mctune.study.samplers.discrete import DiscreteSampler
from mctune.study.samplers.grid import OrderedSampler
from mctune.study.samplers.mix import START, MixSampler, start_of
from mctune.study.samplers.named import sampler_of
from mctune.study.samplers.reading import Tried
from mctune.study.samplers.wrapped import WrappedSampler

__all__ = [
    "START",
    "ChainSampler",
    "DiscreteSampler",
    "MixSampler",
    "OrderedSampler",
    "Tried",
    "WrappedSampler",
    "sampler_of",
    "start_of",
]
