"""Weights in safetensors files: an 8-byte length, a JSON table of dtype, shape and place, then the bytes.

The table is read here instead of through the library because the places are what mapping piece by piece needs.
Everything that can be wrong with a download is found before the first byte is copied.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from nanovllm.loader.mapped import CheckpointTensor, map_bytes

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_AGAIN = "the download is incomplete, fetch it again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a file's table; `offset` and `size` in bytes from the start of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def open(self) -> CheckpointTensor:
        """The tensor, read when it is copied. ValueError for a dtype that is no plain floating-point number."""
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"tensor {self.name} in {self.file.name} is stored as {self.dtype}; supported are {', '.join(_DTYPES)}"
            )
        dtype = _DTYPES[self.dtype]
        row = dtype.itemsize * prod(self.shape[1:])

        def read_rows(a: int, b: int) -> torch.Tensor:
            return map_bytes(self.file, self.offset + a * row, (b - a) * row).view(dtype).view(b - a, *self.shape[1:])

        return CheckpointTensor(self.shape, dtype, read_rows)


def list_tensors(directory: Path) -> list[StoredTensor]:
    """All tensors of a checkpoint directory, in the order in which they lie on the disk."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return [tensor for file in _unindexed_files(directory) for tensor in read_table(file)]
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("a shard's name is no text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({error}): {_AGAIN}") from error
    tensors = []
    for shard in sorted(set(weight_map.values())):
        file = directory / shard
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, though {index.name} names it: {_AGAIN}")
        tensors += [tensor for tensor in read_table(file) if weight_map.get(tensor.name) == shard]
    lost = sorted(set(weight_map) - {tensor.name for tensor in tensors})
    if lost:
        raise ValueError(f"tensor {lost[0]} is not in {weight_map[lost[0]]}, where {index.name} expects it: {_AGAIN}")
    return tensors


def _unindexed_files(directory: Path) -> list[Path]:
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    files = [file for file in sorted(directory.glob("*.safetensors")) if not file.name.startswith("consolidated")]
    if not files:
        raise FileNotFoundError(
            f"{directory} holds no *.safetensors: fetch the weights, or convert older formats with transformers' "
            "save_pretrained"
        )
    return files


def read_table(file: Path) -> list[StoredTensor]:
    """The tensors of one file, by offset. ValueError, in one sentence, for a file that is damaged or cut short."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ValueError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its directory")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            raise ValueError(f"{file} is cut short or no safetensors file ({size:,} bytes): {_AGAIN}")
        try:
            table = json.loads(stream.read(length))
            tensors = [_entry(file, 8 + length, name, entry) for name, entry in table.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} has no readable table of tensors ({error}): {_AGAIN}") from error
    tensors.sort(key=lambda tensor: tensor.offset)
    for tensor in tensors:
        if tensor.offset + tensor.size > size:
            raise ValueError(
                f"{file} is cut short: tensor {tensor.name} ends at byte {tensor.offset + tensor.size:,}, "
                f"the file at {size:,}; {_AGAIN}"
            )
    return tensors


def _entry(file: Path, data: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError(f"{name} lies at bytes {begin} to {end}")
    shape = tuple(entry["shape"])
    tensor = StoredTensor(file, name, str(entry["dtype"]), shape, data + begin, end - begin)
    if tensor.dtype in _DTYPES and tensor.size != prod(shape) * _DTYPES[tensor.dtype].itemsize:
        raise ValueError(f"{name} of shape {list(shape)} and type {tensor.dtype} cannot fill {tensor.size} bytes")
    return tensor
