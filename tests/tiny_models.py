"""Tiny random Hugging Face models of every family: the reference that our models are measured against.

Weights are scaled up from the default initialisation, biases and norms are made non-trivial, so that a dropped bias,
norm or rotation changes the logits by far more than the tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_BASE: dict[str, Any] = dict(
    vocab_size=211,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


CASES: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama"),
    "llama_tied": dict(model_type="llama", tie_word_embeddings=True),
    "llama_mha_odd": dict(model_type="llama", num_key_value_heads=4, head_dim=32, intermediate_size=88),
    "llama_bias": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "llama_linear": dict(model_type="llama", **_rope(rope_type="linear", factor=4.0)),
    "llama_dynamic": dict(model_type="llama", max_position_embeddings=48, **_rope(rope_type="dynamic", factor=4.0)),
    "llama_llama3": dict(
        model_type="llama",
        **_rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama_yarn": dict(model_type="llama", **_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)),
    "mistral": dict(model_type="mistral", sliding_window=16),
    "mistral_full": dict(model_type="mistral", sliding_window=None),
    "qwen2": dict(model_type="qwen2"),
    "qwen2_window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen3": dict(model_type="qwen3", head_dim=32),
    "qwen3_tied": dict(model_type="qwen3", head_dim=16, tie_word_embeddings=True),
}


def make_model(case: str, seed: int = 0) -> PreTrainedModel:
    """The Hugging Face model of a case: fp32, eval mode, every parameter random."""
    options = {**_BASE, **CASES[case]}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and bool((parameter == 1).all()):  # a norm: near one, never all ones
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.1 if parameter.dim() == 2 else 0.3))
    return model.eval()


def save_model(case: str, directory: Path, seed: int = 0, **save: Any) -> PreTrainedModel:
    """Write a case to `directory` as safetensors; returns the Hugging Face model."""
    model = make_model(case, seed)
    model.save_pretrained(directory, **save)
    return model


@torch.no_grad()
def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Teacher-forced logits [T, vocab] of one forward over all tokens."""
    return model(torch.tensor([token_ids]), use_cache=False).logits[0]
