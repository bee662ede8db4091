"""Attention in C straight from the pages, without a gather. What "auto" means on a CPU that has a C compiler."""

from __future__ import annotations

from typing import ClassVar

import torch

from nanovllm.kernels import native
from nanovllm.layers.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec


class NativeBackend(AttentionBackend):
    """Float32 on a CPU that has a C compiler."""

    name: ClassVar[str] = "native"

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> list[str]:
        """See `AttentionBackend.why_not`."""
        reasons = []
        if spec.device.type != "cpu":
            reasons.append(f"it is for the CPU, the engine runs on {spec.device.type}")
        if spec.dtype != torch.float32:
            reasons.append(f"it computes in float32, the engine in {str(spec.dtype).removeprefix('torch.')}")
        return reasons + native.why_not_heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)

    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        return native.attention(
            q,
            k_cache,
            v_cache,
            metadata.block_table,
            metadata.query_start,
            metadata.context_lens,
            scale,
            window,
        )
