"""Weights arrive as Hugging Face has them, from safetensors and GGUF; damaged files are one clear sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from loader_files import add_tensor, finish, random_blocks, write_gguf
from safetensors.torch import save_file
from tiny_models import make_model, save_model
from transformers import AutoModelForCausalLM

from nanovllm.loader import ModelSource, load_model_config, resolve_model
from nanovllm.loader.dummy import dummy_weights
from nanovllm.loader.gguf_file import read_gguf
from nanovllm.loader.gguf_weights import open_tensor
from nanovllm.loader.safetensors_weights import list_tensors
from nanovllm.loader.weights import iter_weights


def read_all(source: ModelSource) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, in full."""
    found = {}
    for name, tensor in iter_weights(source, load_model_config(source)):
        assert name not in found
        found[name] = torch.full(tensor.shape, float("nan"), dtype=torch.float32)
        found[name].copy_(tensor)
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tied: bool = False) -> None:
    names = set(expected) - ({"lm_head.weight"} if tied else set())
    assert set(found) == names
    for name in names:
        assert torch.equal(found[name], expected[name].float()), name


@pytest.mark.parametrize("case", ["llama_bias", "qwen2", "qwen3_tied", "mistral"])
def test_safetensors_equal_hugging_face(case: str, tmp_path: Path) -> None:
    model = save_model(case, tmp_path)
    assert_same(read_all(resolve_model(str(tmp_path))), model.state_dict(), model.config.tie_word_embeddings)


