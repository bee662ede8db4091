"""The decoder layer in C against float64, and what happens on a machine that cannot compile it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_checks import F32, judge, norm_weight, outliers
from test_attention import STEPS, check, spec
from tiny_models import save_model

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import native, reference
from nanovllm.layers.attention.backend import backend_class, select_backend

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
OPTIONS = dict(max_model_len=64, num_kvcache_blocks=32, kvcache_block_size=8, skip_tokenizer_init=True)
PROMPTS = [[5, 6, 7], [9] * 30, [3, 1, 4, 1, 5, 9, 2, 6]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def forget_builds() -> Iterator[None]:
    """`native` asks for its library once a process; these tests ask again, before and after."""
    caches = (native._load, native.why_not)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


# ---------------------------------------------------------------------------------------------------- operations


# Rows of x on both sides of where the form changes, with and without padding; K and N that nothing divides.
@needs_compiler
@pytest.mark.parametrize("m", [1, 2, 3, 7, 13, 16, 31, 33, 48, 129, 300])
@pytest.mark.parametrize(("n", "k"), [(1, 5), (37, 64), (50, 577), (9, 2100)])
@pytest.mark.parametrize("swiglu", [False, True])
def test_linear(m: int, n: int, k: int, swiglu: bool) -> None:
    x, gamma = outliers(m, k, dtype=F32, device="cpu"), norm_weight(k, F32, "cpu")
    weight, bias = torch.randn(2 * n if swiglu else n, k) / k, torch.randn(2 * n if swiglu else n)
    activation = "swiglu" if swiglu else None
    for norm, b in ((gamma, bias), (None, None), (gamma, None)):
        out = native.linear(x, weight, b, norm_weight=norm, eps=1e-5, swiglu=swiglu)
        both = []
        for dtype in (torch.float64, F32):
            normed = x.to(dtype)
            if norm is not None:
                scale = torch.rsqrt(normed.square().mean(-1, keepdim=True) + 1e-5)
                normed = normed * scale * norm.to(dtype)
            y = normed @ weight.to(dtype).T + (0 if b is None else b.to(dtype))
            both.append(y if activation is None else torch.nn.functional.silu(y[:, :n]) * y[:, n:])
        judge(out, *both)


@needs_compiler
@pytest.mark.parametrize("m", [0, 1, 5, 17, 64])
def test_linear_residual(m: int) -> None:
    x, weight, bias, residual = torch.randn(m, 70), torch.randn(33, 70), torch.randn(33), torch.randn(m, 33)
    truth = residual.double() + x.double() @ weight.double().T + bias.double()
    plain = residual + x @ weight.T + bias
    out = native.linear_residual_(x, weight, bias, residual)
    assert out is residual
    if m:
        judge(out, truth, plain)


@needs_compiler
@pytest.mark.parametrize("swiglu", [False, True])
def test_many_rows_are_the_sums_of_few(swiglu: bool) -> None:
    x, weight, bias = torch.randn(1111, 900), torch.randn(2 * 150, 900), torch.randn(2 * 150)
    many = native.linear(x, weight, bias, norm_weight=torch.ones(900), eps=1e-5, swiglu=swiglu)
    for first in (0, 700, 1111 - 64):  # in panels, as the many are; another chunk; the last rows
        rows = x[first : first + 64]
        few = native.linear(rows, weight, bias, norm_weight=torch.ones(900), eps=1e-5, swiglu=swiglu)
        assert torch.equal(many[first : first + 64], few)


@needs_compiler
def test_nan_and_infinity_stay(poisoned_memory: None) -> None:
    weight = torch.randn(8, 40)
    for value in (float("nan"), float("inf")):
        x = torch.randn(20, 40)
        x[3, 7] = value
        out = native.linear(x, weight, norm_weight=torch.ones(40), eps=1e-5)
        assert not torch.isfinite(out[3]).any() and torch.isfinite(out[torch.arange(20) != 3]).all()


@needs_compiler
@pytest.mark.parametrize("with_norm", [True, False])
def test_rope_and_store(with_norm: bool) -> None:
    tokens, heads, kv_heads, dim, page = 11, 6, 2, 48, 8
    qkv, table = torch.randn(tokens, (heads + 2 * kv_heads) * dim), torch.randn(100, dim)
    positions, slots = torch.randint(0, 100, (tokens,)), torch.randperm(5 * page)[:tokens]
    slots[4] = -1  # a token whose key and value are not kept
    norms = (norm_weight(dim, F32, "cpu"), norm_weight(dim, F32, "cpu")) if with_norm else (None, None)
    caches = [[torch.full((5, kv_heads, page, dim), 7.0) for _ in range(2)] for _ in range(2)]
    ours = native.qk_norm_rope_store(qkv, *norms, 1e-5, table, positions, *caches[0], slots)
    theirs = reference.qk_norm_rope_store(qkv, *norms, 1e-5, table, positions, *caches[1], slots)
    for a, b in zip((ours, *caches[0]), (theirs, *caches[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("case", [*STEPS, ([700, 64, 1000], [(300, 900), (64, 64)], 16, 8, 128, 32, None)])
def test_attention(case: tuple) -> None:
    torch.manual_seed(0)
    check(select_backend("native", spec()), "cpu", F32, case)


@needs_compiler
def test_threads_change_nothing() -> None:
    weight, before = torch.randn(500, 300), torch.get_num_threads()
    for rows in (1, 40, 400):
        x, results = torch.randn(rows, 300), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(native.linear(x, weight, norm_weight=torch.ones(300), eps=1e-5))
        torch.set_num_threads(before)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# --------------------------------------------------------------------------------------------------------- engine


@needs_compiler
@pytest.mark.parametrize("kind", ["llama_bias", "qwen3_tied", "mistral"])
def test_fused_and_plain_layers_give_the_same_tokens(tmp_path: Path, kind: str) -> None:
    save_model(kind, tmp_path)
    tokens = {}
    for fusion, backend in (("on", "native"), ("off", "sdpa")):
        options = dict(dtype="float32", fusion=fusion, attention_backend=backend, show_progress=False, **OPTIONS)
        with LLM(str(tmp_path), **options) as llm:
            assert llm.engine.runner.loaded.model.model.native == (fusion == "on")
            tokens[fusion] = [output["token_ids"] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    assert tokens["on"] == tokens["off"]


# ---------------------------------------------------------------------------------------------------- no compiler


def test_no_compiler_is_no_error(
    tmp_path: Path, forget_builds: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PyTorch's operators run, and one line says why."""
    save_model("llama", tmp_path)
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    with caplog.at_level(logging.WARNING), LLM(str(tmp_path), dtype="float32", show_progress=False, **OPTIONS) as llm:
        assert llm.engine.runner.loaded.backend.name == "sdpa" and not llm.engine.runner.loaded.model.model.native
        assert all(len(output["token_ids"]) == 8 for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    assert sum("install gcc, or name one with CC=" in record.message for record in caplog.records) == 1
    with pytest.raises(ValueError, match='"on" cannot be had.*no C compiler.*"auto" or "off"'):
        LLM(str(tmp_path), dtype="float32", fusion="on", show_progress=False, **OPTIONS)
    with pytest.raises(ValueError, match="no C compiler"):
        select_backend("native", spec())
    assert select_backend("auto", spec()).name == "sdpa"


@needs_compiler
def test_a_build_is_kept(tmp_path: Path) -> None:
    flags = native._FLAGS
    native.build("cc", flags, tmp_path)
    (built,) = tmp_path.iterdir()
    stamp = built.stat().st_mtime_ns
    native.build("cc", flags, tmp_path)
    assert built.stat().st_mtime_ns == stamp
    native.build("cc", (*flags, "-DLANES=8"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@needs_compiler
@pytest.mark.parametrize(
    ("compiler", "flags", "reason"),
    [("cc", ("--no-such-flag",), "the C compiler failed"), ("false", (), "the C compiler failed")],
)
def test_a_failed_build_says_why(tmp_path: Path, compiler: str, flags: tuple[str, ...], reason: str) -> None:
    with pytest.raises(native.NoCompilerError, match=reason):
        native.build(compiler, flags, tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(native.NoCompilerError, match="cannot be built or loaded|no C compiler"):
        native.build("cc", native._FLAGS, tmp_path / "file" / "folder")


def test_why_not() -> None:
    assert "float32" in backend_class("native").why_not(spec(dtype=torch.bfloat16))[0]
    assert "for the CPU" in backend_class("native").why_not(spec(device=torch.device("cuda")))[0]
