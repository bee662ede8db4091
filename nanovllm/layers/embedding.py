"""Token embedding and LM head, split by vocabulary rows over the tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm.kernels.cpu_linear import head_linear
from nanovllm.kernels.feed import embed_fed
from nanovllm.layers.linear import check_shape
from nanovllm.layers.parallel import Build


class VocabParallelEmbedding(nn.Module):
    """Rows [rank * V / world, …) of the embedding table; V is padded so that it divides."""

    bias: torch.Tensor | None = None  # as the LM head it is a linear layer without one

    def __init__(self, vocab_size: int, hidden_size: int, build: Build) -> None:
        super().__init__()
        self.tp = build.tp
        self.vocab_size = vocab_size
        self.rows = -(-vocab_size // build.tp.world_size)
        self.first = build.tp.rank * self.rows
        self.weight = build.parameter(self.rows, hidden_size)

    def load(self, name: str, tensor: torch.Tensor, part: int = 0) -> None:
        """Copy this rank's rows of the checkpoint's table [V, hidden]; padding rows become zero."""
        check_shape(name, (self.vocab_size, self.weight.shape[1]), tuple(tensor.shape))
        mine = tensor[self.first : self.first + self.rows]
        self.weight.data[: mine.shape[0]].copy_(mine)
        self.weight.data[mine.shape[0] :].zero_()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] int64 -> [T, hidden]."""
        if self.tp.world_size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.first
        inside = (local >= 0) & (local < self.rows)
        x = F.embedding(local.clamp(0, self.rows - 1), self.weight)
        return self.tp.all_reduce(x * inside.unsqueeze(-1))

    def fed(self, token_ids: torch.Tensor, sampled: torch.Tensor | None) -> torch.Tensor:
        """Like `forward` on one rank, of ids [T] among which -1 - r stands for sampled[r]. One kernel."""
        return self(token_ids) if sampled is None else embed_fed(token_ids, sampled, self.weight)


class LMHead(nn.Module):
    """Hidden states to logits. A tied head reads the embedding's own weight: one tensor, no second copy."""

    def __init__(self, embedding: VocabParallelEmbedding, tied: bool, build: Build) -> None:
        super().__init__()
        self.tp = build.tp
        self.vocab_size = embedding.vocab_size
        self.table = (
            embedding if tied else VocabParallelEmbedding(embedding.vocab_size, embedding.weight.shape[1], build)
        )

    def load(self, name: str, tensor: torch.Tensor, part: int = 0) -> None:
        """Copy the checkpoint's head [V, hidden]."""
        self.table.load(name, tensor, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, hidden] -> logits [R, V] in x's dtype, complete on every rank."""
        return self.tp.all_gather_last(head_linear(x, self.table.weight))[:, : self.vocab_size]
