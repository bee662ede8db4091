"""Two kernels that are wrong on purpose: a sanitizer that reports nothing of them sees nothing at all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def out_of_bounds_kernel(x, BLOCK: tl.constexpr):
    """x: [BLOCK] int32; writes to the BLOCK elements behind it."""
    tl.store(x + BLOCK + tl.arange(0, BLOCK), 1)


@triton.jit
def race_kernel(x, BLOCK: tl.constexpr):
    """All threads write one word of shared memory and read it again, without a barrier. x: [BLOCK] int32."""
    lane = tl.arange(0, BLOCK)
    read = tl.inline_asm_elementwise(
        "{ .shared .align 4 .b32 cell; st.shared.b32 [cell], $1; ld.shared.b32 $0, [cell]; }",
        "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(x + lane, read)


FAULTS = {"memcheck": out_of_bounds_kernel, "racecheck": race_kernel}


def run(tool: str) -> None:
    """Run the kernel that `tool` must report."""
    x = torch.zeros(128, dtype=torch.int32).to("cuda")
    FAULTS[tool][(1,)](x, BLOCK=128, num_warps=4)
    torch.cuda.synchronize()
