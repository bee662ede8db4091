"""Small launches of every kernel of the package, for `sanitize.py` to run under compute-sanitizer.

Operands are made on the CPU and copied, so that next to nothing but our kernels runs on the GPU, and are exactly as
large as the kernel may read: an access one element too far is then outside its allocation. What the results are is
the other tests' business.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from kernel_checks import Paged

from nanovllm import kernels as package
from nanovllm.kernels import (
    activation,
    decode_attention,
    feed,
    fetch,
    jit,
    kv_cache,
    linear_residual,
    norm,
    prefill_attention,
    rms_norm_linear_fusion,
    rope,
    rope_attention,
    sample,
    sample_cut,
    split_plan,
)
from nanovllm.kernels.fusion_config import FusionConfig, Problem
from nanovllm.kernels.launch_config import DecodeConfig, PrefillConfig


@dataclass(frozen=True, eq=False)
class Case:
    """A launch or two: `run(device, half-precision dtype)`. `pdl`: as programmatic dependents, which Hopper knows."""

    run: Callable[[str, torch.dtype], object]
    pdl: bool = False


def package_kernels() -> dict[str, tuple[ModuleType, str]]:
    """Every kernel that is launched: "module.name" of the jitted functions that no other jitted function calls."""
    jitted: dict[str, tuple[ModuleType, str, Any]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for name, value in vars(module).items():
            function = value.function if isinstance(value, jit.LazyKernel) else getattr(value, "fn", None)
            if getattr(function, "__module__", None) == module.__name__:
                jitted[f"{info.name}.{name}"] = module, name, function
    called = {name for _, _, function in jitted.values() for name in function.__code__.co_names}
    return {key: (module, name) for key, (module, name, _) in jitted.items() if name not in called}


class Recorder:
    """Stands in for a kernel: notes its launches, and passes them on if `forward`."""

    def __init__(self, key: str, kernel: Any, launched: list[str], forward: bool) -> None:
        self.key, self.kernel, self.launched, self.forward = key, kernel, launched, forward

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.launched.append(self.key)
        return self.kernel[grid] if self.forward else lambda *args, **kwargs: None


def record(set_attribute: Callable[[Any, str, Any], object], *, forward: bool) -> list[str]:
    """Replace every kernel of the package by a `Recorder`; returns the list that their launches are noted in."""
    launched: list[str] = []
    for key, (module, name) in package_kernels().items():
        jit._materialise(vars(module))
        set_attribute(module, name, Recorder(key, getattr(module, name), launched, forward))
    return launched


def numbers(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).to(device)


# ------------------------------------------------------------------------------------------------ linear layers

# (configuration, rows, outputs, K): edges in every direction, and the shapes that PDL and its prefetch want.
LINEARS = {
    "gemv_kernel": [
        ("gemv/4/64/1", 1, 33, 100),
        ("gemv/4/64/2", 3, 21, 130),
        ("gemv/4/128/2/pdl", 2, 36, 256),
        ("gemv/8/256/4/late", 1, 50, 5000),
    ],
    "panel_kernel": [
        ("panel/8/16/64/2", 5, 21, 100),
        ("panel/16/16/128/4/pdl", 11, 36, 128),
        ("panel/16/32/256/4/late", 12, 50, 1000),
    ],
    "tile_kernel": [
        ("tile/16/16/32/2/2", 5, 37, 129),
        ("tile/64/64/64/4/3", 70, 130, 192),
        ("tile/16/32/64/4/3/pdl", 16, 100, 512),
        ("tile/64/16/32/4/2", 70, 37, 129),  # x is the left operand
        ("pair/16/64/64/4/3", 18, 50, 200),
        ("pair/64/32/64/4/3/pdl", 40, 100, 512),
    ],
}


def linears(text: str, m: int, n: int, k: int) -> Iterator[Case]:
    """RMSNorm + linear bare, with everything, in both half dtypes and float32, and the linear without a norm."""
    config = FusionConfig.parse(text)

    def fused(device: str, dtype: torch.dtype, swiglu: bool, full: bool) -> None:
        problem = Problem(m, n, k, str(dtype).removeprefix("torch."), swiglu)
        made = dict(dtype=dtype, device=device)
        weight, gamma = numbers(problem.weight_rows, k, **made), numbers(k, **made)
        bias, residual = (numbers(problem.weight_rows, **made), numbers(m, n, **made)) if full else (None, None)
        launch = rms_norm_linear_fusion.launch
        launch(problem, config, numbers(m, k, **made), weight, gamma if full else None, 1e-6, bias, residual)

    pdl = config.launch_pdl
    yield Case(lambda device, half: fused(device, half, False, False), pdl)
    yield Case(lambda device, half: fused(device, half, True, True), pdl)
    yield Case(lambda device, half: fused(device, torch.float16, False, True), pdl)  # scales first
    if config.variant == "gemv":
        yield Case(lambda device, half: fused(device, torch.float32, True, True), pdl)

    def without_norm(device: str, half: torch.dtype) -> None:
        made = dict(dtype=half, device=device)
        operands = numbers(m, k, **made), numbers(n, k, **made), numbers(m, n, **made)
        linear_residual.linear_residual(*operands, bias=numbers(n, **made), config=config)

    yield Case(without_norm, pdl)


# ---------------------------------------------------------------------------------------- rows, cache, attention


def rows(call: Callable[..., object], *shapes: tuple[int, ...]) -> list[Case]:
    """`call(x)` for x of each shape."""
    return [
        Case(lambda device, half, shape=shape: call(numbers(*shape, dtype=half, device=device)))  # type: ignore[misc]
        for shape in shapes
    ]


def rms_norm(x: torch.Tensor) -> None:
    norm.rms_norm(x, None, 1e-6)
    norm.rms_norm(x, x[0].clone(), 1e-6)
    norm.add_rms_norm(x, x, x[0].clone(), 1e-6)


def caches(device: str, dtype: torch.dtype, blocks: int, heads: int, page: int, dim: int) -> list[torch.Tensor]:
    return [torch.zeros(blocks, heads, page, dim, dtype=dtype).to(device) for _ in range(2)]


def store_kv(device: str, half: torch.dtype) -> None:
    k, v = (numbers(5, 3, 80, dtype=half, device=device) for _ in range(2))
    slots = torch.tensor([7, 0, -1, 15, 3]).to(device)
    kv_cache.store_kv(k, v, *caches(device, half, 2, 3, 8, 80), slots)


def qk_norm_rope_store(tokens: int, q_heads: int, kv_heads: int, dim: int, with_norm: bool) -> Case:
    def run(device: str, half: torch.dtype) -> None:
        qkv = numbers(tokens, (q_heads + 2 * kv_heads) * dim, dtype=half, device=device)
        weight = numbers(dim, dtype=half, device=device) if with_norm else None
        table = numbers(tokens + 1, dim, dtype=torch.float32, device=device)
        positions, slots = torch.arange(1, tokens + 1).to(device), torch.arange(-1, tokens - 1).to(device)
        cache = caches(device, half, -(-tokens // 4), kv_heads, 4, dim)
        rope.qk_norm_rope_store(qkv, weight, weight, 1e-6, table, positions, *cache, slots)

    return Case(run)


# (contexts, query heads, KV heads, head_dim, page, window, configuration); 0 is the padding row of a CUDA graph
DECODES: list[tuple[list[int], int, int, int, int, int | None, DecodeConfig]] = [
    ([1, 0, 33, 70], 4, 2, 64, 4, None, DecodeConfig(16, 1, 16, num_warps=4, num_stages=2)),
    ([5, 64, 31], 3, 1, 80, 16, 20, DecodeConfig(16, 3, 16, num_warps=4, num_stages=2)),
    ([200, 3, 129], 8, 2, 128, 32, None, DecodeConfig(64, 4, 64, num_warps=4, num_stages=3)),
]


def decode(
    contexts: list[int], q_heads: int, kv_heads: int, dim: int, page: int, window: int | None, config: DecodeConfig,
    device: str, half: torch.dtype, *, pdl: bool | None = None,
) -> None:  # fmt: skip
    """Decode attention alone or, if `pdl` is given, in the kernel that also rotates and appends."""
    torch.manual_seed(0)
    paged = Paged.build(contexts, kv_heads, dim, page, half, device)
    cache = paged.k_cache, paged.v_cache, paged.block_table, paged.context_lens
    plan = split_plan.plan_splits(paged.context_lens, config, window)
    if pdl is None:
        q = numbers(len(contexts), q_heads, dim, dtype=half, device=device)
        decode_attention.decode_attention(q, *cache, 0.1, window, plan=plan)
        return
    qkv = numbers(len(contexts), (q_heads + 2 * kv_heads) * dim, dtype=half, device=device)
    weight = numbers(dim, dtype=half, device=device) if window is None else None
    table = numbers(max(contexts), dim, dtype=torch.float32, device=device)
    rope_attention.rope_attention(qkv, weight, weight, 1e-6, table, *cache, 0.1, window, plan=plan, pdl=pdl)


def prefill(chunks: list[tuple[int, int]], window: int | None, config: PrefillConfig) -> Case:
    """chunks: (query length, context length)."""

    def run(device: str, half: torch.dtype) -> None:
        torch.manual_seed(0)
        paged = Paged.build([context for _, context in chunks], 2, 64, 8, half, device)
        start = torch.tensor([0, *(n for n, _ in chunks)]).cumsum(0).int()
        q = numbers(int(start[-1]), 4, 64, dtype=half, device=device)
        longest = max(n for n, _ in chunks)
        prefill_attention.prefill_attention(
            q, paged.k_cache, paged.v_cache, paged.block_table, start.to(device), paged.context_lens, longest, 0.1,
            window, config=config,
        )  # fmt: skip

    return Case(run)


# ------------------------------------------------------------------------------------------------------- tokens

# temperature, top_k, top_p, min_p
RULES = [(0.8, 7, 1.0, 0.0), (1.0, 0, 0.9999, 0.0), (0.7, 300, 0.9, 0.05), (0.0, 5, 0.5, 0.5), (1.0, 0, 1.0, 0.0)]


def feed_tokens(device: str, half: torch.dtype) -> None:
    feed.feed_tokens_(torch.tensor([11, -3, 12, -1] * 300).to(device), torch.tensor([500, 600, 700]).to(device))


def fetch_step(device: str, half: torch.dtype) -> None:
    for rows, width in ((1, 1), (5, 40), (5, 1500)):
        shapes = ((2, 3, rows), torch.int64), ((2, rows), torch.int32), ((2, rows, width), torch.int32)
        source = tuple(torch.zeros(shape, dtype=dtype, pin_memory=device == "cuda") for shape, dtype in shapes)
        target = tuple(torch.zeros_like(part[0], device=device) for part in source)
        fetch.fetch_step_(torch.tensor([1, 0]).to(device), source, target, rows, width)  # type: ignore[arg-type]


def embed_fed(device: str, half: torch.dtype) -> None:
    ids, sampled = torch.tensor([11, -3, 12, -1]).to(device), torch.tensor([0, 1, 12]).to(device)
    for width in (100, 1500):
        feed.embed_fed(ids, sampled, numbers(13, width, dtype=half, device=device))


def sample_rows(device: str, half: torch.dtype) -> None:
    """Greedy, cut and free rows; logits of a flat distribution, so that the search for the cut takes several passes."""
    count, columns = len(RULES), list(zip(*RULES, strict=True))
    types = torch.float32, torch.int32, torch.float32, torch.float32
    heat, k, p, floor = (torch.tensor(c, dtype=t).to(device) for c, t in zip(columns, types, strict=True))
    seeds, positions = torch.arange(count).to(device), torch.arange(count).to(device)
    for logits in (numbers(count, 1001, dtype=half, device=device), torch.ones(count, 5000, dtype=half).to(device)):
        params = sample_cut.RowParams(heat, seeds, positions, k, p, floor)
        sample_cut.sample_rows(logits, params)
        echo = torch.zeros(2, count, dtype=torch.int64, pin_memory=device == "cuda")
        sink = sample.TokenSink(torch.zeros(count, dtype=torch.int64).to(device), echo, torch.tensor([0, 1]).to(device))
        sample.sample(logits, heat, seeds, positions, sink=sink)


def uniform(device: str, half: torch.dtype) -> None:
    sample.uniform(torch.arange(3).to(device), torch.arange(3).to(device), 1500)


DECODE_CASES = [Case(partial(decode, *shape)) for shape in DECODES]
SAMPLE_CASES = [Case(sample_rows)]
CASES: dict[str, list[Case]] = {
    **{
        f"rms_norm_linear_kernels.{kernel}": [case for shape in shapes for case in linears(*shape)]
        for kernel, shapes in LINEARS.items()
    },
    "norm._rms_norm_kernel": rows(rms_norm, (3, 100), (2, 1500)),
    "activation._silu_mul_kernel": rows(activation.silu_mul, (3, 200), (2, 2600)),
    "activation._rms_silu_mul_kernel": [
        *rows(lambda y: activation.rms_silu_mul(y, y[:, :100], 1e-6), (3, 200), (2, 2600)),
        *rows(lambda y: activation.rms_silu_mul(y, y, 1e-6, y[0].clone()), (1, 1500)),
    ],
    "kv_cache._store_kv_kernel": [Case(store_kv)],
    "rope._qk_norm_rope_store_kernel": [
        qk_norm_rope_store(5, 3, 1, 80, True), qk_norm_rope_store(100, 14, 2, 64, False),
    ],
    "decode_attention._decode_kernel": DECODE_CASES,
    "split_plan._plan_kernel": DECODE_CASES[1:],
    "decode_attention._merge_kernel": DECODE_CASES[1:],  # the first has one split
    "rope_attention._rope_attention_kernel": [
        Case(partial(decode, *shape, pdl=pdl), pdl) for shape in DECODES for pdl in (False, True)
    ],
    "prefill_attention._prefill_kernel": [
        prefill([(7, 7), (1, 9), (20, 33)], None, PrefillConfig(16, 16, 2, num_warps=4, num_stages=2)),
        prefill([(40, 64), (3, 50)], 20, PrefillConfig(32, 16, 1, num_warps=4, num_stages=2)),
        prefill([(70, 70)], None, PrefillConfig(64, 64, 1, num_warps=4, num_stages=3)),
    ],
    "feed._feed_kernel": [Case(feed_tokens)],
    "feed._embed_kernel": [Case(embed_fed)],
    "fetch._fetch_kernel": [Case(fetch_step)],
    "sample._chunk_kernel": SAMPLE_CASES,
    "sample._pick_kernel": SAMPLE_CASES,
    "sample._uniform_kernel": [Case(uniform)],
    "sample_cut._summary_kernel": SAMPLE_CASES,
    "sample_cut._threshold_kernel": SAMPLE_CASES,
}  # fmt: skip


def distinct_cases() -> list[tuple[set[str], Case]]:
    """Each case once, with the kernels that it is said to launch."""
    found: dict[int, tuple[set[str], Case]] = {}
    for key, cases in CASES.items():
        for case in cases:
            found.setdefault(id(case), (set(), case))[0].add(key)
    return list(found.values())
