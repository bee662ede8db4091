"""Weights of a GGUF file under Hugging Face's names, dequantised to floating point while they are copied.

The arithmetic of the block formats is the `gguf` package's. What is ours: names, and the order of rows. llama.cpp
rotates neighbouring elements (2i, 2i + 1) of a Llama head where Hugging Face rotates (i, i + d/2), so its converter
permutes the rows of q and k; that is undone here. Qwen's are stored as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

import torch

from nanovllm.config import ModelConfig
from nanovllm.loader.gguf_file import GGUFFile, GGUFTensor
from nanovllm.loader.mapped import CheckpointTensor, map_bytes

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name we do not know is returned as it is."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    return _GLOBAL.get(name, name)


def open_tensor(file: GGUFFile, stored: GGUFTensor, config: ModelConfig) -> CheckpointTensor:
    """A tensor in Hugging Face's layout, read and dequantised when it is copied; quantised types become fp32."""
    read_rows = _row_reader(file, stored)
    is_qk = re.fullmatch(r"blk\.\d+\.attn_[qk]\.(weight|bias)", stored.name)
    if is_qk and file.metadata["general.architecture"] == "llama":
        read_rows = _unpermuted(read_rows, config.head_dim, stored.shape[0])
    return CheckpointTensor(stored.shape, _PLAIN.get(stored.type, torch.float32), read_rows)


def _row_reader(file: GGUFFile, stored: GGUFTensor) -> Callable[[int, int], torch.Tensor]:
    def raw_rows(a: int, b: int) -> torch.Tensor:
        return map_bytes(file.path, stored.offset + a * stored.row_bytes, (b - a) * stored.row_bytes)

    if stored.type in _PLAIN:
        dtype = _PLAIN[stored.type]
        return lambda a, b: raw_rows(a, b).view(dtype).view(b - a, *stored.shape[1:])

    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[stored.type]

    def read_rows(a: int, b: int) -> torch.Tensor:
        # As one long row: the package works in groups of 16 rows, which is slow for many short ones.
        flat = dequantize(raw_rows(a, b).numpy().reshape(1, -1), kind)
        return torch.from_numpy(flat).view(b - a, *stored.shape[1:])

    return read_rows


def _unpermuted(
    read_rows: Callable[[int, int], torch.Tensor], head_dim: int, num_rows: int
) -> Callable[[int, int], torch.Tensor]:
    """Rows of a head as Hugging Face orders them: row s * d/2 + i lies at 2i + s in the file (s = 0, 1)."""

    def read(a: int, b: int) -> torch.Tensor:
        first, last = a // head_dim * head_dim, min(-(-b // head_dim) * head_dim, num_rows)  # whole heads
        rows = read_rows(first, last)
        heads = rows.view(-1, head_dim // 2, 2, prod(rows.shape[1:]))
        return heads.transpose(1, 2).reshape(rows.shape)[a - first : b - first]

    return read
