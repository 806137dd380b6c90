"""Packed rows by every name that callers have for them: each document is what it is alone, or the call is refused."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from mctune.runtime.api.attach import attach_memory_caching
from mctune.runtime.api.huggingface import MemoryCachingConfig, MemoryCachingForCausalLM
from mctune.runtime.api.module import MemoryCaching
from mctune.runtime.errors import ArgumentError

WAYS = ("cu_seqlens", "cu_seq_lens", "cu_seqlens_q", "seq_idx", "position_ids", "all")


def named(way: str, lengths: list[int]) -> dict[str, Any]:
    """How a caller says that a row holds sequences of these lengths."""
    T, bounds = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    each = [
        {"cu_seqlens": bounds},
        {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds.clone(), "max_length_q": max(lengths), "max_length_k": T},
        {"cu_seqlens_q": bounds.long(), "max_seqlen_q": max(lengths)},
        {"seq_idx": torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None].int()},
        {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None] + random.choice((0, 2))},
    ]
    return dict(zip(WAYS, each, strict=False)).get(way) or {k: v for one in each for k, v in one.items()}


class Linear(nn.Module):
    """Plain linear attention, for attach_memory_caching."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, hidden_states: Tensor, past_key_values: Any = None) -> Any:
        q, k, v = (p(hidden_states).unflatten(2, (2, 8)) for p in (self.q_proj, self.k_proj, self.v_proj))
        scores = torch.einsum("bthd,bshd->bhts", q, k).tril() * 8**-0.5
        return self.o_proj(torch.einsum("bhts,bshd->bthd", scores, v).flatten(2)), None, past_key_values


def layers() -> list[nn.Module]:
    attached = nn.Sequential(Linear())
    attach_memory_caching(attached, 4)
    return [
        MemoryCaching(16, 2, recurrence="swla", segment_length=4, use_short_conv=True, backend="eager"),
        MemoryCaching(16, 2, aggregation="ssc", segment_length=4, backend="eager"),
        attached[0],
    ]


def test_documents_do_not_see_each_other() -> None:
    seed = time.time_ns() % 2**31
    print(f"seed {seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    for layer in layers():
        for way in WAYS:
            lengths = [random.randrange(1, 12) for _ in range(random.randrange(1, 5))]
            x = torch.randn(1, sum(lengths), 16)
            y = layer(x, **named(way, lengths))[0]
            for found, document in zip(y.split(lengths, 1), x.split(lengths, 1), strict=True):
                torch.testing.assert_close(found, layer(document)[0], msg=f"{way} {lengths}")


def test_rows_of_a_batch_may_each_hold_several() -> None:
    """What numbers tokens can say so of every row; bounds cannot."""
    torch.manual_seed(0)
    x, numbers = torch.randn(2, 7, 16), torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]])
    for layer in layers():
        y = layer(x, position_ids=numbers)[0]
        assert y.shape == x.shape
        for row, cuts in ((0, (3, 4)), (1, (5, 2))):
            for found, document in zip(y[row].split(cuts), x[row].split(cuts), strict=True):
                torch.testing.assert_close(found, layer(document[None])[0][0])
        torch.testing.assert_close(layer(x, position_ids=torch.arange(3, 10)[None])[0], layer(x)[0])
        with pytest.raises(ArgumentError, match="cu_seqlens with B=2"):
            layer(x, cu_seqlens=torch.tensor([0, 7]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"cu_seqlens": [0, 3, 7], "seq_idx": [[0] * 4 + [1] * 3]}, r"different sequences, \[0, 3, 7\] and \[0, 4"),
        ({"cu_seq_lens_q": [0, 3, 7], "cu_seq_lens_k": [0, 7]}, "cu_seq_lens_q and cu_seq_lens_k name different"),
        ({"cu_seq_lens_q": [0, 3, 6]}, "must run from 0 to T=7"),
        ({"cu_seq_lens_k": [[0, 7]]}, r"cu_seq_lens_k is torch.int64 \[1, 2\]; it must be int32 \[S \+ 1\]"),
        ({"cu_seq_lens_q": [0.0, 7.0]}, r"cu_seq_lens_q is torch.float32 \[2\]"),
        ({"seq_idx": [0, 0, 1]}, r"seq_idx is \[3\]; it must be \[B, T\] = \[1, 7\]"),
        ({"position_ids": [0.0] * 7}, "position_ids is torch.float32"),
        ({"position_ids": [0, 1, 2, 5, 6, 7, 8]}, "position_ids jumps by 3 after token 2 of row 0"),
        ({"position_ids": [0, 1, 0, 1, 2, 3, 4], "attention_mask": [[1] * 7]}, r"several sequences in a row"),
        ({"cu_seq_lens_q": [0, 7], "attention_mask": [[1] * 7]}, "attention_mask with cu_seq_lens_q"),
        ({"max_length_q": 3}, "max_length_q=3 with T=7: pass cu_seqlens"),
        ({"initial_state": [0.0]}, "initial_state=.* is not an argument of .*: a memory goes on from past_key_values"),
        ({"output_attentions": True}, "output_attentions=True is not an argument of .*no attention weights"),
        ({"head_first": True}, r"head_first=True .*hidden states are \[B, T, hidden_size\]"),
        ({"is_causal": False}, "is_causal=False"),
        ({"cu_seqlens_cpu": [0, 7]}, "cu_seqlens_cpu=.* is not an argument of .*: it takes attention_mask, past_key"),
    ),
    ids=str,
)  # fmt: skip
def test_refused(arguments: dict[str, Any], message: str) -> None:
    given = {name: torch.tensor(x) if isinstance(x, list) else x for name, x in arguments.items()}
    for layer in layers():
        with pytest.raises(ArgumentError, match=message):
            layer(torch.zeros(1, 7, 16), **given)


def test_what_asks_for_nothing_may_be_passed() -> None:
    for layer in layers():
        x = torch.randn(1, 7, 16)
        nothing = {"output_attentions": False, "initial_state": None, "anything": None, "is_causal": True}
        assert torch.equal(layer(x, **nothing)[0], layer(x)[0])


def model() -> MemoryCachingForCausalLM:
    torch.manual_seed(0)
    config = MemoryCachingConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_heads=2, segment_length=4, backend="eager",
        initializer_range=0.3,
    )  # fmt: skip
    return MemoryCachingForCausalLM(config)


def test_the_flattening_collator_of_transformers() -> None:
    lm = model()
    documents = [torch.randint(3, 31, (n,)).tolist() for n in (5, 1, 9)]
    alone = torch.cat([lm(torch.tensor([line])).logits for line in documents], 1)
    for options in ({}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True, "return_position_ids": False}):
        collate = DataCollatorWithFlattening(**options)
        output = lm(**collate([{"input_ids": line} for line in documents]), output_hidden_states=True)
        torch.testing.assert_close(output.logits, alone)
        assert output.loss.isfinite() and output.hidden_states[0].shape == (1, 15, 16)
    pairs = torch.tensor([documents[0] + documents[2], documents[2] + documents[0]])
    numbers = torch.tensor([[*range(5), *range(9)], [*range(9), *range(5)]])
    logits = lm(pairs, position_ids=numbers, output_attentions=False).logits
    torch.testing.assert_close(logits[:1], torch.cat([alone[:, :5], alone[:, 6:]], 1))
    torch.testing.assert_close(logits[1:], torch.cat([alone[:, 6:], alone[:, :5]], 1))


def test_the_model_refuses_what_it_does_not_read() -> None:
    lm, tokens = model(), torch.randint(3, 31, (1, 7))
    for name, value in (("token_type_ids", tokens), ("output_attentions", True), ("logits_processor", [1])):
        with pytest.raises(ArgumentError, match=f"{name}=.* is not an argument of MemoryCachingModel.forward"):
            lm(tokens, **{name: value})
    half, full = (lm(tokens, labels=tokens, num_items_in_batch=torch.tensor(n)).loss for n in (12, 6))
    torch.testing.assert_close(2 * half, full)
    shifted = lm(tokens, shift_labels=tokens.roll(-1, 1).index_fill(1, torch.tensor([6]), -100)).loss
    torch.testing.assert_close(shifted, lm(tokens, labels=tokens).loss)


def test_fields_of_the_config() -> None:
    """Transformers' own stay; what nothing reads is refused, and the likely name said."""
    for name, near in (
        ("num_key_value_heads", "num_heads"), ("segment_size", "segment_length"), ("top_k", "ssc_top_k"),
        ("rms_norm_eps", "norm_eps"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=f"^{name} is not a field of MemoryCachingConfig.*did you mean {near}"):
            MemoryCachingConfig(**{name: 2})
    with pytest.raises(ArgumentError, match=r"rope_theta is not a field .*; leave it out"):
        MemoryCachingConfig(rope_theta=1e4)
    with pytest.raises(ArgumentError, match="output_attentions=True"):
        MemoryCachingConfig(output_attentions=True)
    config = MemoryCachingConfig(
        num_attention_heads=4, tokenizer_class="X", torch_dtype="float32", num_labels=3, architectures=["A"],
        attn_implementation="eager", name_or_path="here", problem_type=None, output_attentions=False, return_dict=True,
    )  # fmt: skip
    assert config.num_heads == 4 and config.dtype == torch.float32
    assert MemoryCachingConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_masks_in_one_graph() -> None:
    """A graph, which cannot depend on how much is padding, gives what the layer does; other masks fail as it runs."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = MemoryCaching(16, 2, recurrence="swla", segment_length=4, use_short_conv=True, backend="eager")
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths, side in (((11, 7, 0), "left"), ((1, 11, 5), "right"), ((11, 11, 11), "left")):
        mask = torch.stack([torch.arange(11) < n for n in lengths]).long()
        mask = mask.flip(1) if side == "left" else mask
        x = torch.randn(3, 11, 16).masked_fill((mask == 0)[..., None], torch.nan)
        one, two = (x.clone().requires_grad_() for _ in range(2))
        y, expected = graph(one, attention_mask=mask)[0], layer(two, attention_mask=mask)[0]
        torch.testing.assert_close(y, expected)
        wanted = [*layer.parameters()]
        found = torch.autograd.grad(y.square().sum(), [one, *wanted])
        for dx, dy in zip(found, torch.autograd.grad(expected.square().sum(), [two, *wanted]), strict=True):
            torch.testing.assert_close(dx, dy, rtol=1e-4, atol=1e-4)
    for bad, message in ((-mask, "values besides 0 and 1"), (mask.index_fill(1, torch.tensor([4]), 0), "between")):
        with pytest.raises(RuntimeError, match=message):
            graph(x, attention_mask=bad)
    lm = model()
    tokens = torch.randint(3, 31, (3, 11))
    mask[1, :5] = 0
    output = torch.compile(lm, fullgraph=True, backend="eager")(tokens, attention_mask=mask, labels=tokens)
    torch.testing.assert_close(output.logits, lm(tokens, attention_mask=mask).logits)
    torch._dynamo.reset()
