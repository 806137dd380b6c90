"""A causal language model of ``MemoryCaching`` layers for Hugging Face transformers, which is an extra."""

from __future__ import annotations

from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from ..cache.cache import MemoryCache
from ..copies import own, package_of
from ..errors import ArgumentError
from .module import MemoryCaching
from .packing import refuse_rest, take_bounds

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        "the Hugging Face model needs transformers 5: `pip install transformers`, or `pip install mctune[hf]`"
    ) from error

Tensor = torch.Tensor


class MemoryCachingConfig(PreTrainedConfig):
    """A model's options: those of :class:`MemoryCaching`, of the same names, and of the model around its layers.

    Attributes:
        ssc_top_k: the layers' ``top_k``; that name is an option of sampling.
        intermediate_size: width inside the SwiGLU MLPs; ``None`` is 8/3 of hidden_size, up to a multiple of 32.
        initializer_range: standard deviation of the embedding's and the MLPs' first weights.
        use_cache: whether calls outside training hand out a cache unless told otherwise.

    Raises:
        ArgumentError: on a name that is neither an option here nor one of transformers' own.

    Examples:
        >>> config = MemoryCachingConfig(hidden_size=256, num_heads=4, aggregation="ssc", ssc_top_k=4)
        >>> config.intermediate_size
        704
    """

    model_type = "memory_caching"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {"num_attention_heads": "num_heads"}  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_heads: int = 8
    head_dim: int | None = None
    expand_v: float = 1.0
    recurrence: str = "linear"
    aggregation: str = "grm"
    segment_length: int = 256
    state_init: str = "independent"
    ssc_top_k: int = 2
    inner_chunk: int = 16
    expansion: int = 4
    memory_residual: bool = True
    connector: bool = True
    feature_map: str | None = None
    qk_norm: bool = True
    use_short_conv: bool = True
    conv_size: int = 4
    use_output_gate: bool = True
    norm_eps: float = 1e-5
    backend: str = "auto"
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in kwargs:
            _check_field(name, [*type(self).__dataclass_fields__, *self.attribute_map])
        if kwargs.get("output_attentions"):
            raise ArgumentError("output_attentions=True: a memory has no attention weights; leave it out")
        if self.intermediate_size is None:
            self.intermediate_size = 32 * -(-self.hidden_size // 12)
        super().__post_init__(**kwargs)


_TRANSFORMERS = (
    # What transformers 5 reads or writes besides its dataclass's fields, and what its earlier versions had as fields.
    "model_type", "name_or_path", "torch_dtype", "num_labels", "output_attentions", "attn_implementation",
    "experts_implementation", "per_layer_config", "quantization_config", "auto_map", "custom_pipelines",
    "use_return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss", "pruned_heads", "finetuning_task",
    "task_specific_params", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id", "is_decoder",
    "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder", "tie_last_hidden_states",
)  # fmt: skip
_TAKES = (
    "input_ids or inputs_embeds, attention_mask, past_key_values, use_cache, labels, cu_seqlens and what else names "
    "the sequences of a packed row"
)
_RENAMED = {"top_k": "ssc_top_k", "n_embd": "hidden_size", "d_model": "hidden_size", "n_layer": "num_hidden_layers"}


def _check_field(name: str, fields: list[str]) -> None:
    """Refuse a field that nothing reads. transformers would keep it, or drop it where it is an option of generate."""
    if name.startswith("_") or name in (*_TRANSFORMERS, *fields):
        return
    near = [_RENAMED[name]] if name in _RENAMED else get_close_matches(name, fields, 1)
    remedy = f"did you mean {near[0]}?" if near else "leave it out"
    raise ArgumentError(f"{name} is not a field of MemoryCachingConfig, nothing would read it; {remedy}")


_MIXER = (
    "hidden_size", "num_heads", "head_dim", "expand_v", "recurrence", "aggregation", "segment_length", "state_init",
    "inner_chunk", "expansion", "memory_residual", "connector", "feature_map", "qk_norm", "use_short_conv",
    "conv_size", "use_output_gate", "norm_eps", "backend",
)  # fmt: skip


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] to the same."""
        y: Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class MemoryCachingBlock(GradientCheckpointingLayer):
    """A token mixer and an MLP, each after an RMS norm and beside a residual path."""

    def __init__(self, config: MemoryCachingConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        options = {name: getattr(config, name) for name in _MIXER}
        self.mixer = MemoryCaching(**options, top_k=config.ssc_top_k, layer_idx=layer_idx)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`MemoryCaching.forward`, the output alone."""
        x = self.mixer_norm(hidden_states)
        y = self.mixer(x, attention_mask=attention_mask, past_key_values=past_key_values, cu_seqlens=cu_seqlens)[0]
        hidden_states = hidden_states + y
        out: Tensor = hidden_states + self.mlp(self.mlp_norm(hidden_states))
        return out


class MemoryCachingPreTrainedModel(PreTrainedModel):
    """What the models share: how weights start, and what transformers may do with them."""

    config_class = MemoryCachingConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MemoryCachingBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    # Assisted generation takes tokens back in ways that a MemoryCache does not support.
    _is_stateful = True

    @classmethod
    def is_custom_code(cls) -> bool:
        """``False``: weights start through ``torch.nn.init``, which transformers keeps off those that were loaded.

        For custom code it skips modules without parameters of their own, and :class:`MemoryCaching` may be one.
        """
        return False

    def _init_weights(self, module: nn.Module) -> None:
        # Called after the children, so that the layer's own initialisation stays.
        if package_of(MemoryCaching, module) is not None:
            layer: Any = module
            layer.reset_parameters()
        else:
            super()._init_weights(module)


