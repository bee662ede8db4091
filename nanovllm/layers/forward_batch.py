"""What a model's forward takes: the tokens of one step, flattened, with everything attention needs to know."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from nanovllm.layers.attention.backend import AttentionMetadata

# One (k_cache, v_cache) pair a layer, each [num_blocks, num_kv_heads, block_size, head_dim].
KVCaches = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """T tokens of B sequences: decodes (one token each) first, then prefill chunks."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    attention: AttentionMetadata
    logits_rows: torch.Tensor | None  # [R] int64: tokens whose logits are wanted; None = all T of them
    prompt_lens: torch.Tensor | None = None  # [T] int64, only for dynamic NTK beyond the trained context
    sampled: torch.Tensor | None = None  # [R] int64, tokens of the step before: input id -1 - r stands for row r

    def with_all_rows(self) -> ForwardBatch:
        """The same step, asking for the logits of every token."""
        return replace(self, logits_rows=None)
