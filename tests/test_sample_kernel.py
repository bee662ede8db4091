"""Counter-based random numbers and `kernels.sample`: an independent copy of the hash in Python's integers, statistics,
and the Triton kernels against the PyTorch body. All seeds are fixed, so every statistic here is one fixed number; its
limit is five standard deviations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nanovllm.kernels import sample_reference as reference
from nanovllm.kernels.sample import SampleConfig, sample, sample_config, uniform

MASK = 2**32 - 1
SEEDS = [0, 1, 2, 12345, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -1, -(2**63)]
interpret, gpu = pytest.mark.interpret, pytest.mark.gpu
kernel_devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpret, id="interpret"), pytest.param("cuda", marks=gpu, id="gpu")]
)


@pytest.fixture(autouse=True)
def _one_thread(poisoned_memory: None) -> None:
    torch.set_num_threads(1)


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ (x >> 16)


def unmix(x: int) -> int:
    """The inverse of `mix`."""
    x ^= x >> 16
    x = x * pow(0x846CA68B, -1, 2**32) & MASK
    x ^= (x >> 15) ^ (x >> 30)
    x = x * pow(0x7FEB352D, -1, 2**32) & MASK
    return x ^ (x >> 16)


def keys(seed: int, position: int) -> tuple[int, int]:
    low, high = seed & MASK, (seed >> 32) & MASK
    key_1 = mix(mix(mix((low + 0x9E3779B9) & MASK) ^ high) ^ position)
    key_2 = mix(mix(mix((position + 0xBB67AE85) & MASK) ^ low) ^ high)
    return key_1, key_2


def bits(seed: int, position: int, index: int) -> int:
    key_1, key_2 = keys(seed, position)
    return mix((mix(index ^ key_1) + key_2) & MASK)


def spread(statistic: float, freedom: int) -> float:
    """Standard deviations that a chi-square statistic lies above its mean."""
    return (statistic - freedom) / math.sqrt(2 * freedom)


def chi_square(u: torch.Tensor, bins: int = 256) -> float:
    counts = torch.bincount((u.flatten() * bins).long(), minlength=bins).double()
    expected = u.numel() / bins
    return spread(((counts - expected) ** 2 / expected).sum().item(), bins - 1)


def draw(seeds: Any, positions: Any, width: int) -> torch.Tensor:
    return reference.uniform(torch.as_tensor(seeds), torch.as_tensor(positions), width)


# ------------------------------------------------------------------------------------------------- the random numbers


def test_the_hash_is_the_one_written_here() -> None:
    positions = [0, 1, 7, 2**20, 2**31 - 1, 5, 9, 100, 3, 4]
    got = draw(SEEDS, positions, 300)
    for row, (seed, position) in enumerate(zip(SEEDS, positions, strict=True)):
        for index in (0, 1, 2, 255, 299):
            assert got[row, index].item() == ((bits(seed, position, index) >> 9) + 0.5) / 2**23


@kernel_devices
def test_kernel_draws_the_same_numbers_bit_for_bit(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = torch.tensor(SEEDS + torch.randint(-(2**63), 2**63 - 1, (6,), generator=generator).tolist())
    for dtype in (torch.int32, torch.int64):
        positions = torch.randint(0, 2**31 - 1, (16,), generator=generator).to(dtype)
        got = uniform(seeds.to(device), positions.to(device), 3000).cpu()
        assert torch.equal(got, reference.uniform(seeds, positions, 3000))


@pytest.mark.parametrize("word", [0, MASK, 0x1FF, MASK - 0x1FF])
def test_extreme_hashes_give_finite_noise(word: int) -> None:
    """The hash is a bijection, so the index that produces a given word can be computed."""
    key_1, key_2 = keys(3, 4)
    index = unmix((unmix(word) - key_2) & MASK) ^ key_1
    assert bits(3, 4, index) == word
    rows = reference.row_keys(torch.tensor([3]), torch.tensor([4]))
    indices = torch.tensor([[index - 2**32 if index >= 2**31 else index]], dtype=torch.int32)
    u = reference.keyed_uniform(rows, indices).item()
    assert u in (2.0**-24, 1 - 2.0**-24)
    noise = reference.gumbel(rows, indices).item()
    truth = -math.log(-math.log(u))
    assert abs(noise - truth) < 1e-5
    assert -2.82 < noise < 16.64
    assert reference.GUMBEL_SPREAD > 16.6356 + 2.8115


@pytest.mark.parametrize("axis", ["index", "position", "seed", "high half of the seed"])
def test_uniform_and_unrelated_along_each_axis(axis: str) -> None:
    n = 2**16
    line = torch.arange(n)
    u = {
        "index": lambda: draw([5], [17], n),
        "position": lambda: draw(torch.full((n,), 5), line, 1),
        "seed": lambda: draw(line, torch.full((n,), 17), 1),
        "high half of the seed": lambda: draw(line << 32, torch.full((n,), 17), 1),
    }[axis]().flatten()
    assert abs(chi_square(u)) < 5
    for shift in (1, 2, 64):
        both = torch.stack((u[:-shift], u[shift:]))
        assert abs(torch.corrcoef(both)[0, 1].item()) * math.sqrt(n) < 5
        pairs = ((both[0] * 16).floor() * 16 + (both[1] * 16).floor() + 0.5) / 256  # 16 x 16 boxes
        assert abs(chi_square(pairs)) < 5
    low = torch.bincount(((u.double() * 2**23).long() & 0xFF), minlength=256).double()  # the last bits as well
    assert abs(spread(((low - n / 256) ** 2 / (n / 256)).sum().item(), 255)) < 5


def test_every_input_bit_changes_half_of_the_output() -> None:
    n = 4096
    seeds = torch.arange(n) * 7919
    positions = torch.arange(n) % 257
    base = (draw(seeds, positions, 4)[:, 3].double() * 2**23).long()
    flips = {f"seed {b}": (seeds ^ (1 << b if b < 63 else -(2**63)), positions, 3) for b in range(64)}
    flips |= {f"position {b}": (seeds, positions ^ (1 << b), 3) for b in range(20)}
    flips |= {f"index {b}": (seeds, positions, 3 ^ (1 << b)) for b in range(18)}
    for name, (s, p, index) in flips.items():
        other = reference.keyed_uniform(reference.row_keys(s, p), torch.tensor([index], dtype=torch.int32))
        changed = base ^ (other[:, 0].double() * 2**23).long()
        for bit in range(23):
            share = (changed >> bit & 1).double().mean().item()
            assert abs(share - 0.5) * 2 * math.sqrt(n) < 5, (name, bit)


def test_no_two_rows_share_their_keys() -> None:
    seeds = torch.arange(-500, 500).repeat_interleave(500)
    positions = torch.arange(500).repeat(1000)
    key_1, key_2 = reference.row_keys(seeds, positions).long()
    assert torch.unique(key_1 * 2**32 + key_2).numel() == seeds.numel()


# ------------------------------------------------------------------------------------------------------------ sampling


def case(rows: int, vocab: int, seed: int = 0) -> list[torch.Tensor]:
    """Logits, temperatures (every third row greedy), seeds and positions."""
    torch.manual_seed(seed)
    temperature = torch.linspace(0.3, 1.7, rows)
    temperature[::3] = 0.0
    return [torch.randn(rows, vocab) * 3, temperature, torch.arange(rows) * 1000 - 7, torch.arange(rows) + 40]


def assert_best(tokens: torch.Tensor, logits: torch.Tensor, heat: torch.Tensor, u: torch.Tensor) -> None:
    """`tokens` have the largest score in float64, or one that float32 cannot tell from it."""
    scores = logits.double() / torch.where(heat > 0, heat, 1.0).double()[:, None]
    scores += torch.where(heat > 0, 1.0, 0.0)[:, None] * -torch.log(-torch.log(u.double()))
    assert tokens.dtype == torch.int64
    missed = scores.amax(dim=-1) - scores.gather(1, tokens[:, None])[:, 0]
    assert (missed <= 1e-5 * scores.abs().amax(dim=-1)).all()
    assert torch.equal(tokens[heat == 0], logits[heat == 0].argmax(dim=-1))


def test_distribution_is_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, -0.5])
    n, heat = 4000, 0.7
    tokens = sample(logits.expand(n, 8), torch.full((n,), heat), torch.full((n,), 11), torch.arange(n))
    expected = torch.softmax(logits.double() / heat, dim=-1) * n
    counts = torch.bincount(tokens, minlength=8).double()
    assert abs(spread(((counts - expected) ** 2 / expected).sum().item(), 7)) < 5


@pytest.mark.parametrize("scale", [0.5, 20.0])  # nearly all tokens can win; nearly none can
def test_body_takes_the_best_score(scale: float) -> None:
    logits, heat, seeds, positions = case(12, 5000)
    logits *= scale
    logits[:, 100:200] = -math.inf
    assert_best(sample(logits, heat, seeds, positions), logits, heat, draw(seeds, positions, 5000))


@kernel_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((5, 1000), None),
        ((4, 3001), SampleConfig(splits=3, chunk=1024, block=256, num_warps=4)),
        ((3, 700), SampleConfig(splits=4, chunk=256, block=256, num_warps=4)),  # the last chunk is empty
        ((1, 1), None),
    ],
)
def test_kernel_takes_the_best_score(device: str, dtype: Any, shape: tuple[int, int], config: Any) -> None:
    if device == "cpu" and dtype is torch.bfloat16:
        with pytest.raises(ValueError, match="bfloat16"):
            sample(*[t.to(dtype) if i == 0 else t for i, t in enumerate(case(*shape))])
        return
    logits, heat, seeds, positions = case(*shape)
    logits[0, : shape[1] // 2] = -math.inf
    logits = logits.to(dtype)
    strided = torch.full((shape[0], shape[1] + 3), 99.0, dtype=dtype)
    strided[:, : shape[1]] = logits
    tokens = sample(
        strided.to(device)[:, : shape[1]], heat.to(device), seeds.to(device), positions.to(device), config=config
    ).cpu()
    assert_best(tokens, logits.float(), heat, draw(seeds, positions, shape[1]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_lowest_index_wins_a_tie(device: str) -> None:
    check_ties(device)


@interpret
def test_lowest_index_wins_a_tie_in_the_kernel() -> None:
    check_ties("cpu")


def check_ties(device: str) -> None:
    logits = torch.zeros(3, 5000)
    logits[0, [4000, 1500, 2999]] = 5.0
    logits[2, :] = -math.inf
    zeros = torch.zeros(3, dtype=torch.int64, device=device)
    assert sample(logits.to(device), zeros.float(), zeros, zeros).tolist() == [1500, 0, 0]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cpu", marks=interpret), pytest.param("cuda", marks=gpu)])
def test_broken_logits_give_a_valid_token(device: str) -> None:
    logits = torch.full((2, 3000), math.nan, device=device)
    heat, zeros = torch.tensor([0.0, 1.0], device=device), torch.zeros(2, dtype=torch.int64, device=device)
    assert all(0 <= token < 3000 for token in sample(logits, heat, zeros, zeros).tolist())


def test_shapes_are_checked() -> None:
    logits, heat, seeds, positions = case(3, 10)
    with pytest.raises(ValueError, match=r"seeds must have shape \(3,\) to match logits, got \(2,\)"):
        sample(logits, heat, seeds[:2], positions)
    assert sample(logits[:0], heat[:0], seeds[:0], positions[:0]).shape == (0,)


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 256, 1024])
@pytest.mark.parametrize("vocab", [1, 1000, 32000, 151936])
def test_config_covers_the_vocabulary(rows: int, vocab: int) -> None:
    config = sample_config(rows, vocab, sms=132)
    assert config.chunk % config.block == 0
    assert (config.splits - 1) * config.chunk < vocab <= config.splits * config.chunk
    assert config.splits == 1 or rows * config.splits <= 16 * 132 + rows


@gpu
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_gpu_at_full_vocabulary(rows: int) -> None:
    logits, heat, seeds, positions = case(rows, 151936)
    logits = logits.bfloat16()
    tokens = sample(logits.cuda(), heat.cuda(), seeds.cuda(), positions.cuda()).cpu()
    assert_best(tokens, logits.float(), heat, draw(seeds, positions, 151936))


@gpu
def test_gpu_rows_do_not_depend_on_their_company() -> None:
    logits, heat, seeds, positions = (t.cuda() for t in case(40, 50000))
    together = sample(logits, heat, seeds, positions)
    alone = [sample(*(t[i : i + 1] for t in (logits, heat, seeds, positions))) for i in range(40)]
    assert torch.equal(together, torch.cat(alone))


@gpu
def test_gpu_graph_follows_its_buffers() -> None:
    buffers = [t.cuda() for t in case(8, 50000)]
    sample(*buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample(*buffers)
    for seed in (1, 2):
        for buffer, fresh in zip(buffers, case(8, 50000, seed), strict=True):
            buffer.copy_(fresh)
        buffers[2] += seed
        graph.replay()
        assert torch.equal(tokens, sample(*buffers))
