"""Right and wrong arguments of the public names: a right result on every backend, or one line that names the argument.

``python -m tests.fuzz.arguments --minutes 60``
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mctune.reference import memory_caching as oracle
from mctune.runtime.api.functional import memory_caching
from mctune.runtime.api.module import FEATURE_MAPS, MemoryCaching
from mctune.runtime.cache.cache import MemoryCache
from mctune.runtime.errors import ArgumentError, BackendError
from mctune.runtime.traits import AGGREGATIONS, RECURRENCES, SEGMENTATIONS, STATE_INITS
from tests.fuzz.driver import main
from tests.fuzz.kernels import call_served

TENSORS = ("q", "k", "v", "u", "g", "beta", "lam", "eta", "mu", "W_up", "W_down")
Served = Callable[[random.Random], dict[str, Any]]


class Odd(Tensor):
    """A tensor of another class."""


ODD: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: 0, lambda: -1, lambda: 1, lambda: 3, lambda: 1.5, lambda: True, lambda: False,
    lambda: 10**400,
    lambda: 2**40, lambda: 1e300, lambda: float("nan"), lambda: float("inf"), lambda: 1j, lambda: "x", lambda: "",
    lambda: b"x",
    list, dict, set, lambda: [1], lambda: (1, 2), object, lambda: len, lambda: int, lambda: torch.float32,
    lambda: np.ones(3), lambda: np.float32(0.5), lambda: np.int64(2), lambda: np.bool_(True), lambda: Fraction(1, 2),
    lambda: Decimal("0.5"), lambda: torch.tensor(2), lambda: torch.tensor(0.5), lambda: torch.tensor([1.0, 2.0]),
    lambda: torch.nn.Parameter(torch.tensor(0.5)), lambda: torch.zeros(0), lambda: torch.Size([2]), lambda: "grm\n",
    lambda: slice(2),
    lambda: range(3), lambda: iter([1]), lambda: torch.device("cpu"), lambda: "linear", lambda: "é" * 300,
)  # fmt: skip
"""What a user may pass by mistake, for any argument."""

CHANGES: Mapping[str, Callable[[Tensor], Any]] = {
    "numpy": lambda x: x.detach().numpy(), "list": lambda x: x.tolist(), "sparse": lambda x: x.detach().to_sparse(),
    "meta": lambda x: x.to("meta"), "nested": lambda x: torch.nested.nested_tensor([x[0]]), "bool": lambda x: x.bool(),
    "jagged": lambda x: torch.nested.nested_tensor([x[0]], layout=torch.jagged),
    "int": lambda x: x.int(), "complex": lambda x: x.to(torch.complex64), "float8": lambda x: x.to(torch.float8_e4m3fn),
    "half": lambda x: x.half(), "bfloat16": lambda x: x.bfloat16(), "double": lambda x: x.double(),
    "float": lambda x: x.float(),
    "first": lambda x: x[0], "short": lambda x: x[:, :-1], "narrow": lambda x: x[..., :-1],
    "wide": lambda x: torch.cat([x, x], -1),
    "axis": lambda x: x[None], "none": lambda x: x[:0], "empty": lambda x: x[..., :0], "turned": lambda x: x.mT,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0], "shared": lambda x: x[:1].expand_as(x),
    "grad": lambda x: x.detach().requires_grad_(),
    "parameter": torch.nn.Parameter, "odd": lambda x: x.as_subclass(Odd), "twisted": lambda x: x.mT.contiguous().mT,
    "negated": lambda x: torch._neg_view(-x),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "mkldnn": lambda x: x.detach().float().to_mkldnn(), "twice": lambda x: torch.cat([x, x]),
    "transposed": lambda x: x.transpose(1, 2),
    "csr": lambda x: x[0, 0].to_sparse_csr(), "conj": lambda x: x.to(torch.complex64).conj(), "mask": lambda x: x > 0,
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "channels": lambda x: x.to(memory_format=torch.channels_last),
}  # fmt: skip
"""What a user may have made of a tensor that is right."""


def right(draw: random.Random, served: Served | None) -> dict[str, Any]:
    """Arguments of ``memory_caching`` without a fault."""
    B, T, H, Dk, Dv = draw.randint(1, 2), draw.randint(1, 9), draw.randint(1, 2), draw.randint(1, 4), draw.randint(1, 4)
    names: dict[str, Any] = {
        "recurrence": draw.choice(tuple(RECURRENCES)), "aggregation": draw.choice(tuple(AGGREGATIONS)),
        "segmentation": draw.choice(SEGMENTATIONS), "state_init": draw.choice(STATE_INITS),
    }  # fmt: skip
    if served is not None:
        names |= served(draw)
        Dk, Dv = names.pop("widths")
    given = names | {
        "segment_length": draw.randint(1, 5),
        "top_k": draw.randint(1, 4),
        "inner_chunk": draw.randint(1, 3),
    }
    writes = RECURRENCES[given["recurrence"]]
    given["memory_residual"] = draw.random() < 0.5
    if writes.deep and given["memory_residual"]:
        Dv = Dk
    if given["segmentation"] == "packed":
        B, cut = 1, sorted(draw.randint(0, T) for _ in range(draw.randint(0, 2)))
        given["cu_seqlens"] = torch.tensor([0, *cut, T], dtype=draw.choice((torch.int32, torch.int64)))
    dtype = torch.float32 if served else draw.choice((torch.float32, torch.float64))
    given |= {name: (0.5 * torch.randn(B, T, H, Dk)).to(dtype) for name in ("q", "k", "u")}
    given["v"] = torch.randn(B, T, H, Dv).to(dtype)
    given |= {name: 0.1 * torch.rand(B, T, H) for name in writes.gates}
    if "g" in given:
        given["g"] = -given["g"]
    if writes.deep:
        given["W_up"], given["W_down"] = torch.randn(H, Dk, 3), 0.3 * torch.randn(H, 3, Dv)
    if draw.random() < 0.3:
        given["scale"] = draw.choice((0.5, 1, -2, np.float32(0.5), Fraction(1, 2)))
    if draw.random() < 0.3:
        del given[draw.choice(("u", *(name for name in writes.gates if name != "eta")))]  # 1 is a step that diverges
    return given


def spoil(draw: random.Random, given: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """Change up to two arguments, for better or worse; which."""
    changed = draw.sample(names, min(len(names), draw.choice((0, 1, 1, 1, 2))))
    for name in changed:
        x = given.get(name)
        if isinstance(x, Tensor) and draw.random() < 0.75:
            try:
                given[name] = CHANGES[draw.choice(tuple(CHANGES))](x)
            except (RuntimeError, IndexError, TypeError):
                given[name] = draw.choice(ODD)()
        else:
            given[name] = draw.choice(ODD)()
    return changed


def told(given: Mapping[str, Any]) -> str:
    def one(x: Any) -> str:
        if isinstance(x, Tensor):
            shape = "nested" if x.is_nested else list(x.shape)
            return f"{type(x).__name__} {x.dtype} {shape} {x.layout} {x.device}"
        return repr(x)[:80] if not isinstance(x, int) or abs(x) < 2**70 else "a huge integer"

    return ", ".join(f"{name}={one(x)}" for name, x in given.items())


def refusal(error: Exception, names: list[str], given: Mapping[str, Any], where: str) -> None:
    """An error must be ours, of one line, and about one of these arguments."""
    text = str(error)
    assert isinstance(error, ArgumentError), f"{type(error).__name__}: {text[:300]}\n{where}: {told(given)}"
    assert "\n" not in text and len(text) < 420, f"long: {text}\n{where}: {told(given)}"
    assert names, f"refused without a reason: {text}\n{where}: {told(given)}"
    assert any(re.search(rf"\b{re.escape(name)}\b", text) for name in names), (
        f"names no {names}: {text}\n{where}: {told(given)}"
    )


def clean(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same for the oracle: dense tensors in float64, without what is not used."""
    made: dict[str, Any] = {}
    for name, x in given.items():
        if isinstance(x, Tensor) and name != "cu_seqlens":
            made[name] = torch.tensor(x.detach().double().tolist(), dtype=torch.float64).view(x.shape)
        elif name == "scale" and x is not None:
            made[name] = float(x)
        elif x is not None:
            made[name] = x.int() if name == "cu_seqlens" else x
    if not AGGREGATIONS[given["aggregation"]].sparse:
        made.pop("top_k", None)
    return made


