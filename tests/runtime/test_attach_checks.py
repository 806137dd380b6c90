"""What attach_memory_caching promises of layers that it does not know: refused, or unchanged within one segment."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, elu

from mctune.runtime.api.attach import attach_memory_caching
from mctune.runtime.errors import ArgumentError

D, H = 24, 3
PLAIN: dict[str, Any] = {
    "mixing": "linear", "feature": "attribute", "scale": "default", "norm": "each head", "rope": False, "gate": False,
    "dropout": 0.0, "bias": True, "kv": None, "returns": "tensor", "needs": False, "buffer": False, "scaled": False,
}  # fmt: skip
OTHERS: dict[str, tuple[Any, ...]] = {
    "mixing": ("softmax", "divided", "decay", "window", "not causal"),
    "feature": ("in code", "other attribute", None),
    "scale": ("attribute", "in code", "none"),
    "norm": ("in code", "all heads", None),
    "rope": (True,),
    "gate": (True,),
    "dropout": (0.3,),
    "bias": (False,),
    "kv": ("num_kv_heads", "num_key_value_heads", "in code"),
    "returns": ("triple", "pair", "dict", "list"),
    "needs": (True,),
    "buffer": (True,),
    "scaled": (True,),
}
SERVED = {
    "feature": (None,), "scale": ("attribute",), "norm": (None,), "bias": (False,), "kv": ("num_kv_heads",
    "num_key_value_heads"), "returns": ("triple",), "buffer": (True,),
}  # fmt: skip
"""Of these, the other choices are plain linear attention too; a layer made of them must be taken."""


class Made(nn.Module):
    """An attention layer as its choices say, with the attributes that layers of linear attention have."""

    def __init__(self, choices: dict[str, Any]) -> None:
        super().__init__()
        self.choices, self.num_heads = choices, H
        narrow = D if choices["kv"] is None else D // H
        bias = choices["bias"]
        self.q_proj, self.o_proj = nn.Linear(D, D, bias), nn.Linear(D, D, bias)
        self.k_proj, self.v_proj = nn.Linear(D, narrow, bias), nn.Linear(D, narrow, bias)
        if choices["kv"] in ("num_kv_heads", "num_key_value_heads"):
            setattr(self, choices["kv"], 1)
        if choices["feature"] == "attribute":
            self.feature_map = nn.ELU()
        elif choices["feature"] == "other attribute":
            self.feature_map = nn.ReLU()
        if choices["scale"] == "attribute":
            self.scale = 0.3
        if choices["norm"] in ("each head", "all heads"):
            self.norm = nn.RMSNorm(D // H if choices["norm"] == "each head" else D)
        if choices["buffer"]:
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.last: Tensor | None = None

    def mixed(self, x: Tensor) -> Tensor:
        c, T = self.choices, x.shape[1]
        q, k, v = (p(x).unflatten(2, (-1, D // H)) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t.expand(-1, -1, H, -1) for t in (k, v))
        if c["feature"] == "attribute":
            q, k = self.feature_map(q), self.feature_map(k)
        elif c["feature"] is not None:
            q, k = elu(q) + 1, elu(k) + 1
        if c["rope"]:
            angle = torch.arange(T, device=x.device)[:, None, None] / 10
            q, k = (t * angle.cos() + t.roll(1, -1) * angle.sin() for t in (q, k))
        scale = {"attribute": 0.3, "in code": 0.5, "none": 1.0, "default": (D // H) ** -0.5}[c["scale"]]
        scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
        age = torch.arange(T)[:, None] - torch.arange(T)
        if c["mixing"] == "softmax":
            weights = scores.masked_fill(age < 0, -torch.inf).softmax(-1)
        elif c["mixing"] == "not causal":
            weights = scores
        else:
            weights = scores.tril()
        if c["mixing"] == "decay":
            weights = weights * 0.99 ** age.clamp(min=0)
        if c["mixing"] == "window":
            weights = weights * (age < 20)
        if c["mixing"] == "divided":
            weights = weights / (weights.sum(-1, keepdim=True).abs() + 1)
        y = torch.einsum("bhts,bshd->bthd", weights.to(v.dtype), v)
        if c["norm"] == "each head":
            y = self.norm(y)
        elif c["norm"] == "in code":
            y = y / (1 + y.norm(dim=-1, keepdim=True))
        y = y.flatten(2)
        y = self.norm(y) if c["norm"] == "all heads" else y
        y = dropout(y, c["dropout"], self.training)
        y = self.o_proj(y * x.sigmoid() if c["gate"] else y)
        return x + y if c["scaled"] else y

    def finish(self, x: Tensor) -> Any:
        y = self.mixed(x)
        self.last = y
        if self.choices["buffer"]:
            self.calls += 1
        return {"triple": (y, None, None), "pair": (y, None), "dict": {"y": y}, "list": [y], "tensor": y}[
            self.choices["returns"]
        ]


class Alone(Made):
    def forward(self, x: Tensor) -> Any:
        return self.finish(x)


class Cached(Made):
    def forward(self, hidden_states: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        return self.finish(hidden_states)


class Needy(Made):
    def forward(self, x: Tensor, position_embeddings: Tensor) -> Any:
        return self.finish(x)


def build(choices: dict[str, Any]) -> Made:
    kind = Needy if choices["needs"] else Cached if choices["returns"] == "triple" else Alone
    layer = kind(choices)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def choose(others: dict[str, tuple[Any, ...]]) -> tuple[dict[str, Any], bool]:
    """Up to three choices besides the plain ones, and whether they make plain linear attention."""
    choices, served = dict(PLAIN), True
    for name in random.sample(sorted(others), random.randrange(4)):
        choices[name] = random.choice(others[name])
        served = served and choices[name] in SERVED.get(name, ())
    return choices, served


def first(y: Any) -> Tensor:
    y = y[0] if isinstance(y, tuple | list) else y
    return y["y"] if isinstance(y, dict) else y


def test_layers_are_refused_or_unchanged() -> None:
    seed = time.time_ns() % 2**31
    print(f"seed {seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    outcomes = {True: 0, False: 0}
    stop = time.monotonic() + 4
    for number in range(60):
        if number >= 12 and time.monotonic() > stop:
            break
        choices, plain = choose(SERVED if number % 3 == 0 else OTHERS)
        dtype = random.choice((torch.float32, torch.float64, torch.bfloat16))
        other, made = build(PLAIN), build(choices)
        model = nn.Sequential(other, made).to(dtype).train(random.random() < 0.5)
        x = torch.randn(2, random.randrange(1, 40), D, dtype=dtype)
        extra = {"position_embeddings": x} if choices["needs"] else {}

        def run(made: Made = made, x: Tensor = x, extra: dict[str, Any] = extra) -> Tensor:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                return first(made(x, **extra))

        before = run()
        state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
        kept, last = {name: t.clone() for name, t in model.state_dict().items()}, made.last
        try:
            attached = attach_memory_caching(model, 64)
        except ArgumentError as error:
            assert not plain, f"{choices} {dtype}: {error}"
            assert "\n" not in str(error) and "forward" not in other.__dict__  # all or none
            taken = False
        else:
            taken = True
            after = run()
            tolerance = {torch.bfloat16: 6e-2, torch.float32: 1e-3}.get(dtype, 1e-6) * float(before.abs().max())
            assert float((after - before).abs().max()) <= tolerance, f"{choices} {dtype}"
            attached.detach()
        outcomes[taken] += 1
        assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
        assert made.last is last and all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    print(outcomes)
    assert outcomes[True] > 3


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"mixing": "softmax"}, "would change within one segment: its output by"),
        ({"mixing": "decay"}, "would change within one segment: its output by"),
        ({"dropout": 0.1}, "does in training what it does not in eval mode"),
        ({"needs": True}, "cannot be run on hidden states .* alone .TypeError: .*position_embeddings.*check=False"),
        ({"returns": "pair"}, "returns a tuple of 2, and would return the output alone"),
        ({"returns": "dict"}, "returns a dict, and would return"),
        ({"norm": "all heads"}, "cannot be replaced .RuntimeError: "),
    ),
)  # fmt: skip
def test_reasons(change: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(build(PLAIN), build(PLAIN | change))
    with pytest.raises(ArgumentError, match=f"^layer '1', a [A-Z][a-z]+, {message}.*: pass layers= without it"):
        attach_memory_caching(model, 64)
    assert not any("forward" in layer.__dict__ for layer in model)


def test_layers_that_cannot_be_compared() -> None:
    torch.manual_seed(0)
    layer = build(PLAIN)
    nn.init.zeros_(layer.o_proj.weight)
    with pytest.raises(ArgumentError, match=r"gives the same for every token, so that nothing can be compared"):
        attach_memory_caching(nn.Sequential(layer), 64)
    nn.init.constant_(layer.o_proj.weight, torch.nan)
    with pytest.raises(ArgumentError, match="gives values that are not finite"):
        attach_memory_caching(nn.Sequential(layer), 64)
    with torch.device("meta"):
        empty = nn.Sequential(build(PLAIN))
    with pytest.raises(ArgumentError, match="is on the meta device and cannot be run"):
        attach_memory_caching(empty, 64)
    assert attach_memory_caching(empty, 64, check=False).layers == ("0",)
    with pytest.raises(ArgumentError, match="check is a int; it must be True, False or hidden states"):
        attach_memory_caching(empty, 64, check=1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="would change within one segment"):
        attach_memory_caching(nn.Sequential(build(PLAIN | {"mixing": "window"})), 64, check=torch.randn(1, 50, D))


def test_arguments_of_an_attached_layer() -> None:
    """By place and by the layer's own names, as before; what the replacement does not read is refused by name."""
    torch.manual_seed(0)
    model, x = nn.Sequential(build(PLAIN | {"returns": "triple"})), torch.randn(1, 9, D)
    attach_memory_caching(model, 4)
    layer = model[0]
    expected = layer(x)[0]
    assert torch.equal(layer(hidden_states=x, use_cache=False)[0], expected)
    assert torch.equal(layer(x, None, False)[0], expected)
    with pytest.raises(ArgumentError, match="a cache for a layer without layer_idx"):
        layer(x, None, True)
    with pytest.raises(ArgumentError, match=r"position_embeddings=torch.float32 \[1, 9, 24\] is not an argument of"):
        layer(x, position_embeddings=x)
    with pytest.raises(ArgumentError, match="4 arguments by place"):
        layer(x, None, False, None)
    attach_memory_caching(alone := nn.Sequential(build(PLAIN)), 4)
    assert torch.equal(alone[0](x=x), alone(x))
    with pytest.raises(ArgumentError, match=r"x of the forward of a Alone .* must be a tensor, \[B, T, hidden_size\]"):
        alone[0](x[0])


def test_another_replacement_of_the_forward_comes_back() -> None:
    model = nn.Sequential(build(PLAIN))
    model[0].forward = own = model[0].forward
    attach_memory_caching(model, 4).detach()
    assert model[0].__dict__["forward"] is own