def test_sharded_safetensors(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(read_all(resolve_model(str(tmp_path))), model.state_dict())


def test_slices_and_dtypes(tmp_path: Path) -> None:
    """What tensor-parallel loading does: rows, columns, both; from any dtype to any dtype."""
    full = torch.randn(3000, 1024).bfloat16()  # more than one piece
    save_file({"x": full, "scalar_row": torch.randn(7)}, tmp_path / "model.safetensors")
    tensors = {stored.name: stored.open() for stored in list_tensors(tmp_path)}
    x = tensors["x"]
    assert x.dim() == 2 and x.shape == (3000, 1024) and x.dtype == torch.bfloat16
    for index in (slice(5, 2900), (slice(None), slice(100, 612)), (slice(1, 2999), slice(1, 2))):
        target = torch.full(full[index].shape, float("nan"), dtype=torch.float64)
        target.copy_(x[index])
        assert torch.equal(target, full[index].double())
    assert torch.equal(x[10:2000][5:100, 3:9].read(), full[10:2000][5:100, 3:9])
    with pytest.raises(ValueError, match=r"\[3000, 1024\] into one of \[3000, 1023\]"):
        torch.empty(3000, 1023).copy_(x)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        torch.add(torch.ones(1), x)  # type: ignore[call-overload]


@pytest.mark.parametrize("case", ["llama", "llama_bias", "qwen2", "qwen3"])
def test_gguf_equals_the_model_and_hugging_face(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    path = write_gguf(tmp_path / "model.gguf", model)
    found = read_all(resolve_model(str(path)))
    assert_same(found, model.state_dict(), model.config.tie_word_embeddings)
    if case == "llama":  # an independent reader agrees about the order of q's and k's rows
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
        assert_same(found, theirs.state_dict())


BLOCKS = {  # bytes of a block, and where its fp16 scales are
    "Q8_0": (34, [0]),
    "Q4_0": (18, [0]),
    "Q4_1": (20, [0, 2]),
    "Q5_0": (22, [0]),
    "Q5_1": (24, [0, 2]),
    "Q4_K": (144, [0, 2]),
    "Q5_K": (176, [0, 2]),
    "Q6_K": (210, [208]),
    "F16": (2, [0]),
    "BF16": (2, []),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_gguf_types(kind: str, tmp_path: Path) -> None:
    """Piecewise dequantisation equals the gguf package's, for a matrix of several pieces, whole and sliced."""
    rows, columns = 700, 4096
    qtype = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    assert block_bytes == BLOCKS[kind][0]
    rng = np.random.default_rng(0)
    data = random_blocks(rng, rows, columns // block * block_bytes, block_bytes, BLOCKS[kind][1])
    if kind == "BF16":
        data = torch.randn(rows, columns).bfloat16().view(torch.uint8).numpy()
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_tensor("x", data, raw_shape=data.shape, raw_dtype=qtype)
    file = read_gguf(finish(writer))
    stored = gguf.GGUFReader(tmp_path / "x.gguf").tensors[0]
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy()).view(rows, columns)
    tensor = open_tensor(file, file.tensors["x"], None)  # type: ignore[arg-type]
    assert tensor.shape == (rows, columns)
    assert torch.equal(tensor.read().float(), expected)
    assert torch.equal(tensor[13:680, 5:99].read().float(), expected[13:680, 5:99])


def test_gguf_rope_factors_are_configuration(tmp_path: Path) -> None:
    model = make_model("llama")
    path = tmp_path / "model.gguf"
    original = gguf.GGUFWriter.write_header_to_file

    def with_factors(writer: gguf.GGUFWriter) -> None:
        add_tensor(writer, "rope_freqs.weight", torch.tensor([1.0, 1.0, 2.5, 3.0, 5.0, 8.0, 8.0, 8.0]), "F32")
        original(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_factors)
        write_gguf(path, model)
    source = resolve_model(str(path))
    config = load_model_config(source)
    assert config.rope.freq_factors == (1.0, 1.0, 2.5, 3.0, 5.0, 8.0, 8.0, 8.0)
    assert "rope_freqs.weight" not in read_all(source)


def test_dummy_weights() -> None:
    def parameters() -> dict[str, torch.Tensor]:
        shapes = {"a.weight": (64, 128), "input_layernorm.weight": (512,), "q_norm.weight": (512,), "a.bias": (512,)}
        return {name: torch.full(shape, float("nan"), dtype=torch.bfloat16) for name, shape in shapes.items()}

    first, second, other = parameters(), parameters(), parameters()
    for values, seed in ((first, 1), (second, 1), (other, 2)):
        dummy_weights(values.items(), seed=seed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["a.weight"], other["a.weight"])
    assert first["a.weight"].float().std().item() == pytest.approx(0.02, rel=0.05)
    assert first["a.bias"].float().mean().abs() < 0.01
    for name in ("input_layernorm.weight", "q_norm.weight"):
        assert first[name].float().mean().item() == pytest.approx(1.0, abs=0.05)
        assert first[name].float().std().item() == pytest.approx(0.1, rel=0.2)


# -- bad files: (what is done to the directory, what the error must name) --------------------------------------------


def _cut(file: Path, keep: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def test_missing_shard(tmp_path: Path) -> None:
    save_model("llama", tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(shard.name)):
        read_all(resolve_model(str(tmp_path)))


def test_tensor_missing_from_its_shard(tmp_path: Path) -> None:
    save_model("llama", tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.lost.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="model.lost.weight is not in"):
        read_all(resolve_model(str(tmp_path)))


@pytest.mark.parametrize("content", [[], None, {"weight_map": 5}, {"weight_map": ["a"]}, {"weight_map": {"a": 5}}])
def test_an_index_that_is_none(content: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"index\.json is no index of shards .*fetch it again"):
        list_tensors(tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.01, 0.6, 0.999])
def test_truncated_safetensors(keep: float, tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    _cut(tmp_path / "model.safetensors", keep)
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short.*fetch it again"):
        read_all(resolve_model(str(tmp_path)))


@pytest.mark.parametrize("keep", [0.001, 0.01, 0.6, 0.999])
def test_truncated_gguf(keep: float, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", make_model("llama"))
    _cut(path, keep)
    with pytest.raises(ValueError, match=r"model\.gguf is (damaged or )?cut short.*download"):
        read_gguf(path)


def test_other_bad_files(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    save_model("llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_all(resolve_model(str(tmp_path)))
    table = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}).encode()
    weights.write_bytes(len(table).to_bytes(8, "little") + table + bytes(12))
    with pytest.raises(ValueError, match=r"x of shape \[4\] and type F32 cannot fill 12 bytes"):
        read_all(resolve_model(str(tmp_path)))
    table = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [-12, 0]}}).encode()
    weights.write_bytes(len(table).to_bytes(8, "little") + table + bytes(12))
    with pytest.raises(ValueError, match="x lies at bytes -12 to 0.*fetch it again"):
        read_all(resolve_model(str(tmp_path)))
    save_file({"x": torch.ones(4, dtype=torch.int8)}, weights)
    with pytest.raises(ValueError, match="tensor x in model.safetensors is stored as I8; supported are"):
        read_all(resolve_model(str(tmp_path)))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors"):
        read_all(resolve_model(str(tmp_path)))
    assert config.is_file()


def test_unsupported_gguf_type_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    data = np.zeros((2, 84), np.uint8)
    writer.add_tensor("blk.0.attn_v.weight", data, raw_shape=data.shape, raw_dtype=gguf.GGMLQuantizationType.Q2_K)
    with pytest.raises(ValueError, match="blk.0.attn_v.weight in x.gguf has type Q2_K; supported are F32"):
        read_gguf(finish(writer))
    (tmp_path / "y.gguf").write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="is no GGUF file"):
        read_gguf(tmp_path / "y.gguf")
