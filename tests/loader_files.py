"""Checkpoint files for the loader's tests: tiny Hugging Face models rewritten as GGUF, the way llama.cpp does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

_ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}


def permute(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q and k of Llama: halves of a head interleaved."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(path: Path, model: PreTrainedModel, matrix_type: str = "F32", **metadata: Any) -> Path:
    """Write `model` (llama, qwen2 or qwen3); matrices in `matrix_type`, vectors in F32. Extra keys as given."""
    config = model.config
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    names = gguf.get_tensor_name_map(_ARCHITECTURES[arch], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and ".q_proj." in name:
            tensor = permute(tensor, config.num_attention_heads)
        if arch == "llama" and ".k_proj." in name:
            tensor = permute(tensor, config.num_key_value_heads)
        add_tensor(writer, names.get_name(name, (".weight", ".bias")), tensor, matrix_type)
    return finish(writer, **metadata)


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, matrix_type: str) -> None:
    """One tensor, quantised if it is a matrix."""
    kind = gguf.GGMLQuantizationType[matrix_type if tensor.dim() > 1 else "F32"]
    data = gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)
    writer.add_tensor(name, data, raw_dtype=kind)


def finish(writer: gguf.GGUFWriter, **metadata: Any) -> Path:
    """Write the file; `metadata` keys have "__" for dots."""
    adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in metadata.items():
        adders.get(type(value), writer.add_array)(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def random_blocks(
    rng: np.random.Generator, rows: int, row_bytes: int, block_bytes: int, scale_at: list[int]
) -> np.ndarray:
    """Bytes [rows, row_bytes] of a block format, random but for the fp16 scales at `scale_at` of each block."""
    blocks = rng.integers(0, 256, (rows * row_bytes // block_bytes, block_bytes), dtype=np.uint8)
    for offset in scale_at:
        scales = rng.uniform(0.01, 0.1, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, row_bytes)
