"""What Triton's interpreter is spared computes the same."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def summed(x, y, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    for _ in range(ROUNDS):
        value = doubled(value)
    tl.store(y, tl.sum(value, 0))


@pytest.mark.skipif(not hasattr(interpreter._patch_lang, "always"), reason="this release of Triton patches otherwise")
def test_a_device_function_is_not_patched_again_at_each_call(monkeypatch):
    patched, always = [], interpreter._patch_lang.always

    def counted(fn):
        patched.append(fn.__name__)
        return always(fn)

    monkeypatch.setattr(interpreter._patch_lang, "always", counted)
    x, y = torch.arange(16.0), torch.full((1,), torch.nan)
    for _ in range(2):
        summed[(1,)](x, y, ROUNDS=6, BLOCK=16)
        assert y.item() == 64 * 120
    assert patched.count("summed") == 2, "every launch patches, for the one before has restored"
    assert patched.count("doubled") == 0


def test_nothing_stays_patched_after_a_launch():
    x, y = torch.arange(16.0), torch.full((1,), torch.nan)
    summed[(1,)](x, y, ROUNDS=1, BLOCK=16)
    assert core.is_builtin(tl.load) and core.is_builtin(tl.tensor.__add__)


@triton.jit
def mixed(x, n, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0)
    value = (value * 3 + at.to(tl.int16)) * tl.where(at % 2 == 0, 1, -1)
    tl.store(y + at, value.to(tl.float32) / 2, mask=at < n)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bool])
def test_values_keep_their_types(dtype: torch.dtype):
    n, x = 11, torch.tensor([3, 0, 1, 40, 5, 2, 9, 1, 0, 4, 6]).to(dtype)
    y = torch.full((16,), torch.nan)
    mixed[(1,)](x, n, y, BLOCK=16)
    at = torch.arange(n)
    wanted = (x.double() * 3 + at) * torch.where(at % 2 == 0, 1, -1) / 2
    assert torch.equal(y[:n].double(), wanted) and y[n:].isnan().all()


def test_no_overflow_is_looked_for_where_none_would_be_told(monkeypatch):
    asserted = []
    monkeypatch.setattr(tl.semantic.TritonSemantic, "device_assert", lambda *arguments: asserted.append(arguments))
    y = torch.full((16,), torch.nan)
    mixed[(1,)](torch.arange(16, dtype=torch.int32), 16, y, BLOCK=16)
    assert not interpreter.interpreter_builder.options.debug and not asserted and not y.isnan().any()
