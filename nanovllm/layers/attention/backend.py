"""What attention needs to know about a step (`AttentionMetadata`) and who may compute it (`AttentionBackend`).

A backend is chosen once, by name, with its reasons for refusing spelled out; nothing falls back in silence.
Optional libraries are imported inside their backend's own module, at selection. Nothing here knows the engine.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch


@dataclass(slots=True)
class AttentionMetadata:
    """One step of B sequences: decodes (exactly one query token each) first, then prefill chunks; T tokens in all.

    Query token j of sequence i sits at position context_lens[i] - query_len[i] + j and sees the keys up to itself.
    """

    num_decodes: int  # the first `num_decodes` sequences have one query token each
    query_start: torch.Tensor  # [B + 1] int32, cumulative query lengths
    context_lens: torch.Tensor  # [B] int32, keys of each sequence, this step's tokens included; 0 = graph padding
    block_table: torch.Tensor  # [B, max_blocks] int32
    slot_mapping: torch.Tensor  # [T] int64, block * block_size + offset; -1 = do not store
    max_query_len: int  # longest prefill chunk (host); 0 without chunks
    max_context_len: int  # upper bound on context_lens (host); under a CUDA graph, over all its replays
    query_lens_cpu: list[int] = field(default_factory=list)  # host copies, for the CPU backend
    context_lens_cpu: list[int] = field(default_factory=list)
    # What a backend derives from the fields above once a step and reuses in every layer.
    scratch: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The facts a backend needs to say whether it can serve a model."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int  # query heads on this device
    num_kv_heads: int
    head_dim: int
    block_size: int


class AttentionBackend(ABC):
    """Attention of one step.

    `graph_safe`: a CUDA graph may capture `forward`, of decodes and of chunks. Its replays have other contents in the
    metadata's tensors, and of its host fields only the bounds hold: a sequence may be shorter, or empty.
    """

    name: ClassVar[str]
    graph_safe: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def why_not(cls, spec: AttentionSpec) -> list[str]:
        """Reasons why this backend cannot serve `spec` here; empty = it can."""

    @abstractmethod
    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """q: [T, Hq, D]; caches: [num_blocks, Hkv, block_size, D], this step already stored. Returns [T, Hq, D].

        `window`: keys a query sees, itself included; None = all.
        """


# name -> (module, class); modules are imported at selection, so that an optional library stays optional
_BACKENDS = {
    "triton": ("triton_paged", "TritonBackend"),
    "native": ("native", "NativeBackend"),
    "sdpa": ("sdpa", "SDPABackend"),
    "flash_attn": ("flash", "FlashAttentionBackend"),
    "flashinfer": ("flashinfer", "FlashInferBackend"),
}


def backend_class(name: str) -> type[AttentionBackend]:
    """The class behind a backend's name. Raises `ValueError` for an unknown name."""
    if name not in _BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; choose one of auto, {', '.join(_BACKENDS)}")
    module, cls = _BACKENDS[name]
    return getattr(importlib.import_module(f"nanovllm.layers.attention.{module}"), cls)


def select_backend(name: str, spec: AttentionSpec) -> AttentionBackend:
    """The backend called `name`; "auto" = triton on CUDA or native on a CPU where they can run, else sdpa.

    Raises `ValueError` with the reasons when a backend asked for by name cannot run.
    """
    if name == "auto":
        own = backend_class("triton" if spec.device.type == "cuda" else "native")
        return own() if not own.why_not(spec) else backend_class("sdpa")()
    cls = backend_class(name)
    reasons = cls.why_not(spec)
    if reasons:
        raise ValueError(f"attention backend {name!r} cannot run here: {'; '.join(reasons)}; use 'auto'")
    return cls()


def cuda_reasons(spec: AttentionSpec, capability: tuple[int, int]) -> list[str]:
    """Reasons shared by the GPU backends: no CUDA device, or one older than `capability`."""
    if spec.device.type != "cuda":
        return [f"it needs a CUDA device, the engine runs on {spec.device.type}"]
    found = torch.cuda.get_device_capability(spec.device)
    if found < capability:
        return [f"it needs compute capability {capability[0]}.{capability[1]}, this GPU has {found[0]}.{found[1]}"]
    return []
