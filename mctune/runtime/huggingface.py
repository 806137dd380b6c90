"""Where the Hugging Face model was before: scripts that import it from here go on working."""

from __future__ import annotations

from .api.huggingface import MemoryCachingConfig, MemoryCachingForCausalLM, MemoryCachingModel

__all__ = ["MemoryCachingConfig", "MemoryCachingForCausalLM", "MemoryCachingModel"]
