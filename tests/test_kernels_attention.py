"""Paged attention kernels against float64: decode (split-KV) and prefill (chunks with a prefix)."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import BF16, F16, F32, Paged, attention_truth, judge, tiers

from nanovllm.kernels.decode_attention import decode_attention
from nanovllm.kernels.launch_config import DecodeConfig, PrefillConfig
from nanovllm.kernels.prefill_attention import prefill_attention
from nanovllm.kernels.split_plan import SplitPlan, plan_splits

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def check_decode(
    device: str, dtype: torch.dtype, contexts: list[int], q_heads: int, kv_heads: int, dim: int, page: int,
    window: int | None, config: DecodeConfig | None = None,
) -> None:  # fmt: skip
    oldest = None if window is None else [max(c - window, 0) for c in contexts]
    paged = Paged.build(contexts, kv_heads, dim, page, dtype, device, oldest)
    q = torch.randn(len(contexts), q_heads, dim).to(dtype).to(device)
    scale = dim**-0.5
    plan = None if config is None else plan_splits(paged.context_lens, config, window)
    out = decode_attention(
        q, paged.k_cache, paged.v_cache, paged.block_table, paged.context_lens, scale, window, plan=plan
    )
    truths, rounded = [], []
    for i, context in enumerate(contexts):
        args = (q[i : i + 1], paged.keys[i], paged.values[i], scale, window)
        if context:
            truths.append(attention_truth(*args, torch.float64))
            rounded.append(attention_truth(*args, dtype))
        else:
            truths.append(torch.zeros(1, q_heads, dim, dtype=torch.float64))
            rounded.append(torch.zeros(1, q_heads, dim, dtype=dtype))
    judge(out, torch.cat(truths), torch.cat(rounded))


# (contexts, q_heads, kv_heads, head_dim, page, window); 0 is the padding row of a CUDA graph
DECODE_SMALL = [
    ([1, 0, 33, 70], 4, 2, 64, 4, None),
    ([17, 40], 3, 1, 80, 8, None),
    ([5, 64, 31], 2, 2, 128, 16, 20),
]
DECODE_LARGE = [
    ([1, 31, 32, 33, 0, 900, 2000], 16, 8, 128, 32, None),
    ([4097, 100, 257], 32, 8, 128, 32, None),
    ([700, 64], 9, 3, 64, 16, None),
    ([300, 1100, 5], 8, 8, 96, 64, None),
    ([300, 1100, 5], 40, 2, 128, 64, 256),
    ([90] * 40, 4, 4, 64, 32, None),
    ([1500], 14, 2, 64, 32, 1000),
]


@tiers(small=DECODE_SMALL, large=DECODE_LARGE)
def test_decode_attention(device: str, dtype: torch.dtype, case: tuple) -> None:
    check_decode(device, dtype, *case)


@pytest.mark.parametrize("splits", [1, 2, 5])
@tiers(small=[([1, 0, 33, 70], 4, 2, 64, 4, None), ([50, 64], 2, 2, 64, 16, 20)], large=DECODE_LARGE[:1])
def test_decode_attention_split(device: str, dtype: torch.dtype, case: tuple, splits: int) -> None:
    """Every number of splits, empty ones included, gives the same answer."""
    check_decode(device, dtype, *case, config=DecodeConfig(16, splits, 16, num_warps=4, num_stages=2))


def check_prefill(
    device: str, dtype: torch.dtype, chunks: list[tuple[int, int]], q_heads: int, kv_heads: int, dim: int, page: int,
    window: int | None, config: PrefillConfig | None = None,
) -> None:  # fmt: skip
    """chunks: (query length, context length). Three foreign rows come first, as the decodes of a mixed step do."""
    lengths, contexts = [c[0] for c in chunks], [c[1] for c in chunks]
    oldest = None if window is None else [max(c - n - window + 1, 0) for n, c in chunks]
    paged = Paged.build(contexts, kv_heads, dim, page, dtype, device, oldest)
    start = torch.tensor([0, *lengths]).cumsum(0) + 3
    q = torch.randn(3 + sum(lengths), q_heads, dim).to(dtype).to(device)
    out = torch.full_like(q, 5.0)
    scale = dim**-0.5
    table = torch.cat((paged.block_table[:1], paged.block_table))[1:]  # a view that starts off alignment
    prefill_attention(
        q, paged.k_cache, paged.v_cache, table, start.int().to(device), paged.context_lens, max(lengths), scale,
        window, out, config=config,
    )  # fmt: skip
    assert bool((out[:3] == 5.0).all())
    rows = [q[start[i] : start[i + 1]] for i in range(len(chunks))]
    args = [(rows[i], paged.keys[i], paged.values[i], scale, window) for i in range(len(chunks))]
    truth = torch.cat([attention_truth(*a, torch.float64) for a in args])
    judge(out[3:], truth, torch.cat([attention_truth(*a, dtype) for a in args]))


# (chunks, q_heads, kv_heads, head_dim, page, window)
PREFILL_SMALL = [
    ([(7, 7), (1, 9), (20, 33)], 4, 2, 64, 4, None),
    ([(5, 30), (18, 18)], 3, 1, 80, 8, None),
    ([(40, 64), (3, 50)], 2, 2, 64, 16, 20),
]
PREFILL_LARGE = [
    ([(200, 200), (1, 500), (130, 300)], 16, 8, 128, 32, None),
    ([(129, 129), (64, 700)], 9, 3, 64, 16, None),
    ([(100, 400)], 8, 8, 96, 64, None),
    ([(200, 600), (17, 17)], 8, 2, 128, 32, 100),
    ([(3 + i, 2 * (3 + i)) for i in range(140)], 4, 1, 64, 16, None),  # more chunks than one scan step
]


@tiers(small=PREFILL_SMALL, large=PREFILL_LARGE)
def test_prefill_attention(device: str, dtype: torch.dtype, case: tuple) -> None:
    check_prefill(device, dtype, *case)


@pytest.mark.parametrize("pack", [1, 2])
@tiers(small=[([(20, 33), (3, 3)], 4, 2, 64, 4, None), ([(40, 64)], 4, 2, 64, 16, 20)], large=[])
def test_prefill_attention_packs_heads(device: str, dtype: torch.dtype, case: tuple, pack: int) -> None:
    check_prefill(device, dtype, *case, config=PrefillConfig(16, 16, pack, num_warps=4, num_stages=2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("contexts", [[1, 700, 0, 64], [3000], [100] * 70])
def test_decode_in_a_graph_equals_eager(dtype: torch.dtype, contexts: list[int]) -> None:
    """Captured with other context lengths than it is replayed with, bit for bit."""
    paged = Paged.build(contexts, 8, 128, 32, dtype, "cuda")
    q = torch.randn(len(contexts), 16, 128, dtype=dtype, device="cuda")
    lengths = torch.ones_like(paged.context_lens)

    def step() -> torch.Tensor:
        return decode_attention(q, paged.k_cache, paged.v_cache, paged.block_table, lengths, 0.1, None, 4096)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    lengths.copy_(paged.context_lens)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, step())
    assert bool(torch.isfinite(out).all())


@pytest.mark.gpu
def test_caches_beyond_two_billion_elements() -> None:
    """A page whose offset does not fit 32 bits is read by both kernels."""
    heads, page, dim = 8, 64, 128
    blocks = (1 << 31) // (heads * page * dim) + 8
    k_cache = torch.zeros(blocks, heads, page, dim, dtype=BF16, device="cuda")
    v_cache = torch.zeros_like(k_cache)
    v_cache[-1] = 1.0
    table = torch.full((1, 4), blocks - 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((1,), 40, dtype=torch.int32, device="cuda")
    q = torch.randn(40, 16, dim, dtype=BF16, device="cuda")
    assert bool((decode_attention(q[:1], k_cache, v_cache, table, lengths, 0.1) == 1).all())
    start = torch.tensor([0, 40], dtype=torch.int32, device="cuda")
    assert bool((prefill_attention(q, k_cache, v_cache, table, start, lengths, 40, 0.1) == 1).all())


SHARED = [
    ([640] * 3, None, DecodeConfig(16, 4, 16, 4, 2), [4, 4, 4]),  # alike: as many each
    ([640] * 3, None, DecodeConfig(16, 1, 16, 4, 2, spare=2), [1, 1, 1]),  # none is long
    ([16, 4000, 0, 16], None, DecodeConfig(16, 4, 16, 4, 2), [1, 13, 1, 1]),  # what short ones leave
    ([16, 4000, 16], None, DecodeConfig(16, 1, 16, 4, 2, spare=5), [1, 6, 1]),
    ([16, 4000, 16], None, DecodeConfig(16, 1, 16, 4, 2, spare=5, keep_whole=1), [1, 3, 1]),  # none below the mean
    ([500, 800, 600], None, DecodeConfig(16, 1, 16, 4, 2, spare=2, keep_whole=2), [1, 1, 1]),
    ([16, 1000, 16], None, DecodeConfig(16, 9, 128, 4, 2), [1, 8, 1]),  # min_split
    ([320, 640, 960], None, DecodeConfig(32, 3, 32, 4, 2), [2, 3, 4]),  # in proportion, in whole tiles
    ([100, 40], None, DecodeConfig(16, 64, 16, 4, 2), [7, 3]),  # no more than there are tiles
    ([900, 50], 64, DecodeConfig(16, 4, 16, 4, 2), [3, 2]),  # a window counts as what it shows
]


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_slots_are_shared_by_length(device: str, case: tuple) -> None:
    """And every key is somebody's, once, in whole tiles; slots that are left over are nobody's."""
    contexts, window, config, splits = case
    plan = plan_splits(torch.tensor(contexts, dtype=torch.int32, device=device), config, window)
    assert plan.slots is not None and plan.parts is not None
    assert plan.parts[:, 1].tolist() == splits
    rows = plan.slots.tolist()
    assert len(rows) == len(contexts) * config.splits + config.spare
    for sequence, context in enumerate(contexts):
        first = plan.parts[sequence, 0].item()
        own = rows[first : first + splits[sequence]]
        assert all((row[0], row[3]) == (sequence, context) for row in own)
        oldest = 0 if window is None else max(context - window, 0)
        assert own[0][1] == oldest // config.block_n and own[-1][2] == context
        assert all(one[2] == other[1] * config.block_n < context for one, other in zip(own, own[1:], strict=False))
    assert sum(row[0] >= 0 for row in rows) == sum(splits) and all(row[0] == -1 for row in rows[sum(splits) :])


def test_what_no_kernel_reads_is_not_planned() -> None:
    config = DecodeConfig(16, 4, 16, 4, 2)
    assert plan_splits(torch.tensor([640, 16], dtype=torch.int32), config) == SplitPlan(config)
