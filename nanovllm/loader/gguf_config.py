"""GGUF metadata in the vocabulary of config.json (llama.cpp's keys, `convert_hf_to_gguf.py` being their source)."""

from __future__ import annotations

import math
import struct
from collections import Counter
from typing import Any

from nanovllm.loader.gguf_file import ROPE_FACTORS, GGUFFile

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DTYPES = {"F32": "float32", "F16": "float16"}  # BF16 and quantised weights: bfloat16
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>")  # files converted before the eot key existed end turns with these
_CONTROL = 3  # token type


def from_metadata(file: GGUFFile) -> tuple[dict[str, Any], tuple[float, ...]]:
    """(config.json's fields, the divisors of RoPE frequencies or ()); ValueError for an unknown architecture."""
    name = file.require("general.architecture")
    if name not in _ARCHITECTURES:
        raise ValueError(
            f"{file.path.name}: GGUF architecture {name!r} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )

    def optional(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{name}.{key}", default)

    heads, hidden = file.require(f"{name}.attention.head_count"), file.require(f"{name}.embedding_length")
    kv_heads = optional("attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise ValueError(f"{file.path.name}: head counts that differ between layers are not supported")
    head_dim = optional("attention.key_length", hidden // heads)
    if optional("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{file.path.name}: values of another length than keys are not supported")
    window = optional("attention.sliding_window") or None
    fields = {
        "architectures": ["MistralForCausalLM" if name == "llama" and window else _ARCHITECTURES[name]],
        "vocab_size": _tensor_rows(file, "token_embd.weight"),
        "hidden_size": hidden,
        "intermediate_size": file.require(f"{name}.feed_forward_length"),
        "num_hidden_layers": file.require(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": file.require(f"{name}.context_length"),
        "rms_norm_eps": file.require(f"{name}.attention.layer_norm_rms_epsilon"),
        "num_experts": optional("expert_count"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "sliding_window": window,
        "dtype": _dtype(file),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_ids(file),
        "rope_parameters": _rope(file, name),
        "partial_rotary_factor": optional("rope.dimension_count", head_dim) / head_dim,
    }
    return fields, _rope_factors(file)


def _tensor_rows(file: GGUFFile, name: str) -> int:
    if name not in file.tensors:
        raise ValueError(f"{file.path.name} has no tensor {name}: perhaps it is one part of several")
    return file.tensors[name].shape[0]


def _rope(file: GGUFFile, name: str) -> dict[str, Any]:
    scaling = {
        key.removeprefix(f"{name}.rope.scaling."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{name}.rope.scaling.")
    }
    rope_type = scaling.get("type", "none")
    rope: dict[str, Any] = {
        "rope_type": "default" if rope_type == "none" else rope_type,
        "rope_theta": file.metadata.get(f"{name}.rope.freq_base", 10000.0),
    }
    if rope_type in ("linear", "yarn"):
        rope["factor"] = scaling.get("factor")
    if rope_type == "yarn":
        rope["original_max_position_embeddings"] = scaling.get("original_context_length")
        rope["beta_fast"], rope["beta_slow"] = scaling.get("yarn_beta_fast"), scaling.get("yarn_beta_slow")
        if "attn_factor" in scaling:  # llama.cpp multiplies YaRN's own factor by this one
            rope["attention_factor"] = scaling["attn_factor"] * (0.1 * math.log(scaling["factor"]) + 1.0)
    return rope


def _rope_factors(file: GGUFFile) -> tuple[float, ...]:
    """Llama 3's scaling as the file has it: one divisor for each rotary pair, fp32."""
    stored = file.tensors.get(ROPE_FACTORS)
    if stored is None:
        return ()
    if stored.type != "F32":
        raise ValueError(f"{file.path.name}: {ROPE_FACTORS} has type {stored.type}, expected F32")
    with file.path.open("rb") as stream:
        stream.seek(stored.offset)
        return struct.unpack(f"<{stored.shape[0]}f", stream.read(stored.size))


def _dtype(file: GGUFFile) -> str:
    """The dtype of most weights; norms, which are fp32 in every file, do not count."""
    counts = Counter(tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1)
    most = counts.most_common(1)
    return _DTYPES.get(most[0][0], "bfloat16") if most else "bfloat16"


def _eos_ids(file: GGUFFile) -> list[int]:
    """End of text, of turn and of message, and control tokens known to end a turn."""
    ids = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    tokens, types = file.metadata.get("tokenizer.ggml.tokens", []), file.metadata.get("tokenizer.ggml.token_type", [])
    ids += [i for i, kind in enumerate(types) if kind == _CONTROL and tokens[i] in _TURN_ENDS]
    return list(dict.fromkeys(i for i in ids if i is not None))
