"""Published shapes of the models we measure: a config.json each, and seeded random weights that every engine can load.

The numbers are those of the models' own config.json on the Hugging Face hub, the names of the tensors as well.
`python benchmarks/harness/models.py NAME DIRECTORY DEVICE` writes one model.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


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


# Not a published model: runs anywhere in seconds.
SMOKE = "smoke"
_SMOKE = _qwen3(64, 96, 2, 4, True) | dict(
    vocab_size=512, num_key_value_heads=2, head_dim=16, max_position_embeddings=512, bos_token_id=1, eos_token_id=2
)


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a named shape."""
    return _SMOKE if name == SMOKE else SHAPES[name]


def write_config(name: str, directory: Path) -> Path:
    """A model directory with nothing but the config.json of `name`."""
    path = directory / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config_of(name), indent=1))
    return path


def write_model(name: str, directory: Path, device: str = "cpu") -> Path:
    """The directory of `name` with its config.json and random bfloat16 weights, drawn on `device` and written once.

    ValueError where there is no such device. OSError, one sentence, when it cannot be written; an interrupted write
    leaves nothing that looks like a model.
    """
    path = directory / name
    if (path / "model.safetensors").exists():
        return path
    partial = directory / f".{name}.{os.getpid()}"
    try:
        target = write_config(name, partial)
        _write_tokenizer(target)
        with (target / "model.safetensors").open("wb") as file:
            _write_safetensors(file, dict(_tensors(config_of(name))), device)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(target, path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror or error}): free some space or use --models") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def _write_tokenizer(path: Path) -> None:
    """A tokenizer that knows two words: an engine that insists on one starts; prompts are token ids anyway."""
    words = {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1}, "unk_token": "<unk>"}
    (path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes of a Llama's or Qwen3's tensors, as Hugging Face names them."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    yield "model.embed_tokens.weight", [config["vocab_size"], hidden]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q)):
            yield f"{layer}.self_attn.{name}_proj.weight", [rows, columns]
        if config["model_type"] == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", [config["head_dim"]]
            yield f"{layer}.self_attn.k_norm.weight", [config["head_dim"]]
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            yield f"{layer}.mlp.{name}_proj.weight", [rows, columns]
        yield f"{layer}.input_layernorm.weight", [hidden]
        yield f"{layer}.post_attention_layernorm.weight", [hidden]
    yield "model.norm.weight", [hidden]
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", [config["vocab_size"], hidden]


def _write_safetensors(file: BinaryIO, shapes: dict[str, list[int]], device: str, seed: int = 0) -> None:
    """Matrices N(0, 0.02²), norms 1 + N(0, 0.1²): activations stay finite and a dropped norm shows. One tensor at a
    time in memory."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch finds no CUDA GPU: run this where there is one, or give --device cpu")
    generator = torch.Generator(device).manual_seed(seed)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for shape in shapes.values():
        mean, std = (1.0, 0.1) if len(shape) == 1 else (0.0, 0.02)
        values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(mean, std, generator=generator)
        file.write(values.cpu().view(torch.int16).numpy().tobytes())


if __name__ == "__main__":
    try:
        print(write_model(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
