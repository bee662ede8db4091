"""The header of a GGUF file: metadata and the table of tensors (format: ggml's docs/gguf.md).

Written as a plain `struct` walk because the `gguf` package's reader makes a NumPy view of every string, which takes
seconds for the 50,000 to 300,000 strings of a vocabulary; this takes a tenth of one. Knows nothing of what keys mean.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

# type id: (name, elements of a block, bytes of a block)
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}
SUPPORTED_TYPES = tuple(name for name, _, _ in _TYPES.values())
ROPE_FACTORS = "rope_freqs.weight"  # a tensor that belongs to the configuration, not to the weights
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the table: `shape` outermost dimension first, `offset` and `row_bytes` in bytes."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    row_bytes: int  # bytes of one index of the first dimension

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True)
class GGUFFile:
    """Metadata (strings, numbers, booleans, lists) and tensors by their GGUF names."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def require(self, key: str) -> Any:
        """A metadata value; ValueError names the key when it is missing."""
        if key not in self.metadata:
            raise ValueError(f"{self.path.name} has no metadata {key!r}: convert the model anew with llama.cpp")
        return self.metadata[key]


def read_gguf(path: Path) -> GGUFFile:
    """Read the header; no weights. ValueError, in one sentence, for a file that is damaged or cut short."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with GGUF")
        try:
            version, num_tensors, num_values = _unpack(stream, "IQQ")
            if version not in (2, 3):
                raise ValueError(f"{path} has GGUF version {version}; versions 2 and 3 (little-endian) are supported")
            metadata = {}
            for _ in range(num_values):
                key = _string(stream)
                metadata[key] = _value(stream, _unpack(stream, "I")[0])
            entries = [_tensor_entry(stream) for _ in range(num_tensors)]
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError) as error:
            raise ValueError(f"the header of {path} is damaged or cut short: download the file again") from error
        alignment = metadata.get("general.alignment", 32)
        data = -(-stream.tell() // alignment) * alignment
    tensors = {entry[0]: _tensor(path, size, data, *entry) for entry in entries}
    return GGUFFile(path, metadata, tensors)


def _unpack(stream: BinaryIO, layout: str) -> tuple[Any, ...]:
    layout = "<" + layout
    return struct.unpack(layout, stream.read(struct.calcsize(layout)))


def _string(stream: BinaryIO) -> str:
    length = int.from_bytes(stream.read(8), "little")
    raw = stream.read(length)
    if len(raw) < length:
        raise struct.error("end of file inside a string")
    return raw.decode("utf-8")


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind != _ARRAY:
        return _unpack(stream, _SCALARS[kind])[0]
    element, count = _unpack(stream, "IQ")
    if element in _SCALARS:
        return list(_unpack(stream, f"{count}{_SCALARS[element]}"))
    return [_value(stream, element) for _ in range(count)]


def _tensor_entry(stream: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type id, offset from the start of the data); GGUF writes the innermost dimension first."""
    name = _string(stream)
    dimensions = _unpack(stream, f"{_unpack(stream, 'I')[0]}Q")
    return name, dimensions[::-1], *_unpack(stream, "IQ")


def _tensor(path: Path, size: int, data: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    if kind not in _TYPES:
        raise ValueError(
            f"tensor {name} in {path.name} has type {_type_name(kind)}; supported are {', '.join(SUPPORTED_TYPES)}: "
            "choose another quantisation of the model"
        )
    type_name, block, block_bytes = _TYPES[kind]
    if not shape or shape[-1] % block:
        raise ValueError(f"tensor {name} in {path.name} has shape {list(shape)}, which {type_name} cannot store")
    tensor = GGUFTensor(name, type_name, shape, data + offset, prod(shape[1:] or (1,)) * block_bytes // block)
    if len(shape) == 1:  # one "row" is one element, which a quantised block cannot be cut into
        if block > 1:
            raise ValueError(f"tensor {name} in {path.name} is a quantised vector, which no converter writes")
        tensor = GGUFTensor(name, type_name, shape, data + offset, block_bytes)
    if tensor.offset + tensor.size > size:
        raise ValueError(
            f"{path} is cut short: tensor {name} ends at byte {tensor.offset + tensor.size:,}, the file at {size:,}; "
            "download it again"
        )
    return tensor


def _type_name(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"
