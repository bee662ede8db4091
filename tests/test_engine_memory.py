"""Sizes that no machine has memory for: one sentence that names the option, before an allocator is asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig

from nanovllm import LLM
from nanovllm.config import EngineConfig, ModelConfig, RopeConfig
from nanovllm.engine.loading import LoadedModel
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.layers.parallel import TensorParallel


def shape(directory: Path) -> str:
    """A tiny model that claims a context without end."""
    config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    config.max_position_embeddings, config.num_attention_heads, config.num_key_value_heads = 10**20, 1, 1
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    return str(directory)


def test_block_counts_beyond_any_allocator_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="10000000000000000000 KV blocks take .* GiB, more than cpu has left"):
        LLM(shape(tmp_path), num_kvcache_blocks=10**19, max_model_len=128, load_format="dummy")


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
@pytest.mark.parametrize("value", [10**12, 10**19])
def test_buffers_larger_than_memory_are_one_sentence(tmp_path: Path, name: str, value: int) -> None:
    options: dict[str, Any] = {"max_model_len": 128, name: value}
    sentence = rf"^{name}={value} needs buffers of .* GiB .*, and this machine has .* GiB of memory: lower it$"
    with pytest.raises(ValueError, match=sentence):
        LLM(shape(tmp_path), load_format="dummy", **options)


def test_a_step_larger_than_the_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: ModelRunner) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(ModelRunner, "_profile", too_large)
    runner = ModelRunner.__new__(ModelRunner)
    runner.config, runner.token_budget = EngineConfig("x", max_num_seqs=4), 10**6
    runner.device, runner.dtype = torch.device("cuda", 0), torch.bfloat16
    runner.model_config = ModelConfig("LlamaForCausalLM", 100, 64, 64, 1, 1, 1, 64, 100, 1e-6, RopeConfig())
    runner.loaded = cast(LoadedModel, SimpleNamespace(tp=TensorParallel()))
    with pytest.raises(ValueError, match="cuda:0 has no memory left for a step of max_num_batched_tokens=1000000 with"):
        runner._plan_kv_cache()
