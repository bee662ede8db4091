"""From a model's name to a model on its device, ready to run, with everything its files say about it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from nanovllm.config import EngineConfig, ModelConfig
from nanovllm.engine.input_builder import staging_bytes
from nanovllm.engine.staging import IN_FLIGHT
from nanovllm.kernels.chain_config import chain_rows
from nanovllm.kernels.jit import gpu_of
from nanovllm.layers.attention.backend import AttentionBackend, AttentionSpec, select_backend
from nanovllm.layers.fused_norm_linear import why_not_fused
from nanovllm.layers.parallel import Build, TensorParallel
from nanovllm.layers.rotary import context_limit
from nanovllm.loader import GenerationDefaults, ModelSource, load_generation_config, load_model_config, resolve_model
from nanovllm.loader.dummy import dummy_weights
from nanovllm.loader.weights import iter_weights
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.registry import build_model, load_weights, prepare_for_inference
from nanovllm.utils.device import host_memory, resolve_device, resolve_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model with its weights in place, and where it came from."""

    source: ModelSource
    config: ModelConfig
    generation: GenerationDefaults
    model: LlamaForCausalLM
    backend: AttentionBackend
    device: torch.device
    dtype: torch.dtype
    tp: TensorParallel
    max_model_len: int
    fused_rows: int  # decode steps of at most so many rows take the GPU's fused kernels; 0 = none


def load_model(config: EngineConfig) -> LoadedModel:
    """Find, build and fill a model; every mistake in its files or in `config` is a ValueError or FileNotFoundError."""
    if config.tensor_parallel_size > 1:
        raise ValueError(
            f"tensor_parallel_size={config.tensor_parallel_size} needs several processes, which do not exist yet: use 1"
        )
    device = resolve_device(config.device)
    source = resolve_model(config.model, weights=config.load_format != "dummy")
    model_config = load_model_config(source, use_generation_config=config.generation_config)
    generation = load_generation_config(source) if config.generation_config else GenerationDefaults()
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    max_len = resolve_max_model_len(config.max_model_len, model_config)
    require_memory(config.max_num_seqs, config.token_budget(device.type), max_len, config, model_config)
    tp = TensorParallel()
    spec = AttentionSpec(
        device,
        dtype,
        model_config.num_heads,
        model_config.num_kv_heads,
        model_config.head_dim,
        config.kvcache_block_size,
    )
    backend = select_backend(config.attention_backend, spec)
    fused = resolve_fusion(config.fusion, spec, backend.name, tp.world_size)
    model = build_model(model_config, max_len, backend, Build(dtype, device, tp)).eval()
    if config.load_format == "dummy":
        dummy_weights(model.named_parameters(), config.seed)
    else:
        load_weights(model, iter_weights(source, model_config, show_progress=config.show_progress))
    prepare_for_inference(model, fused)
    fused_rows = 0 if not fused or model.model.native else chain_rows(dtype.itemsize, gpu_of(device))
    return LoadedModel(source, model_config, generation, model, backend, device, dtype, tp, max_len, fused_rows)


def resolve_fusion(wanted: str, spec: AttentionSpec, backend: str, world_size: int) -> bool:
    """Whether the fused kernels are used; ValueError, with the reasons, for "on" where they cannot be."""
    reasons = [] if wanted == "off" else why_not_fused(spec, backend, world_size)
    if wanted == "on" and reasons:
        raise ValueError(f'fusion="on" cannot be had: {"; ".join(reasons)}; use "auto" or "off"')
    if wanted == "off" or reasons:
        logger.info("layers are not fused: %s", "; ".join(reasons) or 'fusion="off"')
        return False
    return True


def resolve_max_model_len(wanted: int | None, model: ModelConfig) -> int:
    """The context length to serve; ValueError when more is asked for than the positions are made for."""
    limit = context_limit(model)
    if wanted is None:
        return limit
    if wanted > limit:
        raise ValueError(
            f"max_model_len={wanted} exceeds the model's context of {limit} tokens: lower it, or extend the model "
            "with a rope_scaling entry in config.json"
        )
    return wanted


def require_memory(rows: int, tokens: int, max_len: int, config: EngineConfig, model: ModelConfig) -> None:
    """ValueError if the machine has less memory than the buffers take whose size these three numbers decide.

    `rows` sequences of `max_len` tokens, `tokens` a step: inputs on the host and in pinned slots, and the rotary table.
    """

    def needed(max_num_seqs: int = rows, max_num_batched_tokens: int = tokens, max_model_len: int = max_len) -> int:
        inputs = staging_bytes(max_num_seqs, max_num_batched_tokens, max_model_len, config.kvcache_block_size)
        return (1 + IN_FLIGHT) * sum(inputs) + max_model_len * model.head_dim * 4

    total, memory = needed(), host_memory()
    if total > memory:
        given = {"max_num_seqs": rows, "max_num_batched_tokens": tokens, "max_model_len": max_len}
        largest = min(given, key=lambda name: needed(**{name: 1}))  # what is best lowered
        raise ValueError(
            f"{largest}={given[largest]} needs buffers of {total / 2**30:,.1f} GiB with the other options as they are, "
            f"and this machine has {memory / 2**30:,.1f} GiB of memory: lower it"
        )
