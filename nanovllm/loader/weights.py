"""The weights of a model, whatever file they are in: an iterator over (Hugging Face name, tensor).

Nothing is read until a tensor is copied, and then only a few rows at a time (see `mapped`), so that the peak of host
memory while loading is the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch

from nanovllm.config import ModelConfig
from nanovllm.loader.gguf_file import ROPE_FACTORS, read_gguf
from nanovllm.loader.gguf_weights import hf_name, open_tensor
from nanovllm.loader.mapped import CheckpointTensor
from nanovllm.loader.resolve import ModelSource
from nanovllm.loader.safetensors_weights import list_tensors
from nanovllm.utils.progress import progress_bar


def iter_weights(
    source: ModelSource, config: ModelConfig, *, show_progress: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of the checkpoint once, in the order of the file.

    The values are `CheckpointTensor`s, typed as what they stand for: they have `shape`, `dtype`, `dim()`, slices, and
    `parameter.copy_(value)` works. FileNotFoundError or ValueError, in one sentence, before the first tensor when
    files are missing or damaged; shapes are for the model to check, which knows what it expects.
    """
    if source.kind == "gguf":
        file = read_gguf(source.path)
        stored = sorted(file.tensors.values(), key=lambda tensor: tensor.offset)
        entries = [
            (hf_name(tensor.name), tensor.size, open_tensor(file, tensor, config))
            for tensor in stored
            if tensor.name != ROPE_FACTORS
        ]
    else:
        entries = [(tensor.name, tensor.size, tensor.open()) for tensor in list_tensors(source.path)]
    return _with_progress(entries, show_progress)


def _with_progress(
    entries: list[tuple[str, int, CheckpointTensor]], show_progress: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    total = sum(size for _, size, _ in entries)
    with progress_bar(total, "Loading weights", unit="B", enabled=show_progress) as bar:
        for name, size, tensor in entries:
            yield name, cast(torch.Tensor, tensor)
            bar.update(size)
