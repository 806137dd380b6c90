"""The Hugging Face model (`pip install mctune[hf]`), in a place that stays; importing it needs transformers 5."""

from __future__ import annotations

from mctune.runtime.api.huggingface import MemoryCachingConfig, MemoryCachingForCausalLM, MemoryCachingModel

__all__ = ["MemoryCachingConfig", "MemoryCachingForCausalLM", "MemoryCachingModel"]
