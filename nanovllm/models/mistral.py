"""Mistral (arXiv 2310.06825): Llama whose attention looks back on a window of tokens."""

from __future__ import annotations

from nanovllm.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral: `ModelConfig.sliding_windows` holds the window that each layer's attention gets."""
