"""`config.json` or GGUF metadata -> `ModelConfig`.

GGUF metadata is first put into the vocabulary of config.json (`gguf_config`), so that one function checks both. What
we cannot compute faithfully is refused by name: a model that runs with a feature ignored gives wrong text silently.
Defaults of absent fields are those of the Hugging Face configuration classes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanovllm.config import DTYPES, ModelConfig
from nanovllm.loader.generation_config import as_ids, load_generation_config
from nanovllm.loader.gguf_config import from_metadata
from nanovllm.loader.gguf_file import read_gguf
from nanovllm.loader.resolve import ModelSource
from nanovllm.loader.rope_config import as_number, parse_rope

# What an absent key means, by architecture.
_QWEN = dict(num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096, max_window_layers=28)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2),
    "MistralForCausalLM": dict(
        num_key_value_heads=8, max_position_embeddings=131072, sliding_window=4096, bos_token_id=1, eos_token_id=2
    ),
    "Qwen2ForCausalLM": _QWEN,
    "Qwen3ForCausalLM": dict(_QWEN, head_dim=128),
}
_COMMON = dict(rms_norm_eps=1e-6, hidden_act="silu", dtype="float32")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def load_model_config(source: ModelSource, *, use_generation_config: bool = True) -> ModelConfig:
    """The shape of a model. ValueError, in one sentence, for what is missing, inconsistent or not supported.

    EOS ids of config.json and generation_config.json are united: chat models list their end-of-turn token in either.
    `use_generation_config=False` leaves the second out.
    """
    if source.kind == "gguf":
        return _load_gguf(source.path)
    path = source.path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: is {source.name!r} the directory of a model?")
    config = parse_config(read_json(path), str(path))
    if use_generation_config:
        more = load_generation_config(source, warn=False).eos_token_ids
        config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + more)))
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError names the file when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: fetch it again")
    return value


def _load_gguf(path: Path) -> ModelConfig:
    file = read_gguf(path)
    fields, rope_factors = from_metadata(file)
    config = parse_config(fields, path.name)
    rope = config.rope
    if rope_factors:
        rope = dataclasses.replace(rope, rope_type="llama3", factor=max(rope_factors), freq_factors=rope_factors)
        if len(rope_factors) != config.head_dim // 2:
            raise ValueError(f"{path.name} has {len(rope_factors)} RoPE factors for heads of {config.head_dim}")
    return dataclasses.replace(
        config,
        rope=rope,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
    )


def parse_config(raw: Mapping[str, Any], origin: str) -> ModelConfig:
    """Check the fields of a config.json (old and transformers-5 spellings); `origin` names the file in errors."""
    architecture = _architecture(raw, origin)
    config = {**_COMMON, **_DEFAULTS[architecture], **raw}
    _refuse_unsupported(config, origin)
    num_layers, hidden = _int(config, "num_hidden_layers", origin), _int(config, "hidden_size", origin)
    num_heads = _int(config, "num_attention_heads", origin)
    num_kv_heads, head_dim = num_heads, hidden // num_heads  # what null means
    if config.get("num_key_value_heads") is not None:
        num_kv_heads = _int(config, "num_key_value_heads", origin)
    if config.get("head_dim") is not None:
        head_dim = _int(config, "head_dim", origin)
    if num_heads % num_kv_heads:
        raise ValueError(f"{origin}: {num_heads} query heads cannot share {num_kv_heads} key-value heads evenly")
    if head_dim % 2:
        raise ValueError(f"{origin}: head_dim is {head_dim}, but rotary positions need an even one")
    max_position = _int(config, "max_position_embeddings", origin)
    bias = bool(config.get("attention_bias")) and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    bos = as_ids(config.get("bos_token_id"), "bos_token_id", origin)
    return ModelConfig(
        architecture=architecture,
        vocab_size=_int(config, "vocab_size", origin),
        hidden_size=hidden,
        intermediate_size=_int(config, "intermediate_size", origin),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position,
        rms_norm_eps=as_number(config["rms_norm_eps"], "rms_norm_eps", origin),
        rope=parse_rope(config, max_position, origin),
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        o_bias=bias,
        mlp_bias=bool(config.get("mlp_bias")) and architecture == "LlamaForCausalLM",
        dtype=_dtype(raw, origin),
        sliding_windows=_sliding_windows(config, architecture, num_layers, origin),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=as_ids(config.get("eos_token_id"), "eos_token_id", origin),
    )


def _architecture(raw: Mapping[str, Any], origin: str) -> str:
    names = raw.get("architectures") or []
    if not isinstance(names, list):
        raise ValueError(f"{origin}: architectures is {names!r}, but must be a list of names")
    for name in names:
        if name in _DEFAULTS:
            return str(name)
    by_type = {name.removesuffix("ForCausalLM").lower(): name for name in _DEFAULTS}
    if not names and raw.get("model_type") in by_type:  # a configuration that was saved without its model
        return by_type[raw["model_type"]]
    found = ", ".join(map(str, names)) or f"none named (model_type {raw.get('model_type')!r})"
    raise ValueError(f"{origin}: architecture {found} is not supported; supported are {', '.join(sorted(_DEFAULTS))}")


def _refuse_unsupported(config: Mapping[str, Any], origin: str) -> None:
    if config["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"{origin}: hidden_act {config['hidden_act']!r} is not supported; supported is silu")
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{origin}: the weights are quantised ({method}), which is not supported; use the unquantised checkpoint "
            "or a .gguf file"
        )
    for key in _EXPERTS:
        if (config.get(key) or 0) > 1:
            raise ValueError(f"{origin}: {key} is {config[key]}, but mixtures of experts are not supported")


def _int(config: Mapping[str, Any], key: str, origin: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        found = f"is {value!r}" if key in config else "is missing"
        raise ValueError(f"{origin}: {key} {found}, but must be a positive integer")
    return value


def _dtype(raw: Mapping[str, Any], origin: str) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or _COMMON["dtype"]).removeprefix("torch.")
    if name not in DTYPES[1:]:
        raise ValueError(f"{origin}: dtype {name!r} is not supported; supported are {', '.join(DTYPES[1:])}")
    return name


def _sliding_windows(
    config: Mapping[str, Any], architecture: str, num_layers: int, origin: str
) -> tuple[int | None, ...]:
    """One window a layer, () where all layers see everything.

    Hugging Face lets position i see j where i - window < j <= i: the window counts the query itself, as ours does.
    """
    window = config.get("sliding_window")
    layer_types = config.get("layer_types")
    if architecture == "LlamaForCausalLM":
        return ()
    if architecture == "MistralForCausalLM":
        slides = [window is not None] * num_layers
        if layer_types is not None and any((kind == "sliding_attention") != slides[0] for kind in layer_types):
            raise ValueError(f"{origin}: layer_types that differ between layers are not supported for {architecture}")
    else:
        window = window if config.get("use_sliding_window") else None
        slides = _qwen_layers(config, layer_types, window, num_layers, origin)
    if not any(slides):
        return ()
    size = _int({"sliding_window": window}, "sliding_window", origin)
    return tuple(size if slide else None for slide in slides)


def _qwen_layers(
    config: Mapping[str, Any], layer_types: list[str] | None, window: int | None, num_layers: int, origin: str
) -> list[bool]:
    """Which layers slide: as `layer_types` says, else those from `max_window_layers` on."""
    if layer_types is None:
        return [window is not None and layer >= config["max_window_layers"] for layer in range(num_layers)]
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown or len(layer_types) != num_layers:
        raise ValueError(
            f"{origin}: layer_types must name full_attention or sliding_attention for each of {num_layers} layers, "
            f"got {len(layer_types)} entries{f' with {sorted(unknown)}' if unknown else ''}"
        )
    slides = [kind == "sliding_attention" for kind in layer_types]
    if any(slides) and window is None:
        raise ValueError(f"{origin}: layer_types asks for sliding_attention, but use_sliding_window is not set")
    return slides