def function(draw: random.Random, served: Served | None) -> str:
    """One call of ``memory_caching`` on every backend."""
    given = right(draw, served)
    names = (*TENSORS, "recurrence", "aggregation", "segmentation", "segment_length", "state_init", "top_k", "scale",
             "memory_residual", "inner_chunk", "cu_seqlens")  # fmt: skip
    changed = spoil(draw, given, names)
    results: dict[str, Tensor] = {}
    refused = 0
    backends = ("eager", "auto", "tvm") if served else ("eager", "auto")
    for backend in backends:
        try:
            y = memory_caching(**given, backend=backend)
        except BackendError as error:
            assert backend == "tvm", f"{error}\n{told(given)}"
        except Exception as error:
            refusal(error, changed, given, f"memory_caching on {backend}")
            refused += 1
        else:
            results[backend] = y
    assert refused in (0, len(backends)) or (refused == len(backends) - 1 and not results), (
        f"taken by {list(results)} alone\n{told(given)}"
    )
    if not results:
        return "refused"
    q, v = given["q"], given["v"]
    wanted = None if q.is_meta else oracle(**clean(given))
    for backend, y in results.items():
        assert y.shape == v.shape and y.dtype == q.dtype and y.device == q.device, f"{backend}: {told(given)}"
        if wanted is None:
            continue
        rms = float(wanted.square().mean().sqrt().clamp(min=1e-3))
        limit = {torch.float64: 1e-6, torch.float32: 1e-3}.get(q.dtype, 0.15)
        error_ = float((y.detach().double() - wanted).abs().max()) / rms
        assert error_ <= limit, f"off by {error_:.2g} on {backend}: {told(given)}"
    return "right" if not changed else "taken"


