"""Fuse RMSNorm→Linear, with SwiGLU behind it, in models that are not ours: any `nn.Module`, say Hugging Face's.

    from nanovllm.fusion import fuse, report

    groups = fuse(model)     # in place; leaves alone what it cannot prove, with reasons
    print(report(model))     # patterns, shapes, bytes saved in theory
    unfuse(model)            # as it was

What is not here: the engine's own models, which are built from fused layers.
"""

from __future__ import annotations

from nanovllm.fusion.apply import fuse, unfuse
from nanovllm.fusion.detect import Group, detect
from nanovllm.fusion.gate import Gate
from nanovllm.fusion.report import Pattern, Report, report

__all__ = ["Gate", "Group", "Pattern", "Report", "detect", "fuse", "report", "unfuse"]
