"""T1, the search space format of the auto-tuning community: parameters, their values, and conditions as expressions.

The schema is odgaard/TuningSchema's, which kernel_tuner and KTT read. It is about one kernel in CUDA, OpenCL or
Vulkan, with its grid; a configuration of mctune is several kernels, launched by a host function. So what T1 demands of
the kernel is there for its schema, and the space is what the file is for: to replay results (``SimulationInput`` names
them), or to search it with other strategies.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mctune.core.config import Scalar
from mctune.core.errors import UsageError
from mctune.core.space import Param, SearchSpace

FORMAT_VERSION = 1
_LANGUAGES = {"cuda": "CUDA"}
_OTHER = "OpenCL"
"""What T1 has for devices that are not CUDA's; ``Compiler`` says what it really is."""
_TYPES: dict[type, str] = {bool: "bool", int: "int", str: "string"}


@dataclass(frozen=True)
class Condition:
    """A Python expression over the parameters that must be true of every configuration."""

    parameters: tuple[str, ...]
    expression: str


@dataclass(frozen=True)
class Described:
    """A space as T1 has it: ``kernel`` names it, ``kind`` is the target's (``cpu``, ``cuda``, ``hip``), ``compiler``
    what compiles it, ``results`` the file of its results."""

    kernel: str
    kind: str
    device: str
    compiler: str
    space: SearchSpace
    conditions: tuple[Condition, ...]
    results: str = ""


def to_t1(described: Described) -> dict[str, Any]:
    """The T1 document of a space."""
    return {
        "General": {"FormatVersion": FORMAT_VERSION, "TimeUnit": "Milliseconds", "OutputFormat": "JSON"},
        "ConfigurationSpace": {
            "TuningParameters": [
                {
                    "Name": param.name,
                    "Type": _type(param.values),
                    "Values": repr(list(param.values)),
                    "Ordered": param.ordered,
                    **({"Description": param.help} if param.help else {}),
                }
                for param in described.space.params
            ],
            "Conditions": [
                {"Parameters": list(one.parameters), "Expression": one.expression} for one in described.conditions
            ],
        },
        "KernelSpecification": {
            "Language": _LANGUAGES.get(described.kind, _OTHER),
            "Compiler": described.compiler,
            "Device": {"Id": 0, "Name": described.device},  # a version of the schema demands a number
            "KernelName": described.kernel,
            "KernelFile": "",
            "GlobalSize": {"X": "1"},
            "LocalSize": {"X": "1"},
            **({"SimulationInput": described.results} if described.results else {}),
        },
    }


def _type(values: Sequence[Scalar]) -> str:
    kinds = {type(value) for value in values}
    return _TYPES[kinds.pop()] if len(kinds) == 1 else "string"


def from_t1(document: Mapping[str, Any]) -> Described:
    """The inverse of :func:`to_t1`. A parameter that does not say whether it is ordered is, if it has numbers.

    Raises:
        UsageError: naming what is missing, or not what T1 demands.
    """
    try:
        listed = document["ConfigurationSpace"]
        params = tuple(_param(one) for one in listed["TuningParameters"])
        conditions = tuple(
            Condition(tuple(map(str, one["Parameters"])), str(one["Expression"]))
            for one in listed.get("Conditions", ())
        )
        kernel = document["KernelSpecification"]
        return Described(
            kernel=str(kernel["KernelName"]),
            kind="cuda" if kernel["Language"] == "CUDA" else "",
            device=str(kernel.get("Device", {}).get("Name", "")),
            compiler=str(kernel.get("Compiler", "")),
            space=SearchSpace(params),
            conditions=conditions,
            results=str(kernel.get("SimulationInput", "")),
        )
    except (AttributeError, LookupError, SyntaxError, TypeError, ValueError) as error:
        raise UsageError(f"is not T1: {type(error).__name__} {str(error)[:120]}") from error


def _param(one: Mapping[str, Any]) -> Param:
    values = ast.literal_eval(one["Values"]) if isinstance(one["Values"], str) else one["Values"]
    if not isinstance(values, list | tuple) or not all(isinstance(value, int | str) for value in values):
        raise ValueError(f"the values of {one['Name']!r:.40} are no list of integers, flags and texts")
    ordered = one.get("Ordered", all(type(value) is int for value in values))
    return Param(str(one["Name"]), tuple(values), bool(ordered), str(one.get("Description", "")))
