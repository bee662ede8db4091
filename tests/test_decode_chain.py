"""The fused decode chain as a whole: same tokens and logits as the unfused path, for every family.

Here the kernels run in Triton's interpreter on the CPU; on a GPU, `tests/test_gpu_engine.py` asks the same of graphs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_models import save_model

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.chain_config import MAX_FUSED_ROWS, chain_rows, linear_config
from nanovllm.kernels.fusion_config import ELEMENT_SIZES, UNFUSED, Problem
from nanovllm.kernels.launch_config import H100, DecodeConfig, Gpu, next_power_of_2, rope_attention_config

OPTIONS = dict(
    dtype="float32", device="cpu", attention_backend="triton", max_model_len=64, num_kvcache_blocks=32,
    kvcache_block_size=8, skip_tokenizer_init=True, show_progress=False, max_num_seqs=4,
)  # fmt: skip
PROMPTS = [[5, 6, 7], [9] * 11, [3, 1, 4, 1, 5, 9, 2, 6]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=3)


@pytest.mark.interpret
@pytest.mark.parametrize("kind", ["llama_bias", "qwen3_tied", "mistral"])
def test_same_tokens_and_logprobs(tmp_path: Path, kind: str) -> None:
    """Three sequences in one batch (so that rows, bias, q/k norms, windows and tied heads all meet) and fp32."""
    save_model(kind, tmp_path)
    outputs = {}
    for fusion in ("off", "on"):
        with LLM(str(tmp_path), **OPTIONS, fusion=fusion) as llm:
            assert llm.engine.runner.loaded.fused_rows == (4 if fusion == "on" else 0)
            outputs[fusion] = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for fused, plain in zip(outputs["on"], outputs["off"], strict=True):
        assert fused.error is None and fused["token_ids"] == plain["token_ids"]
        for ours, theirs in zip(fused.outputs[0].logprobs, plain.outputs[0].logprobs, strict=True):
            for token, entry in ours.items():
                if token in theirs:
                    assert entry.logprob == pytest.approx(theirs[token].logprob, abs=1e-5)


def test_on_says_why_it_cannot(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    with pytest.raises(ValueError, match='fusion="on" cannot be had: on a CPU its kernels.*bfloat16.*"auto" or "off"'):
        LLM(str(tmp_path), **{**OPTIONS, "attention_backend": "auto", "dtype": "bfloat16"}, fusion="on")
    with pytest.raises(ValueError, match="fusion must be one of auto, on, off"):
        LLM(str(tmp_path), **OPTIONS, fusion="yes")


HOPPER, BLACKWELL = Gpu(132, 227 * 1024, pdl=True), Gpu(170, 99 * 1024, pdl=True)


def test_how_many_rows_the_chain_takes() -> None:
    """Without dependent launches there are no pairs, and what is left above 16 rows is its attention."""
    for gpu, half in ((HOPPER, 64), (BLACKWELL, 64), (H100, 32), (Gpu(82, 99 * 1024), 32)):
        assert {size: chain_rows(size, gpu) for size in (2, 4)} == {2: half, 4: 4}


@pytest.mark.parametrize("gpu", [H100, Gpu(82, 99 * 1024), HOPPER, BLACKWELL])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_policy_fits_every_shape(gpu: Gpu, dtype: str) -> None:
    """Whatever the model, a configuration that can run; dependent launches only where the GPU knows them."""
    many = [m for m in (17, 24, 31, 32, 33, 48, 63, 64) if m <= chain_rows(ELEMENT_SIZES[dtype], gpu)]
    for k in (64, 576, 896, 1000, 1024, 2560, 3072, 4096, 8192, 12288, 14336, 18944):
        for n in (64, 576, 1024, 4096, 12288, 151936):
            for swiglu in (False, True):
                for m in (*range(1, (4 if dtype == "float32" else MAX_FUSED_ROWS) + 1), *many):
                    problem = Problem(m, n, k, dtype, swiglu)
                    config = linear_config(problem, gpu)
                    assert config.faults(problem, gpu) == [], problem
                    assert config.launch_pdl == (gpu.pdl and config.variant != "unfused")
                    assert m <= MAX_FUSED_ROWS or config.variant == ("pair" if gpu.pdl else "unfused")


@pytest.mark.parametrize("rows", [17, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_who_goes_back_to_the_stream_by_narrow_tiles(rows: int, dtype: str) -> None:
    """17 rows and more, one program an SM at most, as a dependent; all others leave it to cuBLAS."""
    for gpu, most in ((HOPPER, 2112), (BLACKWELL, 2720)):
        for k in (16, 25, 576, 1000, 3072, 18944):
            for n in (1, 1001, most):
                problem = Problem(rows, n, k, dtype)
                config = linear_config(problem, gpu, norm=False)
                assert config.faults(problem, gpu) == [] and config.launch_pdl
                assert (config.variant, config.block_m, config.block_n) == ("tile", 64, 16)
            assert linear_config(Problem(rows, most + 1, k, dtype), gpu, norm=False) == UNFUSED
    problem = Problem(rows, 1024, 3072, dtype)
    assert linear_config(problem, HOPPER).variant == "pair", "with a norm in front it is another question"
    assert linear_config(problem, H100, norm=False) == UNFUSED, "no dependent launches"
    assert linear_config(dataclasses.replace(problem, dtype="float32"), HOPPER, norm=False) == UNFUSED
    fewer = dataclasses.replace(problem, m=MAX_FUSED_ROWS)
    assert linear_config(fewer, HOPPER, norm=False) == linear_config(fewer, HOPPER)


def test_tokens_are_fed_by_row() -> None:
    from nanovllm.kernels.feed import feed_tokens_

    ids = torch.tensor([7, -1, 3, -3])
    feed_tokens_(ids, torch.tensor([40, 41, 42]))
    assert ids.tolist() == [7, 40, 3, 42]


@pytest.mark.parametrize("gpu", [H100, Gpu(108, 163 * 1024), Gpu(40, 99 * 1024), Gpu(16, 64 * 1024)])
@pytest.mark.parametrize("context", [1, 300, 512, 513, 4096, 40960])
def test_attention_policy_fits(gpu: Gpu, context: int) -> None:
    """Tiles that wait in shared memory leave room for the rest, and splits are whole tiles."""
    for num_seqs in (1, 2, 3, 4, 6, 8, 12, 16, 17, 32, 33, 64):
        for kv_heads, dim in ((8, 128), (8, 64), (1, 128), (32, 96), (2, 256)):
            config = rope_attention_config(num_seqs, kv_heads, dim, 2, context, gpu)
            tiles = max(config.num_stages - 1, 1) * 2 * config.block_n * next_power_of_2(dim) * 2
            assert config.block_n >= 16 and tiles + 12288 <= gpu.shared_memory
            assert config.min_split % config.block_n == 0 and config.splits >= 1


@pytest.mark.parametrize("gpu", [H100, HOPPER, BLACKWELL, Gpu(40, 99 * 1024), Gpu(16, 64 * 1024)])
@pytest.mark.parametrize("context", [129, 512, 513, 40960])
def test_two_attention_programs_share_an_sm(gpu: Gpu, context: int) -> None:
    """Two to six sequences of eight KV heads: registers for two programs an SM, and three programs for two SMs."""
    for num_seqs, kv_heads in ((2, 8), (3, 8), (4, 8), (6, 8), (9, 1), (12, 4)):
        programs = num_seqs * kv_heads
        config = rope_attention_config(num_seqs, kv_heads, 128, 2, context, gpu)
        assert (config.num_warps, config.num_stages, config.max_registers) == (8, 1, 128)
        assert 2 * 32 * config.num_warps * 128 <= 65536, "an SM's registers"
        assert config.splits <= 8 or context > 512
        assert config.splits == 1 or 2 * programs * config.splits <= 3 * gpu.num_sms
        more = 2 * programs * (config.splits + 1) <= 3 * gpu.num_sms
        assert not more or (context <= 512 and config.splits == 8), "as many as there is room for"


@pytest.mark.parametrize("num_seqs", [9, 12, 13, 16, 17, 32, 64])
def test_full_batches_keep_programs_for_long_sequences(num_seqs: int) -> None:
    """Fewer than one for each, so that equal lengths stay whole; none where no sequence can be long."""
    config = rope_attention_config(num_seqs, 8, 128, 2, 40960, H100)
    assert config.splits == 1 and config.slots(num_seqs) - num_seqs == min(num_seqs - 1, 31)
    assert config.keep_whole == (2 if num_seqs > 12 else 0)
    assert rope_attention_config(num_seqs, 8, 128, 2, 8192, H100).slots(num_seqs) == num_seqs


def test_a_sequence_by_itself_has_no_use_for_spare_programs() -> None:
    assert DecodeConfig(64, 4, 64, 4, 2, spare=7).slots(1) == 4


@pytest.mark.parametrize(("seqs", "dim", "size"), [(1, 128, 2), (7, 128, 2), (64, 128, 2), (4, 256, 2), (4, 128, 4)])
def test_no_other_attention_program_is_short_of_registers(seqs: int, dim: int, size: int) -> None:
    for context in (512, 4096):
        assert rope_attention_config(seqs, 8, dim, size, context, HOPPER).max_registers is None
