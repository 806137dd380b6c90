"""Samplers by name: what ``--sampler`` takes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import optuna
from optuna.samplers import BaseSampler

from mctune.core.config import Config
from mctune.core.errors import UsageError
from mctune.core.space import SearchSpace
from mctune.study.events import check_sampler
from mctune.study.rules import Rule
from mctune.study.samplers.chain import ChainSampler
from mctune.study.samplers.discrete import DiscreteSampler
from mctune.study.samplers.grid import OrderedSampler
from mctune.study.samplers.mix import START, MixSampler
from mctune.study.samplers.wrapped import WrappedSampler

_OWN = {"chain": ChainSampler, "mix": MixSampler}
_NEEDS = {"gp": ("scipy", "torch"), "cmaes": ("cmaes",)}
_OPTUNAS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
_KEPT_TO: dict[str, dict[str, Any]] = {
    "gp": {"asks": 3},  # its answers hardly change, and each takes long
    "cmaes": {"categories": False, "constraints": False},  # it ignores both
    "random": {"blind": True},
}


def sampler_of(
    name: str,
    space: SearchSpace,
    rules: Sequence[Rule] = (),
    *,
    seed: int | None = None,
    balance: str | None = None,
    retry_failed: bool = False,
    start: int = START,
    first: Sequence[Config] = (),
) -> DiscreteSampler:
    """The sampler of that name over ``space``; the other arguments are :class:`MixSampler`'s.

    Args:
        name: one of :data:`mctune.study.events.SAMPLERS`, or ``module:Class`` for any other ``BaseSampler``. That is
            constructed with ``seed=`` if it takes one, else with nothing.
        first: configurations to try after the defaults; see :meth:`DiscreteSampler.begin_with`.

    Raises:
        UsageError: if there is no such sampler, or something that it needs is not installed.
    """
    check(name)
    common: dict[str, Any] = {"seed": seed, "balance": balance, "retry_failed": retry_failed}
    sampler = _made(name, space, rules, start, common)
    sampler.begin_with(first)
    return sampler


def _made(name: str, space: SearchSpace, rules: Sequence[Rule], start: int, common: dict[str, Any]) -> DiscreteSampler:
    if name in _OWN:
        return _OWN[name](space, rules, start=start, **common)
    if name == "grid":
        return OrderedSampler(space, rules, **common)
    if name in _OPTUNAS:
        return WrappedSampler(_OPTUNAS[name], space, rules, **_KEPT_TO.get(name, {}), **common)
    found = _class(name)
    return WrappedSampler(lambda seed: _constructed(name, found, seed), space, rules, remembers=True, **common)


def check(name: str) -> None:
    """Refuse a sampler that does not exist, or needs what is not installed.

    Raises:
        UsageError: naming the sampler, and what to install.
    """
    check_sampler(name)
    missing = [needed for needed in _NEEDS.get(name, ()) if find_spec(needed) is None]
    if missing:
        raise UsageError(f"sampler {name!r} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if ":" in name:
        _class(name)


def _class(name: str) -> type[BaseSampler]:
    """The class that ``module:Class`` names."""
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.append("")  # a module in the working directory, as `python -m` has it
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UsageError(f"sampler {name!r}: {_line(error)}; is it installed in this environment?") from error
    except AttributeError as error:
        raise UsageError(f"sampler {name!r}: module {module} has no {attribute!r}; check how it is spelled") from error
    except Exception as error:  # a module may do anything
        raise UsageError(f"sampler {name!r}: importing {module} failed: {_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, BaseSampler)):
        raise UsageError(f"sampler {name!r} is no optuna.samplers.BaseSampler; name a class that derives from it")
    return found


def _constructed(name: str, sampler: type[BaseSampler], seed: int) -> BaseSampler:
    for arguments in ({"seed": seed}, {}):
        try:
            return sampler(**arguments)
        except TypeError as error:
            reason = error
        except Exception as error:
            raise UsageError(f"sampler {name!r} cannot be constructed: {_line(error)}") from error
    raise UsageError(
        f"sampler {name!r} cannot be constructed: {_line(reason)}; only seed= is given, so derive a class "
        "that fills in the rest"
    ) from reason


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
