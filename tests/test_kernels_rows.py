"""Row-wise kernels against float64: norms, SwiGLU, rotary embedding with the KV store."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import judge, norm_weight, outliers, tiers

from nanovllm.kernels.activation import rms_silu_mul, silu_mul
from nanovllm.kernels.kv_cache import store_kv
from nanovllm.kernels.norm import add_rms_norm, rms_norm
from nanovllm.kernels.rope import qk_norm_rope_store

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS = 1e-6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def truth_norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    x = x.double().cpu()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (1 if weight is None else weight.double().cpu())


def torch_norm(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The eager code of Hugging Face's models."""
    wide = x.float()
    return (1 if weight is None else weight) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(
        x.dtype
    )


@tiers(small=[(1, 64), (3, 100), (2, 1024)], large=[(1, 576), (130, 1000), (33, 4096), (5, 8192)])
def test_rms_norm(device: str, dtype: torch.dtype, case: tuple[int, int]) -> None:
    x, weight = outliers(*case, dtype=dtype, device=device), norm_weight(case[1], dtype, device)
    x[-1] *= 1e-5  # so small that eps decides
    if case[0] > 2:
        x[1] = 0
    for gamma in (weight, None):
        judge(rms_norm(x, gamma, EPS), truth_norm(x, gamma), torch_norm(x, gamma))


@tiers(small=[(3, 100)], large=[(130, 1024), (7, 5120)])
def test_rms_norm_of_strided_rows(device: str, dtype: torch.dtype, case: tuple[int, int]) -> None:
    rows, width = case
    x = outliers(rows, 2, width + 8, dtype=dtype, device=device)[:, 1, :width]
    weight = norm_weight(width, dtype, device)
    judge(rms_norm(x, weight, EPS), truth_norm(x, weight), torch_norm(x, weight))


@tiers(small=[(1, 64), (3, 100)], large=[(130, 1024), (33, 4096)])
def test_add_rms_norm(device: str, dtype: torch.dtype, case: tuple[int, int]) -> None:
    x, residual = (outliers(*case, dtype=dtype, device=device) for _ in range(2))
    kept = residual.clone()
    weight = norm_weight(case[1], dtype, device)
    y, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)  # one rounding, the residual stream's own
    assert torch.equal(residual, kept)
    judge(y, truth_norm(x + residual, weight), torch_norm(x + residual, weight))


@tiers(small=[(1, 64), (2, 3, 50)], large=[(130, 3072), (2, 9, 1000)])
def test_silu_mul(device: str, dtype: torch.dtype, case: tuple[int, ...]) -> None:
    x = outliers(*case[:-1], 2 * case[-1], dtype=dtype, device=device)
    gate, up = x.chunk(2, dim=-1)
    wide = gate.double().cpu()
    truth = wide * torch.sigmoid(wide) * up.double().cpu()
    judge(silu_mul(x), truth, torch.nn.functional.silu(gate) * up)


# (rows, K, I, bias); in the interpreter the last one has two blocks a program, and one for the third program
RMS_SILU = [(1, 64, 50, False), (3, 100, 1100, True), (26, 40, 4200, True)]
RMS_SILU_LARGE = [(130, 1024, 3072, False), (4, 5000, 1000, True), (2100, 576, 1536, True)]


