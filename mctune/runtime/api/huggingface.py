"""A causal language model of ``MemoryCaching`` layers for Hugging Face transformers, which is an extra."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from ..cache.cache import MemoryCache
from ..errors import ArgumentError
from .module import MemoryCaching

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
        if self.intermediate_size is None:
            self.intermediate_size = 32 * -(-self.hidden_size // 12)
        super().__post_init__(**kwargs)


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
        if isinstance(module, MemoryCaching):
            module.reset_parameters()
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
            kwargs: ignored.

        Returns:
            ``BaseModelOutputWithPast``: hidden states, [B, T, hidden_size], and the cache.

        Raises:
            ArgumentError: unless exactly one input is given, and as :meth:`MemoryCaching.forward` does.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ArgumentError("input_ids and inputs_embeds: pass exactly one of them")
        x: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and attention_mask.shape == x.shape[:2] and bool(attention_mask.all()):
            attention_mask = None
        if past_key_values is None:
            if use_cache is None:
                right = attention_mask is not None and not bool(attention_mask[:, -1].all())
                use_cache = self.config.use_cache and not torch.is_grad_enabled() and not right
            past_key_values = MemoryCache() if use_cache else None
        every = [x]
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask, past_key_values=past_key_values, cu_seqlens=cu_seqlens)
            every.append(x)
        x = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*every[:-1], x) if _asked(output_hidden_states, self.config.output_hidden_states) else None,
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
            kwargs: for the loss.

        Returns:
            ``CausalLMOutputWithPast``: logits, [B, T, vocab_size], the loss if there are labels, and the cache.
        """
        inner = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            False if labels is not None and use_cache is None else use_cache,
            cu_seqlens,
            output_hidden_states,
            return_dict=True,
        )
        places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(inner.last_hidden_state[:, places])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=inner.past_key_values, hidden_states=inner.hidden_states
        )
        return output if _asked(return_dict, self.config.return_dict) else output.to_tuple()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Called by ``generate``: the cache that is given, or a new one."""
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, MemoryCache):
            raise ArgumentError(f"past_key_values is a {type(cache).__name__}; it must be a MemoryCache")
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
