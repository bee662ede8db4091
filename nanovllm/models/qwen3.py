"""Qwen3 (arXiv 2505.09388): Llama with an RMSNorm on every head of q and k before the rotation, and no bias."""

from __future__ import annotations

from nanovllm.config import ModelConfig
from nanovllm.layers.attention.backend import AttentionBackend
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.parallel import Build
from nanovllm.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel


class Qwen3Attention(LlamaAttention):
    """Attention with q and k normalised per head: one weight [head_dim] each, shared by the heads."""

    def __init__(self, config: ModelConfig, layer: int, backend: AttentionBackend, build: Build) -> None:
        super().__init__(config, layer, backend, build)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, build)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, build)


class Qwen3DecoderLayer(LlamaDecoderLayer):
    """A Llama layer with Qwen3's attention."""

    attention_class = Qwen3Attention


class Qwen3Model(LlamaModel):
    """A Llama stack of Qwen3 layers."""

    layer_class = Qwen3DecoderLayer


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Qwen3 dense models."""

    model_class = Qwen3Model
