"""The fused q/k-norm + RoPE + append + decode attention against float64, and against the kernels that it replaces."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import Paged, attention_truth, judge, norm_weight, tiers
from test_kernels_rows import torch_rope, truth_rope

from nanovllm.kernels.decode_attention import decode_attention
from nanovllm.kernels.launch_config import DecodeConfig
from nanovllm.kernels.rope import qk_norm_rope_store
from nanovllm.kernels.rope_attention import rope_attention
from nanovllm.kernels.split_plan import plan_splits

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS = 1e-6


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


class Case:
    """Sequences whose caches hold all tokens but the newest, and a QKV row for that one."""

    def __init__(
        self, device: str, dtype: torch.dtype, contexts: list[int], q_heads: int, kv_heads: int, dim: int, page: int,
        window: int | None, with_norm: bool,
    ) -> None:  # fmt: skip
        oldest = None if window is None else [max(c - window, 0) for c in contexts]
        self.contexts, self.page, self.window, self.scale = contexts, page, window, dim**-0.5
        self.paged = Paged.build(contexts, kv_heads, dim, page, dtype, device, oldest)
        for i, context in enumerate(contexts):
            if context:  # the newest token's slot is unwritten
                block, offset = self.slot(i)
                self.paged.k_cache[block, :, offset] = self.paged.v_cache[block, :, offset] = float("nan")
        width = (q_heads + 2 * kv_heads) * dim
        self.qkv = torch.randn(len(contexts), width + 16).to(dtype).to(device)[:, :width]  # strided rows
        self.weights = [norm_weight(dim, dtype, device) if with_norm else None for _ in range(2)]
        if with_norm:  # scores of a realistic size
            for weight in self.weights:
                weight.clamp_(max=2.0)
        angle = torch.rand(max(contexts) + 3, dim // 2) * 6
        self.table = torch.cat((angle.cos(), angle.sin()), dim=-1).to(device)
        heads = self.qkv.unflatten(1, (-1, dim))
        self.parts = heads.split([q_heads, kv_heads, kv_heads], dim=1)

    def slot(self, i: int) -> tuple[int, int]:
        position = self.contexts[i] - 1
        return int(self.paged.block_table[i, position // self.page]), position % self.page

    def run(self, config: DecodeConfig | None = None) -> torch.Tensor:
        plan = None if config is None else plan_splits(self.paged.context_lens, config, self.window)
        return rope_attention(
            self.qkv, *self.weights, EPS, self.table, self.paged.k_cache, self.paged.v_cache, self.paged.block_table,
            self.paged.context_lens, self.scale, self.window, plan=plan,
        )  # fmt: skip

    def expected(self, dtype: torch.dtype | None) -> torch.Tensor:
        """Attention in float64 (None) or step by step in `dtype`, a sequence at a time."""
        q, k, v = self.parts
        positions = (self.paged.context_lens.long() - 1).clamp(min=0)
        rotate = truth_rope if dtype is None else torch_rope
        q, k = rotate(q, self.weights[0], self.table, positions), rotate(k, self.weights[1], self.table, positions)
        rows = []
        for i, context in enumerate(self.contexts):
            keys = torch.cat((self.paged.keys[i][: max(context - 1, 0)].to(k), k[i : i + 1]))
            values = torch.cat((self.paged.values[i][: max(context - 1, 0)].to(v), v[i : i + 1]))
            wide = torch.float64 if dtype is None else dtype
            row = attention_truth(q[i : i + 1], keys, values, self.scale, self.window, wide)
            rows.append(row if context else torch.zeros_like(row))
        return torch.cat(rows).flatten(1)


# (contexts, q_heads, kv_heads, head_dim, page, window, with q/k norm); 0 is the padding row of a CUDA graph
SMALL = [
    ([1, 0, 33, 70], 4, 2, 64, 4, None, True),
    ([17, 41], 3, 1, 80, 8, None, False),
    ([5, 65, 31], 2, 2, 128, 16, 20, True),
]
LARGE = [
    ([1, 31, 32, 33, 0, 900, 2000], 16, 8, 128, 32, None, True),
    ([4097, 100, 257], 32, 8, 128, 32, None, True),
    ([700, 64, 65], 9, 3, 64, 16, None, False),
    ([300, 1100, 5], 8, 8, 96, 64, None, True),
    ([300, 1100, 5], 40, 2, 128, 64, 256, False),
    ([90] * 40, 4, 4, 64, 32, None, True),
    ([1500], 14, 2, 64, 32, 1000, False),
    ([30000], 16, 8, 128, 32, None, True),
]


@tiers(small=SMALL, large=LARGE)
def test_rope_attention(device: str, dtype: torch.dtype, case: tuple) -> None:
    made = Case(device, dtype, *case)
    judge(made.run(), made.expected(None), made.expected(dtype))


# Pages smaller and larger than a tile (16 keys, on a GPU 32 too), a window, a padding row, one new token on its own.
FORMS_SMALL = [([1, 0, 16, 17, 49], 4, 2, 32, 8, 20, True), ([1, 0, 16, 17, 49], 4, 2, 32, 32, None, False)]
FORMS_LARGE = [
    ([1, 0, 32, 33, 257, 700, 1500], 16, 8, 128, 16, 300, True),
    ([1, 0, 32, 33, 257, 700, 1500], 16, 8, 128, 256, None, True),
    ([1, 0, 32, 33, 257, 700, 1500], 8, 2, 64, 64, 300, False),
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("num_stages", [1, 3])
@tiers(small=FORMS_SMALL, large=FORMS_LARGE)
def test_forms(device: str, dtype: torch.dtype, case: tuple, num_stages: int, splits: int) -> None:
    """First tile in registers (one stage) or tiles on their way into shared memory, whatever their number."""
    made = Case(device, dtype, *case)
    block_n = 16 if case in FORMS_SMALL else 32
    result = made.run(DecodeConfig(block_n, splits, block_n, num_warps=4, num_stages=num_stages))
    judge(result, made.expected(None), made.expected(dtype))
    assert not result[made.contexts.index(0)].any()


@pytest.mark.parametrize("num_stages", [1, 2])
@tiers(small=[([70, 30, 1], 2, 1, 32, 8, 20, False)], large=[([700, 300, 1], 4, 2, 64, 32, 100, True)])
def test_whole_behind_a_window(device: str, dtype: torch.dtype, case: tuple, num_stages: int) -> None:
    """Sequences of one split among shared slots, whose first tile is not at key 0."""
    made = Case(device, dtype, *case)
    block_n = 16 if case[3] == 32 else 64
    config = DecodeConfig(block_n, 2, 2 * block_n, num_warps=4, num_stages=num_stages)
    judge(made.run(config), made.expected(None), made.expected(dtype))


@pytest.mark.parametrize("splits", [1, 2, 5])
@tiers(small=[SMALL[0], SMALL[2]], large=LARGE[:1])
def test_splits_and_append(device: str, dtype: torch.dtype, case: tuple, splits: int) -> None:
    """Every number of splits agrees; what lands in the cache is what the unfused kernels store, and nothing else."""
    made = Case(device, dtype, *case)
    k_cache, v_cache = made.paged.k_cache.clone(), made.paged.v_cache.clone()
    page = case[4]
    config = DecodeConfig(16, splits, 16, num_warps=4, num_stages=2, spare=0 if splits > 1 else 2)
    first = made.run(config)
    judge(first, made.expected(None), made.expected(dtype))
    slots = [s[0] * page + s[1] if c else -1 for c, s in ((c, made.slot(i)) for i, c in enumerate(made.contexts))]
    positions = (made.paged.context_lens.long() - 1).clamp(min=0)
    slot_mapping = torch.tensor(slots, device=device)
    q = qk_norm_rope_store(made.qkv, *made.weights, EPS, made.table, positions, k_cache, v_cache, slot_mapping)
    torch.testing.assert_close(made.paged.k_cache, k_cache, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(made.paged.v_cache.nan_to_num(7.0), v_cache.nan_to_num(7.0))
    again = made.run(config)  # the newest slot may be written twice
    assert torch.equal(first, again)
    unfused = decode_attention(
        q, k_cache, v_cache, made.paged.block_table, made.paged.context_lens, made.scale, made.window
    )
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(first, unfused.flatten(1), rtol=tolerance, atol=tolerance)


def test_bad_arguments() -> None:
    made = Case("cpu", torch.float32, *SMALL[0])
    made.weights[1] = None
    with pytest.raises(ValueError, match="together"):
        made.run()
