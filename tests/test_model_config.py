"""config.json and GGUF metadata -> ModelConfig, against Hugging Face's own configuration classes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from loader_files import write_gguf
from tiny_models import CASES, make_model, save_model
from transformers import AutoConfig

from nanovllm.config import ModelConfig
from nanovllm.loader import ModelSource, load_generation_config, load_model_config, resolve_model
from nanovllm.loader.model_config import parse_config

LLAMA: dict[str, Any] = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
)
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
YARN = dict(factor=4.0, original_max_position_embeddings=32768)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)

CONFIGS: dict[str, dict[str, Any]] = {
    "llama defaults": LLAMA,
    "null kv heads and head_dim": {**LLAMA, "num_key_value_heads": None, "head_dim": None},
    "explicit head_dim, bias": {**LLAMA, "head_dim": 32, "attention_bias": True, "mlp_bias": True},
    "old rope": {**LLAMA, "rope_theta": 5e5, "torch_dtype": "float16", "tie_word_embeddings": True},
    "old linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "old dynamic": {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "old llama3": {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "new llama3": {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "old yarn": {**QWEN2, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", **YARN}},
    "new yarn": {**QWEN3, "dtype": "bfloat16", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
    "yarn, all options": {
        **QWEN3,
        "rope_parameters": dict(
            rope_type="yarn", rope_theta=1e6, beta_fast=16.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.5, **YARN
        ),
    },
    "yarn, length outside": {
        **QWEN2,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.5},
    },
    "qwen2 defaults": {key: value for key, value in QWEN2.items() if key != "num_key_value_heads"}
    | {"num_attention_heads": 32},
    "qwen2 window unused": {**QWEN2, "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2},
    "qwen2 window": {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen2 layer_types": {
        **QWEN2,
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3 defaults": QWEN3,
    "qwen3 bias": {**QWEN3, "attention_bias": True, "head_dim": 16},
    "mistral defaults": MISTRAL,
    "mistral without window": {**MISTRAL, "sliding_window": None},
    "mistral window": {**MISTRAL, "sliding_window": 8},
    "several eos": {**LLAMA, "eos_token_id": [5, 6], "bos_token_id": 3},
}


def write_config(directory: Path, config: dict[str, Any], **files: Any) -> ModelConfig:
    for name, content in {"config": config, **files}.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return load_model_config(resolve_model(str(directory)))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_hugging_face(name: str, tmp_path: Path) -> None:
    ours, theirs = write_config(tmp_path, CONFIGS[name]), AutoConfig.from_pretrained(tmp_path)
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    same = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "rms_norm_eps")
    for field in (*same, "tie_word_embeddings", "bos_token_id"):
        assert getattr(ours, field) == getattr(theirs, field), field
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    assert ours.dtype == str(theirs.dtype or "float32").removeprefix("torch.")
    kind = theirs.model_type
    assert ours.qkv_bias == (kind == "qwen2" or getattr(theirs, "attention_bias", False))
    assert ours.o_bias == getattr(theirs, "attention_bias", False)
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    window = getattr(theirs, "sliding_window", None)
    expected = [window if kind == "sliding_attention" else None for kind in types]
    assert [ours.window(layer) for layer in range(ours.num_layers)] == expected
    theirs.standardize_rope_params()  # as their rotary embedding does before it computes
    rope = theirs.rope_parameters
    assert ours.rope.rope_type == rope["rope_type"] and ours.rope.theta == rope["rope_theta"]
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale")
    for key in numbers:
        assert rope.get(key) is None or getattr(ours.rope, key) == rope[key], key
    assert ours.rope.mscale_all_dim == rope.get("mscale_all_dim")
    assert ours.rope.original_max_position == rope.get("original_max_position_embeddings")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not supported; supported are Llama"),
    "no architecture": (
        {"architectures": None, "model_type": "gemma"},
        "none named .model_type 'gemma'. is not supported",
    ),
    "longrope": ({"rope_scaling": {"type": "longrope"}}, "'longrope' is not supported; supported are default, linear"),
    "su": ({"rope_scaling": {"type": "su", "factor": 2}}, "RoPE type 'su'"),
    "mrope": ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "RoPE type 'mrope'"),
    "mrope by key": ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "'mrope_section' is not"),
    "per layer type": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type .full_attention"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "'linear' needs 'factor'"),
    "factor as text": ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor is 'two', but must be"),
    "factor 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0, but must be a positive number"),
    "scaling as number": ({"rope_scaling": 5}, "rotary parameters are 5, but must be an object"),
    "no eps": ({"rms_norm_eps": None}, "rms_norm_eps is None, but must be a positive number"),
    "llama3 incomplete": ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "needs 'low_freq_factor'"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "partial inside": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "is 0.5"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported is silu"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\)"),
    "experts": ({"num_local_experts": 8}, "num_local_experts is 8, but mixtures of experts"),
    "missing": ({"hidden_size": None}, "hidden_size is None, but must be a positive integer"),
    "wrong kind": ({"vocab_size": "many"}, "vocab_size is 'many'"),
    "heads": ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
    "odd head": ({"head_dim": 17}, "head_dim is 17"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
    "eos": ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', but must be an integer or a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_it_would_ignore(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        parse_config({**LLAMA, **change}, "config.json")


def test_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="some/config.json: hidden_size is missing, but must be a positive integer"):
        parse_config({key: value for key, value in LLAMA.items() if key != "hidden_size"}, "some/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"]}, "each of 4 layers, got 1 entries"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "use_sliding_window is not set"),
    ],
)
def test_refuses_layer_types(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({**QWEN2, **change}, "config.json")


def test_generation_config_names_what_it_cannot_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    neutral = {"typical_p": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": []}
    for asked, said in (
        ({}, ""),
        ({"suppress_tokens": [5], "no_repeat_ngram_size": 3}, "suppress_tokens, no_repeat_ngram_size"),
        ({"forced_bos_token_id": 0}, "forced_bos_token_id"),
        ({"no_repeat_ngram_size": 1, "forced_eos_token_id": 1}, "forced_eos_token_id, no_repeat_ngram_size"),
    ):
        caplog.clear()
        write_config(tmp_path, LLAMA, generation_config={**neutral, **asked})
        assert not caplog.text, "it is said once, when the defaults are read"
        load_generation_config(resolve_model(str(tmp_path)))
        assert said in caplog.text and bool(caplog.text) == bool(said)


def test_generation_config_adds_eos_ids_and_defaults(tmp_path: Path) -> None:
    generation = dict(eos_token_id=[7, 2], temperature=0.6, top_p=0.95, top_k=20, do_sample=False)
    config = write_config(tmp_path, {**LLAMA, "eos_token_id": 2}, generation_config=generation)
    assert config.eos_token_ids == (2, 7)
    source = resolve_model(str(tmp_path))
    assert load_model_config(source, use_generation_config=False).eos_token_ids == (2,)
    defaults = load_generation_config(source)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.95, 20)
    assert defaults.min_p is None and defaults.repetition_penalty is None
    (tmp_path / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(ValueError, match="temperature is 'hot', but must be a number"):
        load_generation_config(source)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match="generation_config.json holds no JSON object"):
        load_generation_config(source)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        load_model_config(source)


@pytest.mark.parametrize("case", ["llama", "llama_tied", "llama_bias", "llama_mha_odd", "qwen2", "qwen3", "qwen3_tied"])
def test_gguf_equals_config_json(case: str, tmp_path: Path) -> None:
    model = save_model(case, tmp_path)
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer__ggml__eos_token_id=2, tokenizer__ggml__bos_token_id=1)
    expected = load_model_config(resolve_model(str(tmp_path)))
    found = load_model_config(resolve_model(str(path)))
    assert found.rms_norm_eps == pytest.approx(expected.rms_norm_eps, rel=1e-6)  # the file holds fp32
    assert found == dataclasses.replace(expected, rms_norm_eps=found.rms_norm_eps)
    assert CASES[case]["model_type"] in found.architecture.lower()


def test_gguf_metadata(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__eot_token_id": 5,
        "tokenizer__ggml__tokens": ["a", "b", "c", "<|im_end|>", "<|eot_id|>", "d"],
        "tokenizer__ggml__token_type": [1, 1, 3, 3, 1, 3],
        "general__sampling__temp": 0.25,
        "llama__rope__scaling__type": "yarn",
        "llama__rope__scaling__factor": 4.0,
        "llama__rope__scaling__original_context_length": 64,
    }
    source = resolve_model(str(write_gguf(tmp_path / "m.gguf", make_model("llama"), "F16", **keys)))
    config = load_model_config(source)
    assert config.eos_token_ids == (2, 5, 3)  # <|eot_id|> is no control token here
    assert config.dtype == "float16"
    assert (config.rope.rope_type, config.rope.factor, config.rope.original_max_position) == ("yarn", 4.0, 64)
    assert load_generation_config(source).temperature == 0.25


def test_gguf_refusals(tmp_path: Path) -> None:
    model = make_model("llama")
    for key, value, message in (
        ("llama__expert_count", 4, "num_experts is 4"),
        ("llama__rope__scaling__type", "longrope", "RoPE type 'longrope'"),
        ("llama__rope__dimension_count", 8, "partial_rotary_factor is 0.5"),
        ("llama__attention__value_length", 8, "values of another length than keys"),
    ):
        path = write_gguf(tmp_path / "m.gguf", model, **{key: value})
        with pytest.raises(ValueError, match=message):
            load_model_config(resolve_model(str(path)))
    length = (5).to_bytes(8, "little")
    path.write_bytes(path.read_bytes().replace(length + b"llama", length + b"gemma"))
    with pytest.raises(ValueError, match="GGUF architecture 'gemma' is not supported; supported are llama, qwen2"):
        load_model_config(resolve_model(str(path)))


def test_model_type_stands_in_for_a_missing_architecture() -> None:
    for config in (LLAMA, QWEN2, QWEN3, MISTRAL):
        nameless = {key: value for key, value in config.items() if key != "architectures"}
        assert parse_config(nameless, "config.json") == parse_config(config, "config.json")


@pytest.mark.parametrize("names", [5, True, "LlamaForCausalLM"])
def test_architectures_that_are_no_list(names: Any) -> None:
    with pytest.raises(ValueError, match="architectures is .*, but must be a list of names"):
        parse_config({"architectures": names}, "config.json")


@pytest.mark.parametrize("value", ["Infinity", "NaN"])
def test_infinite_sampling_defaults_are_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"top_k": {value}}}')
    with pytest.raises(ValueError, match="generation_config.json: top_k is .*, but must be a number, and finite"):
        load_generation_config(ModelSource("hf", tmp_path, "x"))
