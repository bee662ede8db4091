"""RMSNorm, alone and with the residual addition before it (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.kernels.norm import add_rms_norm, rms_norm
from nanovllm.layers.linear import check_shape
from nanovllm.layers.parallel import Build
from nanovllm.utils import nvtx


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension; statistics in fp32."""

    def __init__(self, size: int, eps: float, build: Build) -> None:
        super().__init__()
        self.eps = eps
        self.weight = build.parameter(size)

    def load(self, name: str, tensor: torch.Tensor, part: int = 0) -> None:
        """Copy the checkpoint's weight [size]."""
        check_shape(name, tuple(self.weight.shape), tuple(tensor.shape))
        self.weight.data.copy_(tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape."""
        return rms_norm(x, self.weight, self.eps)

    @nvtx.ranged(0)
    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual): the residual stream is touched once."""
        return add_rms_norm(x, residual, self.weight, self.eps)
