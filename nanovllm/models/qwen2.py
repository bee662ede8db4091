"""Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on q, k and v, which `ModelConfig.qkv_bias` carries."""

from __future__ import annotations

from nanovllm.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Qwen2: nothing but the bias differs; sliding windows, where a config asks for them, are per layer."""
