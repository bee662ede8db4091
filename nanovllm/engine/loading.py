"""From a model's name to a model on its device, ready to run, with everything its files say about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.config import EngineConfig, ModelConfig
from nanovllm.layers.attention.backend import AttentionBackend, AttentionSpec, select_backend
from nanovllm.layers.parallel import Build, TensorParallel
from nanovllm.layers.rotary import context_limit
from nanovllm.loader import GenerationDefaults, ModelSource
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.registry import build_model, load_weights, prepare_for_inference
from nanovllm.utils.device import resolve_device, resolve_dtype


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


def load_model(config: EngineConfig) -> LoadedModel:
    """Resolve, build, fill and prepare a model."""
    raise ValueError("not yet")
