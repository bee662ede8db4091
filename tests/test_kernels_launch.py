"""The launch policy as a policy, the lazy `jit`, and the refusals of the public functions."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from nanovllm.kernels import cpu_linear, jit, launch_config, norm, reference
from nanovllm.kernels.decode_attention import decode_attention
from nanovllm.kernels.kv_cache import check_cache
from nanovllm.kernels.launch_config import (
    H100,
    Gpu,
    decode_config,
    next_power_of_2,
    prefill_config,
    rms_norm_config,
    rope_config,
)
from nanovllm.kernels.rope import qk_norm_rope_store

CONSUMER = Gpu(num_sms=82, shared_memory=99 * 1024)  # an RTX 3090


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_2(n: int, power: int) -> None:
    assert next_power_of_2(n) == power


@pytest.mark.parametrize("num_seqs", [1, 3, 16, 131, 512])
@pytest.mark.parametrize("kv_heads", [1, 8, 32])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("longest", [1, 100, 4096, 131072])
def test_decode_config_is_valid(num_seqs: int, kv_heads: int, element_size: int, longest: int) -> None:
    for head_dim, gpu in itertools.product((64, 80, 128, 256), (H100, CONSUMER)):
        config = decode_config(num_seqs, kv_heads, head_dim, element_size, longest, gpu)
        assert next_power_of_2(config.block_n) == config.block_n >= 16
        assert config.min_split % config.block_n == 0
        assert config.splits >= 1
        assert (config.splits - 1) * config.min_split < longest  # no split that could never hold a key
        tiles = 2 * config.num_stages * config.block_n * next_power_of_2(head_dim) * element_size
        assert tiles <= gpu.shared_memory


def test_decode_splits_a_lone_sequence_and_not_a_full_batch() -> None:
    lone = decode_config(1, 8, 128, 2, 4096, H100)
    assert lone.splits * 8 >= 0.9 * H100.num_sms
    crowd = decode_config(256, 8, 128, 2, 4096, H100)
    assert crowd.min_split > lone.min_split
    assert crowd.splits > 1  # one long sequence among short ones is still shared out


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 71])
def test_prefill_config_is_valid(group: int) -> None:
    for tokens in (1, 17, 500, 8192):
        for element_size, head_dim, gpu in itertools.product((2, 4), (64, 96, 128, 256), (H100, CONSUMER)):
            config = prefill_config(tokens, 4 * group, group, head_dim, element_size, gpu)
            assert group % config.pack == 0
            assert config.block_m % config.pack == 0
            assert min(config.block_m, config.block_n) >= 16
            rows = config.block_m + 2 * config.num_stages * config.block_n
            assert rows * next_power_of_2(head_dim) * element_size <= gpu.shared_memory


def test_row_configs_cover_their_rows() -> None:
    for rows in (1, 64, 8192):
        for width in (1, 100, 1024, 16384):
            config = rms_norm_config(rows, width)
            assert config.block >= width
            assert 1 <= config.num_warps <= 16
        assert rope_config(rows, 9, 3).heads >= 1


def test_importing_every_kernel_needs_no_triton() -> None:
    """With Triton made unimportable, modules import and CPU tensors take the reference bodies."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from nanovllm.kernels import activation, decode_attention, kv_cache, norm, prefill_attention, rope\n"
        "assert norm.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6).shape == (2, 8)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_cpu_tensors_do_not_import_triton() -> None:
    code = (
        "import sys, torch\n"
        "from nanovllm.kernels.norm import rms_norm\n"
        "rms_norm(torch.ones(2, 8), torch.ones(8), 1e-6)\n"
        "assert not any(name.split('.')[0] == 'triton' for name in sys.modules), 'triton was imported'\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.interpret
def test_interpreter_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public call under TRITON_INTERPRET=1 is the kernel and not the reference body."""
    monkeypatch.setattr(reference, "rms_norm", None)
    x = torch.randn(2, 8)
    torch.testing.assert_close(norm.rms_norm(x, torch.ones(8), 0.0), x / x.square().mean(-1, keepdim=True).sqrt())


@pytest.mark.interpret
def test_interpreter_refuses_bfloat16() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        norm.rms_norm(torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16), 1e-6)


@pytest.mark.interpret
def test_mismatched_shapes_are_refused() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\)"):
        norm.rms_norm(x, torch.ones(9), 1e-6)
    with pytest.raises(ValueError, match="must match x"):
        norm.add_rms_norm(x, torch.zeros(3, 8), torch.ones(8), 1e-6)
    cache = torch.zeros(2, 1, 4, 8)
    lengths, table = torch.ones(2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="contiguous within a token"):
        decode_attention(torch.zeros(2, 8, 2).transpose(1, 2), cache, cache, table, lengths, 1.0)


def test_wrong_cache_layout_is_refused() -> None:
    cache = torch.zeros(2, 4, 8, 16)
    with pytest.raises(ValueError, match="num_blocks, num_kv_heads"):
        check_cache(cache, torch.zeros(2, 4, 8))
    with pytest.raises(ValueError, match="k_cache must be contiguous within a block"):
        check_cache(cache.transpose(1, 2), cache.transpose(1, 2))
    with pytest.raises(ValueError, match="slot_mapping must be int64"):
        check_cache(cache, cache, torch.zeros(2, dtype=torch.int32))


def test_one_norm_weight_without_the_other_is_refused() -> None:
    cache, ints = torch.zeros(2, 1, 4, 8), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="together"):
        qk_norm_rope_store(torch.zeros(1, 24), torch.ones(8), None, 1e-6, torch.zeros(4, 8), ints, cache, cache, ints)


def test_cuda_without_triton_falls_back_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jit, "triton_installed", lambda: False)
    jit._warn_without_triton.cache_clear()

    class OnCuda:
        is_cuda = True

    assert not jit.use_triton(OnCuda())  # type: ignore[arg-type]
    assert "Triton is not installed" in caplog.text


def test_launch_config_is_pure() -> None:
    assert not {"torch", "triton"} & set(vars(launch_config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpus_without_avx512_do_not_pack_bfloat16(dtype: torch.dtype) -> None:
    """What is said to be packable is: loading a model in bfloat16 failed on CPUs whose oneDNN has no such kernels."""
    x, weight = torch.randn(3, 64).to(dtype), torch.randn(48, 64).to(dtype)
    if cpu_linear.can_pack(weight):
        y = cpu_linear.packed_linear(x, cpu_linear.pack(weight), None)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight))
    assert cpu_linear.can_pack(weight) or dtype != torch.float32
