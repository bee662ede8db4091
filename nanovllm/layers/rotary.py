"""Rotary position embedding: the angles of every position, for each scaling rule that we support.

A table [positions, head_dim] in fp32 holds cos in its first half and sin in its second; the attention layer's
kernel looks rows up by position. The rules follow Hugging Face's `modeling_rope_utils.py`, which is their de
facto specification: RoFormer (arXiv 2104.09864), linear interpolation (arXiv 2306.15595), dynamic NTK, YaRN
(arXiv 2309.00071) and Llama 3's frequency bands.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from nanovllm.config import ModelConfig, RopeConfig


class RopeRows(NamedTuple):
    """Where the tokens of a step find their angles: token t uses `table[rows[t]]`."""

    table: torch.Tensor  # [rows, head_dim] fp32, cos | sin
    rows: torch.Tensor  # [T] int64


def context_limit(config: ModelConfig) -> int:
    """Longest context (tokens) that the position embedding is meant for."""
    rope = config.rope
    if rope.rope_type in ("linear", "dynamic"):
        return int(config.max_position_embeddings * rope.factor)
    if rope.rope_type == "yarn" and rope.original_max_position:
        return max(config.max_position_embeddings, int(rope.original_max_position * rope.factor))
    return config.max_position_embeddings


class RotaryEmbedding:
    """Angles for positions 0 … max_len - 1 of one model, shared by all its layers."""

    def __init__(self, config: ModelConfig, max_len: int, device: torch.device) -> None:
        self.rope, self.head_dim, self.trained_len = config.rope, config.head_dim, config.max_position_embeddings
        positions = torch.arange(max_len, dtype=torch.float32)
        if self.rope.rope_type == "dynamic":
            # A generated token at position p is computed when the sequence has p + 1 tokens.
            table = self._dynamic_table(positions, positions + 1)
        else:
            inv_freq, scale = inverse_frequencies(self.rope, self.head_dim, self.trained_len)
            table = _cos_sin(positions[:, None] * inv_freq) * scale
        self.table = table.to(device)

    def rows(self, positions: torch.Tensor, prompt_lens: torch.Tensor | None = None) -> RopeRows:
        """Rows for tokens at `positions` [T] int64.

        `prompt_lens` [T], given only for dynamic NTK, is the length of the prompt that each token belongs to: a
        prompt longer than the trained context is rotated as a whole by its own length, as Hugging Face does.
        """
        if prompt_lens is None:
            return RopeRows(self.table, positions)
        lengths = torch.maximum(prompt_lens, positions + 1)
        table = self._dynamic_table(positions.float(), lengths)
        return RopeRows(table, torch.arange(len(positions), device=positions.device))

    def needs_prompt_lens(self, prompt_len: int) -> bool:
        """Whether a prompt of this length changes its own rotation (dynamic NTK beyond the trained context)."""
        return self.rope.rope_type == "dynamic" and prompt_len > self.trained_len

    def _dynamic_table(self, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Dynamic NTK: θ grows with the length of the sequence once it exceeds the trained context."""
        dim, factor = self.head_dim, self.rope.factor
        growth = factor * lengths.double().clamp(min=self.trained_len) / self.trained_len - (factor - 1)
        base = (self.rope.theta * growth ** (dim / (dim - 2))).float()
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        return _cos_sin(positions[:, None] * (1.0 / base[:, None] ** exponents))


def inverse_frequencies(rope: RopeConfig, head_dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    """Radians per position of each rotary pair [head_dim / 2] fp32, and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.freq_factors is not None:
        return plain / torch.tensor(rope.freq_factors, dtype=torch.float32), 1.0
    if rope.rope_type == "linear":
        return plain / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(plain, rope, max_position), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, max_position), _yarn_attention_factor(rope)
    if rope.rope_type == "default":
        return plain, 1.0
    raise ValueError(f"RoPE type {rope.rope_type!r} has no fixed frequencies")


def _cos_sin(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _llama3(plain: torch.Tensor, rope: RopeConfig, max_position: int) -> torch.Tensor:
    """Llama 3: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    trained = rope.original_max_position or max_position
    wavelength = 2 * math.pi / plain
    blend = (trained / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * plain / rope.factor + blend * plain
    stretched = torch.where(wavelength > trained / rope.low_freq_factor, plain / rope.factor, blended)
    return torch.where(wavelength < trained / rope.high_freq_factor, plain, stretched)


def _yarn(rope: RopeConfig, head_dim: int, max_position: int) -> torch.Tensor:
    """YaRN: dimensions that turn often keep their frequency, slow ones are interpolated, a ramp lies between."""
    trained = rope.original_max_position or max_position

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequency = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    keep = 1 - ramp  # the order of operations below is the reference's: angles are sensitive to the last bit
    return 1.0 / (rope.factor * frequency) * (1 - keep) + 1.0 / frequency * keep


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
