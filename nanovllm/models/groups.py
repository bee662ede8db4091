"""The RMSNorm→Linear groups of a model: each norm whose output goes into exactly one (packed) linear.

These are the places where one kernel can do both. Known here from the architecture alone, so that a model can be
inspected before its weights are there.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.config import ModelConfig


@dataclass(frozen=True, slots=True)
class NormLinearGroup:
    """`count` times: RMSNorm over k features, then a linear with weight [n, k]."""

    norm: str
    linear: str
    count: int
    n: int
    k: int
    bias: bool
    activation: str | None = None  # what directly follows the linear

    def weight_bytes(self, element_size: int) -> int:
        """Bytes of one group's weight."""
        return self.n * self.k * element_size


def norm_linear_groups(config: ModelConfig) -> list[NormLinearGroup]:
    """All groups of a model, in the order of a forward pass."""
    h, kv = config.hidden_size, config.num_kv_heads * config.head_dim
    qkv = config.num_heads * config.head_dim + 2 * kv
    inner = 2 * config.intermediate_size
    layers = config.num_layers
    return [
        NormLinearGroup("layers.*.input_layernorm", "self_attn.qkv_proj", layers, qkv, h, config.qkv_bias),
        NormLinearGroup(
            "layers.*.post_attention_layernorm", "mlp.gate_up_proj", layers, inner, h, config.mlp_bias, "swiglu"
        ),
        NormLinearGroup("norm", "lm_head", 1, config.vocab_size, h, False),
    ]