@tiers(small=RMS_SILU, large=RMS_SILU_LARGE)
def test_rms_silu_mul(device: str, dtype: torch.dtype, case: tuple[int, int, int, bool]) -> None:
    """Products of rows that no norm has scaled: the scale is made up for. Strided rows of both."""
    rows, k, width, with_bias = case
    x = outliers(rows, k + 8, dtype=dtype, device=device)[:, :k]
    if rows > 2:
        x[1], x[2] = 0, x[2] * 1e-5  # so small that eps decides
    scale = (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    y = torch.randn(rows, 2 * width + 8).to(device) * scale  # as large as x, outliers and all
    y = y.to(dtype)[:, : 2 * width]
    bias = torch.randn(2 * width).to(dtype).to(device) if with_bias else None
    normed = y.double() / scale + (0 if bias is None else bias.double())
    gate, up = normed.cpu().chunk(2, dim=-1)
    rounded_gate, rounded_up = normed.to(dtype).chunk(2, dim=-1)
    judge(rms_silu_mul(y, x, EPS, bias), gate * torch.sigmoid(gate) * up, F.silu(rounded_gate) * rounded_up)


def test_rms_silu_mul_wants_rows_that_match() -> None:
    with pytest.raises(ValueError, match="for the rows of x"):
        rms_silu_mul(torch.ones(2, 8), torch.ones(3, 4), EPS)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_rows(device: str) -> None:
    x, weight = torch.zeros(0, 64, device=device), torch.ones(64, device=device)
    assert rms_norm(x, weight, EPS).shape == (0, 64)
    assert add_rms_norm(x, x, weight, EPS)[1].shape == (0, 64)
    assert silu_mul(x).shape == rms_silu_mul(x, x, EPS).shape == (0, 32)


def cache_pair(blocks: int, heads: int, page: int, dim: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """K and V caches filled with -7, views of one allocation so that the block stride is not theirs alone."""
    both = torch.full((blocks, 2, heads, page, dim), -7.0, dtype=dtype, device=device)
    return [both[:, 0], both[:, 1]]


def check_stored(cache: torch.Tensor, rows: torch.Tensor, slots: list[int]) -> None:
    """Slots hold their rows bit for bit (rows: [T, Hkv, D]) and everything else is untouched."""
    page = cache.shape[2]
    expected = torch.full_like(cache.contiguous(), -7.0)
    for row, slot in zip(rows, slots, strict=True):
        if slot >= 0:
            expected[slot // page, :, slot % page] = row
    assert torch.equal(cache, expected)


# (tokens, q_heads, kv_heads, head_dim, page, with q/k norm)
ROPE_SMALL = [(5, 4, 2, 64, 4, True), (3, 3, 1, 80, 8, False), (2, 9, 3, 32, 4, True)]
ROPE_LARGE = [
    (1, 16, 8, 128, 32, True),
    (300, 32, 8, 64, 16, False),
    (77, 8, 8, 96, 64, True),
    (40, 14, 2, 64, 32, False),
]


def truth_rope(
    x: torch.Tensor, weight: torch.Tensor | None, table: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """x: [T, H, D] -> float64; the rotation as complex numbers, so that no code is shared with the kernels."""
    wide = x.double().cpu() if weight is None else truth_norm(x, weight)
    half = wide.shape[-1] // 2
    angle = table.double().cpu()[positions.cpu()][:, None]
    turned = torch.complex(wide[..., :half], wide[..., half:]) * torch.complex(angle[..., :half], angle[..., half:])
    return torch.cat((turned.real, turned.imag), dim=-1)


def torch_rope(
    x: torch.Tensor, weight: torch.Tensor | None, table: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Hugging Face's order: the table is rounded to x's dtype, the rotation computed in it."""
    x = x if weight is None else torch_norm(x, weight)
    cos, sin = (t.repeat(1, 1, 2) for t in table.to(x.dtype)[positions][:, None].chunk(2, dim=-1))
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


@tiers(small=ROPE_SMALL, large=ROPE_LARGE)
def test_qk_norm_rope_store(device: str, dtype: torch.dtype, case: tuple[int, int, int, int, int, bool]) -> None:
    tokens, q_heads, kv_heads, dim, page, with_norm = case
    width = (q_heads + 2 * kv_heads) * dim
    qkv = torch.randn(tokens, width + 16).to(dtype).to(device)[:, :width]  # strided rows
    q_weight, k_weight = (norm_weight(dim, dtype, device) if with_norm else None for _ in range(2))
    angle = torch.rand(200, dim // 2) * 6.28
    table = torch.cat((angle.cos(), angle.sin()), dim=-1).to(device)
    positions = torch.randint(0, 200, (tokens,)).to(device)
    blocks = tokens // page + 2
    slots = torch.randperm(blocks * page)[:tokens]
    slots[tokens // 2] = -1
    k_cache, v_cache = cache_pair(blocks, kv_heads, page, dim, dtype, device)
    q = qk_norm_rope_store(qkv, q_weight, k_weight, EPS, table, positions, k_cache, v_cache, slots.to(device))

    heads = qkv.reshape(tokens, -1, dim)
    source_q, source_k, source_v = heads.split([q_heads, kv_heads, kv_heads], dim=1)
    args = (table, positions)
    judge(q, truth_rope(source_q, q_weight, *args), torch_rope(source_q, q_weight, *args))
    kept = slots >= 0
    stored = k_cache[(slots // page)[kept], :, (slots % page)[kept]]
    truth, same_dtype = truth_rope(source_k, k_weight, *args)[kept], torch_rope(source_k, k_weight, *args).cpu()[kept]
    if bool(kept.any()):
        judge(stored.cpu(), truth, same_dtype)
    filled = torch.full_like(source_k, -7.0)
    filled[kept] = stored
    check_stored(k_cache, filled, slots.tolist())
    check_stored(v_cache, source_v, slots.tolist())


@tiers(small=[(5, 2, 64, 4), (1, 3, 80, 8)], large=[(1000, 8, 128, 32), (3, 1, 96, 64)])
def test_store_kv(device: str, dtype: torch.dtype, case: tuple[int, int, int, int]) -> None:
    tokens, heads, dim, page = case
    rows = torch.randn(tokens, 2, heads, dim).to(dtype).to(device)
    k, v = rows[:, 0], rows[:, 1]  # strided rows
    blocks = tokens // page + 2
    slots = torch.randperm(blocks * page)[:tokens]
    slots[-1] = -1
    k_cache, v_cache = cache_pair(blocks, heads, page, dim, dtype, device)
    store_kv(k, v, k_cache, v_cache, slots.to(device))
    check_stored(k_cache, k, slots.tolist())
    check_stored(v_cache, v, slots.tolist())
