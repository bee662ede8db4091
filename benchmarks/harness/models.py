"""Published shapes of the models we measure: a config.json each, to be filled with seeded random weights.

The numbers are those of the models' own config.json on the Hugging Face hub.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=151936, hidden_size=hidden,
        intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        head_dim=128, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None,
        tie_word_embeddings=tied, attention_bias=False, hidden_act="silu", torch_dtype="bfloat16",
        bos_token_id=151643, eos_token_id=151645,
    )  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
    "Llama-3.2-1B": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256, hidden_size=2048,
        intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0,
        rope_scaling=dict(
            rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tie_word_embeddings=True, attention_bias=False, mlp_bias=False, hidden_act="silu", torch_dtype="bfloat16",
        bos_token_id=128000, eos_token_id=[128001, 128008, 128009],
    ),
}  # fmt: skip


def write_config(name: str, directory: Path) -> Path:
    """A model directory with nothing but the config.json of `name`."""
    path = directory / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPES[name], indent=1))
    return path
