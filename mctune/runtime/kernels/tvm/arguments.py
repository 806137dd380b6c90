"""The arguments of the TVM kernels, by name: a build is held to this order, and launchers pass values by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

_GATES = ("g", "beta", "lam")
_DEEP_GATES = ("g", "eta", "mu")
_WALK = ("inner", "scale", "adds_input", "carries")
_DEEP_CACHE = (
    *("up", "down", "descriptors", "online_up", "online_down", "start_up", "start_down", "momentum_up"),
    *("momentum_down", "key_sum", "cached", "filled"),
)
_LEFT = ("online", "hidden", "rows_h", "rows_err")
_SEGMENTS = ("begin", "end", "first", "tokens", "heads")
_LIMITS = ("longest", "top_k", "scale")
_CACHE = ("states", "descriptors", "online", "key_sum", "last_key", "last_value", "cached", "filled")

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "segment_states": ("k", "v", *_GATES, *_SEGMENTS, "states", "means"),
    "read_forward": ("q", "u", "k", "v", *_GATES, "states", "means", *_SEGMENTS, *_LIMITS, "y"),
    "read_backward": (
        *("dy", "q", "u", "k", "v", *_GATES, "states", "means", *_SEGMENTS, *_LIMITS),
        *("gamma", "dr", "own", "entering", "dq", "du"),
    ),
    "state_backward": (
        *("dy", "q", "u", "g", "gamma", "dr", "own", *_SEGMENTS, "scale"),
        *("parts", "dstates", "dmeans"),
    ),
    "write_backward": (
        *("dy", "q", "u", "k", "v", *_GATES, "own", "entering", "states", "dstates", "dmeans", *_SEGMENTS, "scale"),
        *("lead_key", "lead_value", "dk", "dv", "dg", "dbeta", "dlam"),
    ),
    "deep_write": (
        *("q", "k", "v", *_DEEP_GATES, "W_up", "W_down", *_SEGMENTS, *_WALK, "keeps"),
        *("up", "down", "means", "enter_up", "enter_down", *_LEFT, "rows_raw"),
    ),
    "deep_read": (
        *("q", "u", "k", *_DEEP_GATES, "W_down", "up", "down", "means", "enter_down", *_LEFT, *_SEGMENTS),
        *("longest", "top_k", *_WALK, "mixture", "y"),
    ),
    "deep_gates": ("u", "k", "means", *_SEGMENTS, "top_k", "gamma", "own"),
    "deep_mix_backward": (
        *("dy", "q", *_DEEP_GATES, "W_down", "means", "up", "down", "enter_down", "hidden", "rows_h", "rows_err"),
        *("mixture", "gamma", "own", *_SEGMENTS, "longest", *_WALK, "given"),
        *("mixed", "dhidden", "dgamma", "down_own", "parts"),
    ),
    "deep_read_backward": (
        *("dy", "q", "means", "up", "down", "gamma", "mixed", "dhidden", *_SEGMENTS, "scale", "adds_input"),
        *("dgamma", "dup", "ddown", "parts"),
    ),
    "deep_write_backward": (
        *("dy", "q", "k", "v", *_DEEP_GATES, "W_up", "W_down", "means", "up", "down", "enter_up", "enter_down"),
        *(*_LEFT, "rows_raw", "mixed", "dhidden", "own", "dup", "ddown", *_SEGMENTS, "longest", *_WALK),
        *("dq", "dk", "dv", "dg", "deta", "dmu", "down_own", "dstart_up", "dstart_down"),
    ),
    "deep_gates_backward": (*("u", "k", "means", "gamma", "own", "down_own", *_SEGMENTS, "dgamma", "du", "dk"),),
    "deep_decode": (
        *("q", "u", "k", "v", *_DEEP_GATES, "W_up", "W_down", *_DEEP_CACHE),
        *("length", "inner", "top_k", "adds_input", "scale", "y"),
    ),
    "decode_step": ("q", "u", "k", "v", *_GATES, *_CACHE, "length", "top_k", "scale", "y"),
}
"""The names of each kernel's arguments in their order; a name means the same in all kernels of a pass."""

_PICK = {kernel: itemgetter(*names) for kernel, names in ARGUMENTS.items()}


def launch(kernel: str, function: Callable[..., None], values: Mapping[str, Any]) -> None:
    """Call the function of ``kernel`` with those of ``values`` that it takes; ``values`` may hold more.

    Raises:
        KeyError: naming an argument that is missing.
    """
    function(*_PICK[kernel](values))
