"""Definitions and Workloads: a problem without its batch and its length, and those."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from mctune.core.problem import Problem
from mctune.report.trace.reference import memory_inputs, reference, token_inputs

OP_TYPE = "memory_caching"
_TAGS = ("pass", "recurrence", "aggregation", "segmentation", "state_init", "dtype")
"""Fields of a problem that are tags of its Definition, ``field:value``."""
_AXES = ("H", "Dk", "Dv", "segment_length", "top_k")
"""Fields that are constant axes."""
_ABOUT_AXES = {
    "B": "sequences", "T": "tokens of a sequence", "N": "cached memories of a sequence", "H": "heads",
    "Dk": "width of keys", "Dv": "width of values", "segment_length": "tokens of a segment",
    "top_k": "cached memories that a token reads",
}  # fmt: skip
_ABOUT = {
    "q": "queries", "k": "keys", "v": "values", "u": "connectors, which gates compare with the segments' mean keys",
    "g": "logarithm of the memory's decay, at most 0", "beta": "strength of the token before", "lam": "strength of the "
    "token", "y": "what each token reads", "dy": "the gradient of y", "states": "memories at the ends of segments",
    "descriptors": "mean keys of those segments", "online": "the memory of the segment under way",
    "key_sum": "sum of the keys of that segment", "last_key": "key of the token before", "last_value": "its value",
    "filled": "tokens of the segment under way", "online_after": "the online memory after the token",
}  # fmt: skip
_BACKWARD = (
    " Times of mctune's own solutions are those of the backward kernels alone: the forward has run, and has kept what "
    "they want."
)
_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")


def name_of(problem: Problem) -> str:
    """The name of a problem's Definition: equal for problems that differ in B and T alone.

    Examples:
        >>> name_of(Problem(T=4096, H=4, Dk=64, Dv=64, segment_length=256))
        'memory_caching_forward_linear_grm_constant_independent_h4_dk64_dv64_c256_float32'
    """
    sizes = [f"h{problem.H}", f"dk{problem.Dk}", f"dv{problem.Dv}"]
    sizes += [f"c{problem.segment_length}"] if problem.segment_length else []
    sizes += [f"top{problem.top_k}"] if problem.top_k else []
    words = (problem.pass_, problem.recurrence, problem.aggregation, problem.segmentation, problem.state_init)
    return "_".join((OP_TYPE, *words, *sizes, problem.dtype))


def definition(problem: Problem) -> dict[str, Any]:
    """The Definition of a problem. The order of its inputs is that of the reference's arguments.

    Raises:
        UsageError: if no reference is written for it.
    """
    fields = problem.to_dict()
    axes = {name: {"type": "const", "value": fields[name]} for name in _AXES if name in fields}
    axes |= {name: {"type": "var"} for name in (("B", "N") if problem.pass_ == "decode" else ("B", "T"))}
    title = str(problem.replace(B=1, T=1)).replace(" B1 T1 ", " ")
    sizes = [name for name in ("segment_length", "top_k") if name in axes]
    about = f"Memory Caching (arXiv:2602.24281): {title}."
    about += f" No array has an axis {' or '.join(sizes)}: the reference has it as a constant." if sizes else ""
    return {
        "name": name_of(problem),
        "op_type": OP_TYPE,
        "description": about + (_BACKWARD if problem.pass_ == "backward" else ""),
        "tags": [f"{name}:{fields[name]}" for name in _TAGS],
        "axes": {name: {**axis, "description": _ABOUT_AXES[name]} for name, axis in sorted(axes.items())},
        "inputs": {name: _tensor(problem, name) for name in inputs_of(problem)},
        "outputs": {name: _tensor(problem, name) for name in outputs_of(problem)},
        "reference": reference(problem),
    }


def inputs_of(problem: Problem) -> tuple[str, ...]:
    """The names of the inputs, in their order."""
    tokens = token_inputs(problem)
    if problem.pass_ == "decode":
        return (*tokens, *memory_inputs(problem), "filled")
    return (*tokens, "dy") if problem.pass_ == "backward" else tokens


def outputs_of(problem: Problem) -> tuple[str, ...]:
    """The names of the outputs, in their order."""
    if problem.pass_ == "backward":
        return tuple(f"d{name}" for name in token_inputs(problem))
    return ("y", "online_after") if problem.pass_ == "decode" else ("y",)


def _tensor(problem: Problem, name: str) -> dict[str, Any]:
    about = _ABOUT.get(name) or f"the gradient of {name[1:]}"
    plain = name[1:] if name not in _ABOUT else name
    heads = ["B", "H"] if problem.pass_ == "decode" else ["B", "T", "H"]
    shapes = {
        "q": [*heads, "Dk"], "k": [*heads, "Dk"], "u": [*heads, "Dk"],
        "v": [*heads, "Dv"], "y": [*heads, "Dv"], "dy": [*heads, "Dv"],
        "states": ["B", "H", "N", "Dk", "Dv"], "descriptors": ["B", "H", "N", "Dk"],
        "online": ["B", "H", "Dk", "Dv"], "online_after": ["B", "H", "Dk", "Dv"],
        "key_sum": ["B", "H", "Dk"], "last_key": ["B", "H", "Dk"], "last_value": ["B", "H", "Dv"],
    }  # fmt: skip
    if name == "filled":
        return {"shape": None, "dtype": "int32", "description": about}
    dtype = problem.dtype if plain in ("q", "k", "v", "u", "y", "dy") else "float32"
    return {"shape": shapes.get(plain, heads), "dtype": dtype, "description": about}


def cached_and_filled(problem: Problem) -> tuple[int, int]:
    """Of a decode step that ends a row of T tokens: the memories cached before it, the tokens of its segment."""
    return divmod(problem.T - 1, problem.segment_length or 1)


def workload(problem: Problem) -> dict[str, Any]:
    """The Workload of a problem: normal numbers, but for gates, which are in a file of their own."""
    identity = str(uuid.uuid5(_NAMESPACE, problem.to_json()))
    axes = {"B": problem.B, "T": problem.T}
    inputs: dict[str, Any] = {name: {"type": "random"} for name in inputs_of(problem)}
    if problem.pass_ == "decode":
        cached, filled = cached_and_filled(problem)
        axes = {"B": problem.B, "N": cached}
        inputs["filled"] = {"type": "scalar", "value": filled}
    for name in problem.writes.gates:
        inputs[name] = {"type": "safetensors", "path": blob_of(problem, identity), "tensor_key": name}
    return {"uuid": identity, "axes": axes, "inputs": inputs}


def blob_of(problem: Problem, identity: str) -> str:
    """Where the gates of a workload lie in the dataset."""
    name = name_of(problem)
    return f"blob/workloads/{OP_TYPE}/{name}/{name}_{identity}.safetensors"


def problem_of(definition: Mapping[str, Any], workload: Mapping[str, Any]) -> Problem:
    """The problem that a Definition and a Workload were made from.

    Raises:
        UsageError: if it is no problem.
    """
    fields: dict[str, Any] = dict(tag.split(":", 1) for tag in definition["tags"] if tag.partition(":")[0] in _TAGS)
    fields |= {name: definition["axes"][name]["value"] for name in _AXES if name in definition["axes"]}
    axes = dict(workload["axes"])
    if "N" in axes:
        axes["T"] = axes.pop("N") * fields["segment_length"] + workload["inputs"]["filled"]["value"] + 1
    return Problem.from_dict({**fields, **axes})
