"""From an architecture's name to its class, and from checkpoint tensors to that class's parameters."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from nanovllm.config import ModelConfig
from nanovllm.kernels.jit import interpreting
from nanovllm.layers.attention.backend import AttentionBackend
from nanovllm.layers.linear import LinearBase
from nanovllm.layers.parallel import Build
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.mistral import MistralForCausalLM
from nanovllm.models.qwen2 import Qwen2ForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM

ARCHITECTURES: dict[str, type[LlamaForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}

_LOADER_THREADS = 4


def build_model(config: ModelConfig, max_len: int, backend: AttentionBackend, build: Build) -> LlamaForCausalLM:
    """An uninitialised model on `build.device`; ValueError names the supported architectures."""
    if config.architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {config.architecture!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[config.architecture](config, max_len, backend, build)


def load_weights(model: LlamaForCausalLM, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy checkpoint tensors (Hugging Face names) into `model`, a few at a time side by side.

    Dequantising keeps a core busy and each tensor has its own place to go, so a few threads share the work.
    ValueError for a tensor that the model has no place for, one of the wrong shape, or one that is missing.
    """
    modules = dict(model.named_modules())
    missing = expected_tensors(model)
    with ThreadPoolExecutor(_LOADER_THREADS, thread_name_prefix="nanovllm-load") as pool:
        running: deque[Future[None]] = deque()
        for name, tensor in weights:
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.config.tie_word_embeddings):
                continue  # derived data that old checkpoints carry, and the second name of a tied weight
            owner, _, _ = name.rpartition(".")
            parent, _, leaf = owner.rpartition(".")
            packed, part = model.packed_modules.get(leaf, (leaf, 0))
            module: Any = modules.get(f"{parent}.{packed}" if parent else packed)
            if name not in missing or module is None:
                raise ValueError(
                    f"tensor {name} has no place in {model.config.architecture}: "
                    "the weights do not belong to this config.json"
                )
            missing.discard(name)
            running.append(pool.submit(module.load, name, tensor, part))
            if len(running) > 2 * _LOADER_THREADS:
                running.popleft().result()
        for future in running:
            future.result()
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ValueError(
            f"the weights lack {len(missing)} of the model's tensors ({some}{', …' if len(missing) > 3 else ''}): "
            "the download is incomplete or belongs to another config.json"
        )


def expected_tensors(model: LlamaForCausalLM) -> set[str]:
    """Names of all checkpoint tensors that fill `model`, packed weights under their parts' names."""
    parts: dict[str, list[str]] = {}
    for leaf, (packed, _) in model.packed_modules.items():
        parts.setdefault(packed, []).append(leaf)
    names: set[str] = set()
    for name, _ in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        parent, _, leaf = owner.rpartition(".")
        if parent == "lm_head":  # LMHead keeps its rows in a table of its own
            names.add("lm_head.weight")
        else:
            names.update(f"{parent}.{part}.{kind}" for part in parts.get(leaf, [leaf]))
    return names


def prepare_for_inference(model: LlamaForCausalLM, fused: bool) -> None:
    """Put weights into the form that their device multiplies fastest; call once, after loading.

    `fused`: the decode chain is used, whose kernels read plain weights; on a CPU every step takes it.
    """
    if interpreting():
        return
    if fused:
        model.model.native = model.model.norm.weight.device.type == "cpu"
        return
    for module in model.modules():
        if isinstance(module, LinearBase):
            module.pack_for_cpu()
