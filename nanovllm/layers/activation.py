"""SwiGLU's gate (arXiv 2002.05202): silu(gate) · up on a packed projection."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.kernels.activation import silu_mul


class SiluAndMul(nn.Module):
    """x [..., 2I], gate half first -> [..., I]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """silu(x[..., :I]) * x[..., I:]."""
        return silu_mul(x)
