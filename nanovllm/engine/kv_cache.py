"""How many KV blocks there is room for, and the tensors that hold them.

The budget is a pure function from bytes to blocks. It counts what *this process* uses of the GPU, never what
others use: two engines side by side each get the share that their own settings name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm.config import EngineConfig, ModelConfig
from nanovllm.layers.forward_batch import KVCaches

_CPU_DEFAULT_BYTES = 2 << 30
_CUDA_CONTEXT_BYTES = 600 << 20  # driver context and cuBLAS workspaces: in this process, but unseen by the allocator
_SAFETY_BYTES = 256 << 20  # left free for allocator fragmentation


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of the device: in total, free now, and what this process needs at its peak besides the KV cache."""

    total: int
    free: int
    own_peak: int
    own_now: int


def measure_cuda_memory(device: torch.device, reserve: int) -> DeviceMemory:
    """Read the device after a profiling pass; `reserve` bytes are added for work the pass did not do."""
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device) + _CUDA_CONTEXT_BYTES + reserve
    return DeviceMemory(total, free, peak, torch.cuda.memory_allocated(device) + _CUDA_CONTEXT_BYTES)


def kv_block_bytes(model: ModelConfig, block_size: int, element_size: int, world_size: int = 1) -> int:
    """Bytes of one block over all layers on one rank."""
    kv_heads = max(1, model.num_kv_heads // world_size)
    return 2 * model.num_layers * kv_heads * block_size * model.head_dim * element_size


def num_kv_blocks(config: EngineConfig, block_bytes: int, max_model_len: int, memory: DeviceMemory | None) -> int:
    """Blocks that fit; `memory` is None on the CPU. ValueError with the remedy when not even one fits.

    An absolute count wins over absolute bytes, which win over the share of the GPU. No more blocks are made than
    `max_num_seqs` sequences of the longest context could fill.
    """
    if config.num_kvcache_blocks is not None:
        return config.num_kvcache_blocks
    if config.kv_cache_memory_bytes is not None:
        budget, origin = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    elif memory is None:
        budget, origin = _CPU_DEFAULT_BYTES, "the CPU's default cache size (set kv_cache_memory_bytes)"
    else:
        share = int(memory.total * config.gpu_memory_utilization) - memory.own_peak
        still_free = memory.free - (memory.own_peak - memory.own_now) - _SAFETY_BYTES
        budget, origin = min(share, still_free), "gpu_memory_utilization"
    useful = config.max_num_seqs * -(-max_model_len // config.kvcache_block_size)
    blocks = min(budget // block_bytes, useful)
    if blocks < 1:
        raise ValueError(
            f"no room for the KV cache: one block takes {block_bytes / 2**20:.2f} MiB and {origin} leaves "
            f"{max(budget, 0) / 2**20:.2f} MiB; raise it, free device memory, or lower "
            "max_num_batched_tokens or max_num_seqs"
        )
    return blocks


def allocate_kv_caches(
    model: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device, world_size: int = 1
) -> KVCaches:
    """Zeroed (k, v) of shape [num_blocks, kv_heads, block_size, head_dim] for every layer.

    Zeroed, because a masked position still multiplies its V by a zero probability, and 0 · NaN is NaN. On the CPU the
    zeros come from the operating system, page by page as they are first touched. ValueError for what does not fit.
    """
    kv_heads = max(1, model.num_kv_heads // world_size)
    shape = (num_blocks, kv_heads, block_size, model.head_dim)

    def cache() -> torch.Tensor:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        size = num_blocks * kv_heads * block_size * model.head_dim * dtype.itemsize
        return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)

    total = num_blocks * kv_block_bytes(model, block_size, dtype.itemsize, world_size)
    try:
        if total > sys.maxsize:  # no allocator takes such a number
            raise MemoryError
        return [(cache(), cache()) for _ in range(model.num_layers)]
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ValueError(
            f"{num_blocks} KV blocks take {total / 2**30:,.1f} GiB, more than {device} has left: lower "
            "num_kvcache_blocks, kv_cache_memory_bytes or gpu_memory_utilization"
        ) from error
