"""Configuration: what the user chose (`EngineConfig`) and what the checkpoint is (`ModelConfig`).

Both are frozen: nothing in the engine writes a decision back into a config. Quantities that are found out
later (number of KV blocks, graph sizes) are returned by the function that computed them.
This module knows dictionaries and numbers; it imports neither torch nor any file format.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from typing import Any

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def unknown_name_error(kind: str, name: str, valid: list[str]) -> TypeError:
    """A `TypeError` for an unknown keyword that names the nearest valid one."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else f"; valid names: {', '.join(sorted(valid)) or 'none'}"
    return TypeError(f"{kind} has no parameter {name!r}{hint}")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding, in the vocabulary of Hugging Face's `rope_parameters`.

    `factor` and the fields after it matter only to the types that use them (linear, dynamic, llama3, yarn).
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None = 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    # GGUF files store llama3 scaling as the resulting divisors, one per rotary pair; they then replace the formula.
    freq_factors: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder-only transformer, derived from `config.json` or GGUF metadata (see `loader`)."""

    architecture: str  # e.g. "Qwen3ForCausalLM": the key into `models.registry`
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "bfloat16"  # the checkpoint's own dtype, one of DTYPES without "auto"
    sliding_windows: tuple[int | None, ...] = ()  # one entry a layer; () = full attention everywhere
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def window(self, layer: int) -> int | None:
        """Tokens a query of `layer` may look back on, itself included; None = all of them."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of K and V that one token occupies over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_size

    @property
    def num_parameters(self) -> int:
        """Weights of the model, tied embeddings counted once."""
        q, kv, h = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.hidden_size
        attention = h * (q + 2 * kv) + q * h + self.qkv_bias * (q + 2 * kv) + self.o_bias * h
        mlp = 3 * h * self.intermediate_size + self.mlp_bias * (2 * self.intermediate_size + h)
        qk_norm = 2 * self.head_dim if self.architecture == "Qwen3ForCausalLM" else 0
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * h + qk_norm) + embeddings + h


def _option(default: Any, help: str) -> Any:
    """A dataclass field whose help text also serves the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything a user can set on `LLM(model, ...)`. Field names follow nano-vLLM, then vLLM."""

    model: str  # a directory, a .gguf file, an alias ("smollm2") or a Hugging Face hub id
    tokenizer: str | None = _option(None, "tokenizer directory or file; default: the one that comes with the model")
    dtype: str = _option("auto", "auto (the checkpoint's on a GPU, float32 on the CPU), float32, bfloat16 or float16")
    device: str = _option("auto", "auto (cuda when there is one, else cpu), cpu, cuda or cuda:N")
    load_format: str = _option("auto", "auto, or dummy: seeded random weights from config.json alone")
    max_model_len: int | None = _option(None, "tokens of prompt and completion together; default: the model's context")
    max_num_batched_tokens: int | None = _option(
        None, "token budget of one step, prefill chunks and decodes together; default: 8192 on a GPU, 2048 on the CPU"
    )
    max_num_seqs: int = _option(256, "sequences that may run in one step")
    gpu_memory_utilization: float = _option(0.9, "share of the GPU that this process may use, weights included")
    kv_cache_memory_bytes: int | None = _option(None, "absolute size of the KV cache; wins over the share of the GPU")
    num_kvcache_blocks: int | None = _option(None, "absolute number of KV blocks; wins over both")
    kvcache_block_size: int = _option(
        32, "tokens a KV block holds, a power of two up to 64; the unit of prefix sharing"
    )
    enable_prefix_caching: bool = _option(True, "reuse the KV of prompt prefixes seen before")
    enforce_eager: bool = _option(False, "no CUDA graphs")
    fusion: str = _option(
        "auto", "fused kernels for decode steps of few rows: auto (where they can), on (or an error), off"
    )
    async_scheduling: bool | None = _option(
        None, "prepare a step while the one before it still runs; default: on a GPU yes, on the CPU no"
    )
    attention_backend: str = _option("auto", "auto, triton, native, sdpa, flash_attn or flashinfer")
    tensor_parallel_size: int = _option(1, "GPUs that share the model")
    seed: int = _option(0, "draws the sampling seeds of requests that bring none, and dummy weights")
    skip_tokenizer_init: bool = _option(False, "no tokenizer: token ids in, token ids out")
    chat_template: str | None = _option(None, "Jinja chat template, as text or as a path; default: the model's own")
    generation_config: bool = _option(True, "take sampling defaults and EOS ids from generation_config.json")
    show_progress: bool = _option(True, "progress bars while loading")

    @classmethod
    def from_kwargs(cls, model: str, **kwargs: Any) -> EngineConfig:
        """Build a config; an unknown keyword raises `TypeError` and names the nearest valid one."""
        valid = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in valid:
                raise unknown_name_error("LLM", name, valid)
        return cls(model, **kwargs)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ValueError("model must be a directory, a .gguf file, an alias or a hub id, given as a string")
        for name in ("max_num_seqs", "kvcache_block_size", "tensor_parallel_size"):
            _require_positive_int(name, getattr(self, name))
        for name in ("max_num_batched_tokens", "max_model_len", "kv_cache_memory_bytes", "num_kvcache_blocks"):
            if getattr(self, name) is not None:
                _require_positive_int(name, getattr(self, name))
        if self.kvcache_block_size > 64 or self.kvcache_block_size & (self.kvcache_block_size - 1):
            raise ValueError(f"kvcache_block_size must be a power of two up to 64, got {self.kvcache_block_size}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 < share <= 1.0:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {share!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, got {self.seed!r}")
        for name in (option.name for option in fields(self) if isinstance(option.default, bool)):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("tokenizer", "chat_template"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} must be a string that is not empty, got {value!r}")
            if self.skip_tokenizer_init:
                raise ValueError(f"{name} has no use with skip_tokenizer_init=True: leave out one of the two")
        if self.max_num_batched_tokens is not None and self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs ({self.max_num_seqs}) exceeds max_num_batched_tokens ({self.max_num_batched_tokens}): "
                "every running sequence needs one token a step; lower the first or raise the second"
            )
        _require_choice("dtype", self.dtype, DTYPES)
        _require_choice("fusion", self.fusion, ("auto", "on", "off"))
        if self.async_scheduling is not None and not isinstance(self.async_scheduling, bool):
            raise ValueError(f"async_scheduling must be True, False or None, got {self.async_scheduling!r}")
        _require_choice("load_format", self.load_format, ("auto", "dummy"))
        _require_choice(
            "attention_backend",
            self.attention_backend,
            ("auto", "triton", "native", "sdpa", "flash_attn", "flashinfer"),
        )

    def token_budget(self, device_type: str) -> int:
        """Tokens that one step may run on a device of this type ("cuda", "cpu").

        A CPU gains nothing from larger steps, and their temporaries cost page faults: SmolLM2 in fp32 on two cores,
        16 prompts of 10 to 500 tokens, 115 output tokens a second with 8192 and 128 with 2048.
        """
        default = 2048 if device_type == "cpu" else 8192
        return self.max_num_batched_tokens or max(default, self.max_num_seqs)


def _require_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
