"""flash-attn (Dao AI Lab) as an optional backend, used only when asked for by name.

Its paged interface wants pages as [num_blocks, block_size, Hkv, D]. It takes strides from the tensor and asks only
that the last dimension be contiguous, so our [num_blocks, Hkv, block_size, D] is passed as a transposed view, no copy.
The CUDA build of flash-attn 2 accepts pages of a multiple of 256 tokens only, while our blocks hold at most 64: of
that release family nothing can be used. FlashAttention-3 (package `flash_attn_interface`, Hopper) takes any page size.
"""

from __future__ import annotations

import importlib.util
from typing import ClassVar

import torch

from nanovllm.layers.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec, cuda_reasons


class FlashAttentionBackend(AttentionBackend):
    """FlashAttention-3 with block tables: one call for the whole step, decodes and chunks alike."""

    name: ClassVar[str] = "flash_attn"

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> list[str]:
        """FlashAttention-3 needs Hopper, half precision and its own package."""
        reasons = cuda_reasons(spec, (9, 0))
        if importlib.util.find_spec("flash_attn_interface") is None:
            reasons.append(
                "FlashAttention-3 (module flash_attn_interface) is not installed, and flash-attn 2 pages hold a "
                f"multiple of 256 tokens, ours {spec.block_size}"
            )
        if spec.dtype not in (torch.bfloat16, torch.float16):
            reasons.append(f"it computes bfloat16 and float16, not {spec.dtype}")
        if spec.head_dim > 256 or spec.head_dim % 8:
            reasons.append(f"head_dim must be a multiple of 8 up to 256, got {spec.head_dim}")
        return reasons

    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.forward`. Causality is aligned to the last key, which is what a chunk needs."""
        from flash_attn_interface import flash_attn_with_kvcache

        return flash_attn_with_kvcache(
            q,
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            cache_seqlens=metadata.context_lens,
            page_table=metadata.block_table,
            cu_seqlens_q=metadata.query_start,
            max_seqlen_q=max(metadata.max_query_len, 1),
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )
