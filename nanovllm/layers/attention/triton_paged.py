"""Our own kernels: paged decode and prefill attention in Triton. The backend "auto" means on CUDA."""

from __future__ import annotations

from typing import ClassVar

import torch

from nanovllm.kernels.decode_attention import decode_attention, plan_decode_attention
from nanovllm.kernels.jit import interpreting, triton_installed
from nanovllm.kernels.prefill_attention import prefill_attention
from nanovllm.layers.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec, cuda_reasons


class TritonBackend(AttentionBackend):
    """Decodes take the split-KV kernel, chunks the tiled one; both read K and V from the pages."""

    name: ClassVar[str] = "triton"
    graph_safe: ClassVar[bool] = True

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> list[str]:
        """CUDA of capability 8.0 (7.5 has no bfloat16, and its tensor cores are untested here), or the interpreter."""
        reasons = [] if triton_installed() else ["the package triton is not installed (pip install triton)"]
        if not interpreting():
            reasons += cuda_reasons(spec, (8, 0))
        elif spec.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter computes bfloat16 wrongly")
        if spec.head_dim > 256 or spec.head_dim % 16:
            reasons.append(f"head_dim must be a multiple of 16 up to 256, got {spec.head_dim}")
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
        """See `AttentionBackend.forward`."""
        out = torch.empty_like(q)
        n = metadata.num_decodes
        table, contexts = metadata.block_table, metadata.context_lens
        if n:
            longest, made = metadata.max_context_len, metadata.scratch
            if ("decodes", window) not in made:
                made["decodes", window] = plan_decode_attention(k_cache, contexts[:n], longest, window)
            decode_attention(
                q[:n], k_cache, v_cache, table[:n], contexts[:n], scale, window, longest, out[:n],
                plan=made["decodes", window],
            )  # fmt: skip
        if n < contexts.shape[0]:
            prefill_attention(
                q, k_cache, v_cache, table[n:], metadata.query_start[n:], contexts[n:],
                metadata.max_query_len, scale, window, out,
            )  # fmt: skip
        return out