class MemoryCachingModel(MemoryCachingPreTrainedModel):
    """Tokens in, hidden states out.

    Examples:
        >>> config = MemoryCachingConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_heads=2)
        >>> MemoryCachingModel(config)(torch.tensor([[1, 7, 9]])).last_hidden_state.shape
        torch.Size([1, 3, 32])
    """

    def __init__(self, config: MemoryCachingConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MemoryCachingBlock(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states after the last norm, and the cache.

        Args:
            input_ids: int64 [B, T], or ``inputs_embeds``, [B, T, hidden_size].
            attention_mask: [B, T], 0 at padding, or with a cache also [B, all tokens].
            past_key_values: a :class:`MemoryCache`, which goes on.
            use_cache: whether to start a cache if there is none. ``None`` is ``config.use_cache`` where no gradient is
                wanted and the padding, on the left, allows it.
            cu_seqlens: int32 [S + 1], bounds of the sequences of a packed row (B = 1).
            output_hidden_states: whether to return what enters each block, and the output.
            return_dict: ``False`` returns a tuple.
            kwargs: what transformers' flattening collator adds, the same as ``cu_seqlens``: ``cu_seq_lens_q`` and
                ``cu_seq_lens_k``, ``seq_idx`` [B, T], ``position_ids`` [B, T] that start again with every sequence.
                What asks for nothing (``None``, ``False``) may be passed too; all else is refused.

        Returns:
            ``BaseModelOutputWithPast``: hidden states, [B, T, hidden_size], and the cache.

        Raises:
            ArgumentError: unless exactly one input is given, and as :meth:`MemoryCaching.forward` does.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ArgumentError("input_ids and inputs_embeds: pass exactly one of them")
        x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        shape = x.shape
        # A graph cannot depend on what a mask holds.
        traced = torch.compiler.is_compiling()
        if not traced and attention_mask is not None and attention_mask.shape == shape[:2] and attention_mask.all():
            attention_mask = None
        bounds = take_bounds(kwargs, (shape[0], shape[1]), cu_seqlens, attention_mask)
        refuse_rest(f"{type(self).__name__}.forward", kwargs, _TAKES)
        if bounds is not None:
            x = x.reshape(1, -1, shape[2])
        if past_key_values is None:
            if use_cache is None:
                right = traced or (attention_mask is not None and not bool(attention_mask[:, -1].all()))
                use_cache = self.config.use_cache and not torch.is_grad_enabled() and not right
            past_key_values = MemoryCache() if use_cache else None
        every = [x]
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask, past_key_values=past_key_values, cu_seqlens=bounds)
            every.append(x)
        x = self.norm(x).view(shape)
        asked = _asked(output_hidden_states, self.config.output_hidden_states)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*(y.view(shape) for y in every[:-1]), x) if asked else None,
        )
        return output if _asked(return_dict, self.config.return_dict) else output.to_tuple()


class MemoryCachingForCausalLM(MemoryCachingPreTrainedModel, GenerationMixin):
    """Logits of the next token; ``generate`` keeps a :class:`MemoryCache`.

    Examples:
        >>> config = MemoryCachingConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_heads=2)
        >>> model = MemoryCachingForCausalLM(config)
        >>> model.generate(torch.tensor([[1, 7, 9]]), max_new_tokens=4, min_new_tokens=4, do_sample=False).shape
        torch.Size([1, 7])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MemoryCachingConfig) -> None:
        super().__init__(config)
        self.model = MemoryCachingModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As :meth:`MemoryCachingModel.forward`, and logits, [B, T, vocab_size].

        Args:
            input_ids, attention_mask, past_key_values, inputs_embeds: as there.
            use_cache, cu_seqlens, output_hidden_states, return_dict: as there.
            labels: int64 [B, T], for the loss: token t + 1 is what position t should predict; -100 is left out.
            logits_to_keep: how many of the newest tokens get logits, or their positions, int64; 0 is all.
            kwargs: as there, and what ``loss_function`` takes, such as ``num_items_in_batch``.

        Returns:
            ``CausalLMOutputWithPast``: logits, [B, T, vocab_size], the loss if there are labels, and the cache.
        """
        for_loss = self._take_for_loss(kwargs) if kwargs else {}
        inner = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            False if labels is not None and use_cache is None else use_cache,
            cu_seqlens,
            output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(inner.last_hidden_state[:, places])
        loss = None
        if labels is not None or for_loss.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=inner.past_key_values, hidden_states=inner.hidden_states
        )
        return output if _asked(return_dict, self.config.return_dict) else output.to_tuple()

    def _take_for_loss(self, given: dict[str, Any]) -> dict[str, Any]:
        """Those of the arguments that the loss takes besides what it always gets, taken out."""
        names = set(signature(self.loss_function).parameters) - {"logits", "labels", "vocab_size"}
        return {name: given.pop(name) for name in names & set(given)}

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Called by ``generate``: the cache that is given, or a new one."""
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            own("past_key_values", cache, MemoryCache)
        if generation_config.cache_implementation is not None:
            raise ArgumentError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model's cache is a "
                "MemoryCache; leave it out, or pass one as past_key_values"
            )
        if cache is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = MemoryCache()

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        """Called by ``generate``: whether to compile the forward. Never: the cache grows."""
        return False


def _asked(argument: bool | None, default: bool) -> bool:
    return default if argument is None else argument


AutoConfig.register(MemoryCachingConfig.model_type, MemoryCachingConfig, exist_ok=True)
AutoModel.register(MemoryCachingConfig, MemoryCachingModel, exist_ok=True)
AutoModelForCausalLM.register(MemoryCachingConfig, MemoryCachingForCausalLM, exist_ok=True)
