"""Attention backends through `AttentionMetadata`: mixed steps against float64, selection and its refusals."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from kernel_checks import Paged, attention_truth, judge, tiers

from nanovllm.layers.attention import backend as backend_module
from nanovllm.layers.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionSpec,
    backend_class,
    select_backend,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def spec(**changes: object) -> AttentionSpec:
    facts: dict = dict(
        device=torch.device("cpu"), dtype=torch.float32, num_heads=4, num_kv_heads=2, head_dim=64, block_size=32
    )
    return AttentionSpec(**{**facts, **changes})


def step(
    decodes: list[int], chunks: list[tuple[int, int]], kv_heads: int, dim: int, page: int, dtype: torch.dtype,
    device: str, window: int | None,
) -> tuple[Paged, AttentionMetadata]:  # fmt: skip
    """A step of decodes (their contexts) and chunks (query length, context); what windows left behind is NaN."""
    queries = [1] * len(decodes) + [n for n, _ in chunks]
    contexts = decodes + [context for _, context in chunks]
    oldest = None if window is None else [max(c - n - window + 1, 0) for n, c in zip(queries, contexts, strict=True)]
    paged = Paged.build(contexts, kv_heads, dim, page, dtype, device, oldest)
    start = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    metadata = AttentionMetadata(
        num_decodes=len(decodes),
        query_start=start.to(device),
        context_lens=paged.context_lens,
        block_table=paged.block_table,
        slot_mapping=torch.full((sum(queries),), -1, device=device),
        max_query_len=max([n for n, _ in chunks], default=0),
        max_context_len=max(contexts),
        query_lens_cpu=queries,
        context_lens_cpu=contexts,
    )
    return paged, metadata


def check(body: AttentionBackend, device: str, dtype: torch.dtype, case: tuple) -> None:
    decodes, chunks, q_heads, kv_heads, dim, page, window = case
    paged, metadata = step(decodes, chunks, kv_heads, dim, page, dtype, device, window)
    scale = dim**-0.5
    starts = metadata.query_start.tolist()
    for layer in range(2):  # the second layer takes what the first left in the metadata
        q = torch.randn(starts[-1], q_heads, dim).to(dtype).to(device)
        out = body.forward(q, paged.k_cache, paged.v_cache, metadata, scale, window)
        truths, rounded = [], []
        for i, (k, v) in enumerate(zip(paged.keys, paged.values, strict=True)):
            args = (q[starts[i] : starts[i + 1]], k, v, scale, window)
            truths.append(attention_truth(*args, torch.float64))
            rounded.append(attention_truth(*args, dtype))
        judge(out, torch.cat(truths), torch.cat(rounded))
        assert out.is_contiguous(), f"layer {layer}"


# (decode contexts, chunks, q_heads, kv_heads, head_dim, page, window)
STEPS = [
    ([9, 1, 40], [], 4, 2, 64, 4, None),
    ([32, 32], [], 6, 2, 32, 8, None),  # pages exactly full: no mask
    ([], [(7, 7), (5, 21), (1, 1)], 4, 4, 64, 8, None),
    ([16, 33], [(12, 12), (3, 50)], 9, 3, 64, 16, None),
    ([16, 70, 3], [(12, 12), (30, 75), (2, 60)], 4, 2, 64, 4, 10),
    ([25, 70], [(40, 70)], 2, 1, 80, 16, 33),
]


@tiers(small=STEPS, large=[])
def test_sdpa_backend(device: str, dtype: torch.dtype, case: tuple) -> None:
    check(backend_class("sdpa")(), device, dtype, case)


@pytest.mark.interpret
@pytest.mark.parametrize("case", STEPS)
def test_triton_backend_in_the_interpreter(case: tuple) -> None:
    check(select_backend("triton", spec()), "cpu", torch.float32, case)


LARGE_STEP = ([700, 64, 1000], [(300, 900), (64, 64)], 16, 8, 128, 32, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*STEPS, LARGE_STEP])
def test_triton_backend(dtype: torch.dtype, case: tuple) -> None:
    check(select_backend("triton", spec(device=torch.device("cuda"), dtype=dtype)), "cuda", dtype, case)


MODULES = {"flash_attn": "flash_attn_interface", "flashinfer": "flashinfer"}
INSTALLED = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]


if INSTALLED:  # without either library there is nothing to test, and nothing to skip

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", INSTALLED)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("case", [*STEPS[2:5], LARGE_STEP])
    def test_optional_backends(name: str, dtype: torch.dtype, case: tuple) -> None:
        check(select_backend(name, spec(device=torch.device("cuda"), dtype=dtype)), "cuda", dtype, case)


def test_sdpa_plans_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanovllm.layers.attention import sdpa

    calls = []
    for name in ("_plan_decodes", "_plan_chunk"):
        plan = getattr(sdpa, name)
        monkeypatch.setattr(sdpa, name, lambda *args, plan=plan: calls.append(1) or plan(*args))
    paged, metadata = step([9, 40], [(5, 21)], 2, 64, 4, torch.float32, "cpu", None)
    body = sdpa.SDPABackend()
    for _ in range(3):
        body.forward(torch.randn(7, 4, 64), paged.k_cache, paged.v_cache, metadata, 0.1)
    assert len(calls) == 2


def test_ragged_decodes() -> None:
    """Sequences of one page and of many go through one product."""
    ragged = [10, 900, 12, 850, 11, 500]
    check(backend_class("sdpa")(), "cpu", torch.float32, (ragged, [(5, 30)], 4, 2, 32, 16, None))
    check(backend_class("sdpa")(), "cpu", torch.float32, (ragged, [], 4, 2, 32, 16, 700))


def test_auto_on_the_cpu() -> None:
    """C where it can run, which needs float32 and a compiler; else PyTorch's."""
    assert select_backend("auto", spec(dtype=torch.bfloat16)).name == "sdpa"
    native = backend_class("native").why_not(spec())
    assert select_backend("auto", spec()).name == ("sdpa" if native else "native")


@pytest.mark.gpu
def test_auto_is_triton_on_cuda() -> None:
    assert select_backend("auto", spec(device=torch.device("cuda"))).name == "triton"


@pytest.mark.parametrize("name", ["triton", "flash_attn", "flashinfer"])
def test_refusal_names_every_reason(name: str) -> None:
    with pytest.raises(ValueError, match="cannot run here") as error:
        select_backend(name, spec(head_dim=20))
    message = str(error.value)
    assert "needs a CUDA device" in message
    assert "head_dim" in message
    assert message.endswith("use 'auto'")


def test_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown attention backend 'flsh'.*sdpa"):
        select_backend("flsh", spec())


def test_old_gpu_is_refused_by_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reasons = backend_class("triton").why_not(spec(device=torch.device("cuda")))
    assert any("8.0" in reason and "7.5" in reason for reason in reasons)
    assert select_backend("auto", spec(device=torch.device("cuda"))).name == "sdpa"


def test_selection_imports_no_optional_library() -> None:
    for name in backend_module._BACKENDS:
        backend_class(name).why_not(spec())
    assert not {"flash_attn", "flash_attn_interface", "flashinfer"} & set(sys.modules)
