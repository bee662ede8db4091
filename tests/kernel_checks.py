"""What the kernel tests share: tiers, inputs that can fail, and the rule by which an error is judged.

The truth is computed in float64 by code written here. A result may be off from it by at most twice what PyTorch is
itself off when it computes the same thing in the same dtype, in the maximum and in the mean square. The only slack is
eight float32 units in the last place of the largest value, about 1e-6 of it: the GPU's exp2 alone may be off by two,
and the order of a sum moves the rest. In half precision that is nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def tiers(small: Sequence[Any], large: Sequence[Any]) -> Any:
    """Parametrise (device, dtype, case): reference bodies and the interpreter on `small`, the GPU on both."""
    params = []
    for case in small:
        params += [pytest.param("cpu", dtype, case, id=f"reference-{dtype}-{case}") for dtype in (F32, F16, BF16)]
        params += [
            pytest.param("cpu", dtype, case, id=f"interpret-{dtype}-{case}", marks=pytest.mark.interpret)
            for dtype in (F32, F16)  # the interpreter's bfloat16 is wrong
        ]
    for case in (*small, *large):
        params += [
            pytest.param("cuda", dtype, case, id=f"gpu-{dtype}-{case}", marks=pytest.mark.gpu)
            for dtype in (F32, F16, BF16)
        ]
    return pytest.mark.parametrize(("device", "dtype", "case"), params)


def judge(result: torch.Tensor, truth: torch.Tensor, same_dtype: torch.Tensor) -> None:
    """Assert that `result` is as close to `truth` (float64) as twice the error of `same_dtype`, PyTorch's own."""
    assert result.shape == truth.shape
    assert result.dtype == same_dtype.dtype
    assert bool(torch.isfinite(result).all()), "non-finite values: unwritten output or poisoned input was read"
    ours, theirs = (t.double().cpu() - truth.cpu() for t in (result, same_dtype))
    slack = 8 * torch.finfo(F32).eps * truth.abs().max().item()
    assert ours.abs().max().item() <= 2 * theirs.abs().max().item() + slack
    assert ours.square().mean().sqrt().item() <= 2 * theirs.square().mean().sqrt().item() + slack


def outliers(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Normal values with a few channels a hundred times larger, as in the residual stream of real models."""
    x = torch.randn(*shape)
    x[..., :: max(shape[-1] // 3, 1)] *= 100
    return x.to(dtype).to(device)


def norm_weight(size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Around 1, never all ones; some as large as Qwen3's k_norm."""
    weight = 1 + 0.3 * torch.randn(size)
    weight[::7] = 90.0
    return weight.to(dtype).to(device)


@dataclass
class Paged:
    """A paged cache in which every slot that no sequence owns is NaN, and the sequences in it, in order."""

    k_cache: torch.Tensor  # [num_blocks, Hkv, page, D]
    v_cache: torch.Tensor
    block_table: torch.Tensor  # [B, max_blocks] int32; unused entries name block 0, which is all NaN
    context_lens: torch.Tensor  # [B] int32
    keys: list[torch.Tensor]  # per sequence [context, Hkv, D]
    values: list[torch.Tensor]

    @classmethod
    def build(
        cls, contexts: list[int], kv_heads: int, dim: int, page: int, dtype: torch.dtype, device: str,
        oldest: list[int] | None = None,
    ) -> Paged:  # fmt: skip
        """Random blocks for sequences of the given lengths; pages wholly before `oldest[i]` have been recycled."""
        counts = [-(-length // page) for length in contexts]
        free = iter((torch.randperm(sum(counts)) + 1).tolist())
        shape = (sum(counts) + 1, kv_heads, page, dim)
        k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
        # One column more than needed, and a row stride that is no multiple of 16.
        table = torch.zeros(len(contexts), max(counts) + 1, dtype=torch.int32)
        keys, values = [], []
        for i, length in enumerate(contexts):
            k, v = (torch.randn(length, kv_heads, dim).to(dtype) for _ in range(2))
            for column in range(counts[i]):
                block = next(free)
                if oldest is not None and (column + 1) * page <= oldest[i]:
                    continue
                table[i, column] = block
                for position in range(column * page, min((column + 1) * page, length)):
                    k_cache[block, :, position % page] = k[position]
                    v_cache[block, :, position % page] = v[position]
            keys.append(k)
            values.append(v)
        lengths = torch.tensor(contexts, dtype=torch.int32)
        return cls(*(t.to(device) for t in (k_cache, v_cache, table, lengths)), keys, values)


def attention_truth(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Attention of the last n tokens of one sequence, computed in `dtype` a query and head at a time.

    q: [n, Hq, D]; keys, values: [m, Hkv, D]. float64 gives the truth; a half dtype gives PyTorch's own error.
    """
    n, q_heads, _ = q.shape
    m, kv_heads, _ = keys.shape
    out = torch.zeros(q.shape, dtype=dtype)
    q, keys, values = (t.cpu().to(dtype) for t in (q, keys, values))
    for j in range(n):
        end = m - n + j + 1
        begin = 0 if window is None else max(end - window, 0)
        for h in range(q_heads):
            g = h // (q_heads // kv_heads)
            weights = torch.softmax(keys[begin:end, g] @ q[j, h] * scale, dim=0)
            out[j, h] = weights @ values[begin:end, g]
    return out
