"""FlashInfer as an optional backend, used only when asked for by name.

Its "HND" layout, [num_blocks, Hkv, block_size, D] for K and for V, is ours. FlashInfer plans a step on the host and
then runs every layer with that plan; the plan is made at the step's first layer and kept in the metadata's scratch.
Chunks and decodes go through the one prefill wrapper, which takes any query length.
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

import torch

from nanovllm.layers.attention.backend import AttentionBackend, AttentionMetadata, AttentionSpec, cuda_reasons

_WORKSPACE_BYTES = 128 * 1024 * 1024  # the size FlashInfer's documentation recommends


class FlashInferBackend(AttentionBackend):
    """`BatchPrefillWithPagedKVCacheWrapper` over our pages."""

    name: ClassVar[str] = "flashinfer"

    def __init__(self) -> None:
        self._wrappers: dict[int | None, Any] = {}  # by window; a wrapper keeps its own plan

    @classmethod
    def why_not(cls, spec: AttentionSpec) -> list[str]:
        """FlashInfer needs Ampere, half precision, a head size it was built for, and its package."""
        reasons = cuda_reasons(spec, (8, 0))
        if importlib.util.find_spec("flashinfer") is None:
            reasons.append("the package flashinfer is not installed (pip install flashinfer-python)")
        if spec.dtype not in (torch.bfloat16, torch.float16):
            reasons.append(f"it computes bfloat16 and float16, not {spec.dtype}")
        if spec.head_dim not in (64, 128, 256):
            reasons.append(f"head_dim must be 64, 128 or 256, got {spec.head_dim}")
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
        key = ("flashinfer", window)
        if key not in metadata.scratch:
            metadata.scratch[key] = self._plan(q, k_cache, metadata, scale, window)
        return metadata.scratch[key].run(q, (k_cache, v_cache))

    def _plan(
        self, q: torch.Tensor, k_cache: torch.Tensor, metadata: AttentionMetadata, scale: float, window: int | None
    ) -> Any:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        if window not in self._wrappers:
            workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
            self._wrappers[window] = BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper = self._wrappers[window]
        _, kv_heads, page, dim = k_cache.shape
        pages = (metadata.context_lens + page - 1) // page
        held = torch.arange(metadata.block_table.shape[1], device=q.device) < pages[:, None]
        indptr = torch.zeros(pages.shape[0] + 1, dtype=torch.int32, device=q.device)
        indptr[1:] = pages.cumsum(0)
        wrapper.plan(
            metadata.query_start,
            indptr,
            metadata.block_table[held],
            (metadata.context_lens - 1) % page + 1,
            q.shape[1],
            kv_heads,
            dim,
            page,
            causal=True,
            sm_scale=scale,
            window_left=-1 if window is None else window - 1,
            q_data_type=q.dtype,
            kv_data_type=k_cache.dtype,
        )
        return wrapper