def layer(draw: random.Random) -> str:
    """One layer, and a call of it."""
    given: dict[str, Any] = {
        "hidden_size": 8, "num_heads": draw.choice((1, 2)), "head_dim": draw.choice((None, 3)),
        "expand_v": draw.choice((1, 1.0, 2)),
        "recurrence": draw.choice(tuple(RECURRENCES)), "aggregation": draw.choice(tuple(AGGREGATIONS)),
        "segment_length": 2,
        "segmentation": draw.choice(SEGMENTATIONS), "state_init": draw.choice(STATE_INITS), "top_k": 1,
        "inner_chunk": 2,
        "expansion": 2, "memory_residual": False, "connector": True, "feature_map": draw.choice((None, *FEATURE_MAPS)),
        "qk_norm": True, "use_short_conv": draw.random() < 0.5, "conv_size": 2, "use_output_gate": False,
        "norm_eps": 1e-5,
        "layer_idx": draw.choice((None, 0)), "backend": "eager",
    }  # fmt: skip
    changed = spoil(draw, given, tuple(given))
    try:
        made = MemoryCaching(**given)
    except Exception as error:
        refusal(error, changed, given, "MemoryCaching")
        return "refused layer"
    x = torch.randn(draw.choice((1, 2)), 5, made.hidden_size)
    call: dict[str, Any] = {"hidden_states": x}
    if given["segmentation"] == "packed" or draw.random() < 0.2:
        call |= {"hidden_states": x[:1], "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)}
        logarithmic = given["segmentation"] == "logarithmic"
    else:
        mask = torch.ones(x.shape[:2])
        mask[0, : draw.randint(0, 3)] = 0
        call |= {"attention_mask": mask} if draw.random() < 0.3 else {}
        logarithmic = given["segmentation"] == "logarithmic" and "attention_mask" in call
    cached = draw.random() < 0.4
    if cached:
        call["past_key_values"] = MemoryCache()
    names = ("hidden_states", "attention_mask", "past_key_values", "cu_seqlens")
    wrong = spoil(draw, call, names)
    given_x = call["hidden_states"]
    if (
        isinstance(given_x, Tensor)
        and given_x.is_floating_point()
        and (given_x.is_meta or given_x.dtype != torch.float32)
    ):
        return "left to torch"  # which dtypes and devices go together is the projections' business
    if "hidden_states" in wrong:
        wrong += ["cu_seqlens", "attention_mask"]  # which are then those of other hidden states
    reasons = [
        *wrong,
        *changed,
        *(["layer_idx"] if cached else []),
        *(["segmentation"] if cached or logarithmic else []),
    ]
    try:
        y = made(**call)[0]
    except Exception as error:
        refusal(error, reasons, {**given, **call}, "forward")
        return "refused call"
    assert y.shape == call["hidden_states"].shape, told({**given, **call})
    assert y.is_meta or bool(y.isfinite().all()) or made.recurrence == "titans", told({**given, **call})
    return "layer"


def cache(draw: random.Random) -> str:
    """One cache, and a method of it."""
    given: dict[str, Any] = {
        "max_states": draw.choice((None, 2)),
        "rewind": 2,
        "state_dtype": draw.choice((None, torch.float16)),
    }
    changed = spoil(draw, given, tuple(given))
    try:
        made = MemoryCache(**given)
    except Exception as error:
        refusal(error, changed, given, "MemoryCache")
        return "refused cache"
    model = MemoryCaching(8, 2, segment_length=2, layer_idx=0, backend="eager")
    with torch.no_grad():
        model(torch.randn(2, 5, 8), past_key_values=made)
    method, name, value = draw.choice((
        ("crop", "max_length", -1), ("reserve", "tokens", 3), ("batch_repeat_interleave", "repeats", 2),
        ("to", "device", "cpu"),
        ("reorder_cache", "beam_idx", torch.tensor([1, 0])),
        ("batch_select_indices", "indices", torch.tensor([0, 0, 1])),
    ))  # fmt: skip
    argument = {name: value}
    changed = spoil(draw, argument, (name,))
    if (
        isinstance(argument[name], int)
        and abs(argument[name]) >= 2**40
        and method in ("reserve", "batch_repeat_interleave")
    ):
        argument[name] = 1.5
    try:
        getattr(made, method)(**argument)
        if changed and not (isinstance(argument[name], int | Tensor | str | torch.device)):
            raise AssertionError(f"{method} took {told(argument)}")
        rows = len(made.lengths)
        with torch.no_grad():
            assert rows == 0 or model(torch.randn(rows, 1, 8), past_key_values=made)[0].shape == (rows, 1, 8)
    except AssertionError:
        raise
    except Exception as error:
        refusal(error, [*changed, "crop"], argument, method)
        return "refused method"
    return "cache"


def case(draw: random.Random, served: Served | None = None) -> str:
    """One call of one of the public names."""
    torch.manual_seed(draw.randrange(2**31))
    which = draw.random()
    if served or which < 0.6:
        return function(draw, served)
    return layer(draw) if which < 0.85 else cache(draw)


if __name__ == "__main__":
    main("arguments", case, partial(case, served=call_served))
