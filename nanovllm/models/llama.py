"""Llama (arXiv 2302.13971, 2407.21783): the decoder that the other families vary.

Pre-norm residual blocks, grouped-query attention with rotary positions, SwiGLU. One forward serves prefill and
decode: T tokens of any number of sequences come flattened, and only the attention backend knows who is who.
Projections that share an input are one matmul: every RMSNorm is followed by exactly one linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
from torch import nn

from nanovllm.config import ModelConfig
from nanovllm.kernels import native
from nanovllm.kernels.rope import qk_norm_rope_store
from nanovllm.kernels.rope_attention import plan_rope_attention, rope_attention
from nanovllm.kernels.split_plan import SplitPlan
from nanovllm.layers.activation import SiluAndMul
from nanovllm.layers.attention.backend import AttentionBackend
from nanovllm.layers.embedding import LMHead, VocabParallelEmbedding
from nanovllm.layers.forward_batch import ForwardBatch, KVCaches
from nanovllm.layers.fused_norm_linear import linear_residual_, norm_linear
from nanovllm.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.parallel import Build
from nanovllm.layers.rotary import RopeRows, RotaryEmbedding
from nanovllm.utils import nvtx


class LlamaAttention(nn.Module):
    """softmax(q kᵀ / √d) v over the paged cache, with q and k rotated by their positions."""

    def __init__(self, config: ModelConfig, layer: int, backend: AttentionBackend, build: Build) -> None:
        super().__init__()
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.backend, self.scale, self.window = backend, dim**-0.5, config.window(layer)
        self.eps = config.rms_norm_eps
        self.qkv_proj = QKVParallelLinear(config.hidden_size, heads, kv_heads, dim, config.qkv_bias, build)
        self.o_proj = RowParallelLinear(heads * dim, config.hidden_size, config.o_bias, build)
        self.q_norm: RMSNorm | None = None  # Qwen3 has them
        self.k_norm: RMSNorm | None = None

    def forward(
        self, x: torch.Tensor, rope: RopeRows, cache: tuple[torch.Tensor, torch.Tensor], batch: ForwardBatch
    ) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]; stores this step's K and V in `cache` before attending to it."""
        return self.o_proj(self.attend(self.qkv_proj(x), rope, cache, batch))

    def attend(
        self,
        qkv: torch.Tensor,
        rope: RopeRows,
        cache: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch,
        norm_rope_store: Callable[..., torch.Tensor] = qk_norm_rope_store,
    ) -> torch.Tensor:
        """Everything between the projections: qkv [T, …] -> [T, Hq * D]."""
        with nvtx.of(self, "rope"):
            q = norm_rope_store(
                qkv,
                self.q_norm.weight if self.q_norm is not None else None,
                self.k_norm.weight if self.k_norm is not None else None,
                self.eps,
                rope.table,
                rope.rows,
                *cache,
                batch.attention.slot_mapping,
            )
        with nvtx.of(self, "attention"):
            return self.backend.forward(q, *cache, batch.attention, self.scale, self.window).flatten(1)

    @nvtx.ranged(0, "attention")
    def decode(
        self,
        qkv: torch.Tensor,
        table: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch,
        plan: SplitPlan,
    ) -> torch.Tensor:
        """The fused twin of everything between the projections: qkv [B, …] -> [B, Hq * D], one token a sequence."""
        return rope_attention(
            qkv,
            self.q_norm.weight if self.q_norm is not None else None,
            self.k_norm.weight if self.k_norm is not None else None,
            self.eps,
            table,
            *cache,
            batch.attention.block_table,
            batch.attention.context_lens,
            self.scale,
            self.window,
            batch.attention.max_context_len,
            plan=plan,
        )


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = ColumnParallelLinear(hidden, [inner, inner], config.mlp_bias, build)
        self.act = SiluAndMul()
        self.down_proj = RowParallelLinear(inner, hidden, config.mlp_bias, build)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]."""
        return self.down_proj(self.act(self.gate_up_proj(x)))


class LlamaDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the sums are carried as `residual` into the next norm."""

    attention_class: type[LlamaAttention] = LlamaAttention

    def __init__(self, config: ModelConfig, layer: int, backend: AttentionBackend, build: Build) -> None:
        super().__init__()
        self.self_attn = self.attention_class(config, layer, backend, build)
        self.mlp = LlamaMLP(config, build)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, build)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, build)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        rope: RopeRows,
        cache: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(branch output, residual) of the layer before, each [T, hidden] -> the same of this layer."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, rope, cache, batch)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual

    def decode(
        self,
        x: torch.Tensor,
        table: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor],
        batch: ForwardBatch,
        plan: SplitPlan,
    ) -> torch.Tensor:
        """A decode step on the GPU, in five kernels or six; of more than 16 rows in seven or more.

        x [B, hidden], the residual stream, is updated in place.
        """
        return self.chain(x, partial(self.self_attn.decode, table=table, cache=cache, batch=batch, plan=plan))

    def chain(
        self, x: torch.Tensor, attend: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer in five operations; x [T, hidden], the residual stream, is read and written in place.

        `attend`: qkv -> [T, Hq * D], what lies between the projections. `rows` [R]: the last layer's output is wanted
        for these tokens only, [R, hidden].
        """
        out = attend(norm_linear(x, self.input_layernorm, self.self_attn.qkv_proj))
        if rows is not None:
            out, x = out[rows], x[rows]
        x = linear_residual_(out, self.self_attn.o_proj, x)
        inner = norm_linear(x, self.post_attention_layernorm, self.mlp.gate_up_proj, swiglu=True)
        return linear_residual_(inner, self.mlp.down_proj, x)


class LlamaModel(nn.Module):
    """Embedding, layers, final norm."""

    layer_class: type[LlamaDecoderLayer] = LlamaDecoderLayer

    def __init__(self, config: ModelConfig, max_len: int, backend: AttentionBackend, build: Build) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, build)
        self.layers = nn.ModuleList(self.layer_class(config, i, backend, build) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, build)
        self.rotary = RotaryEmbedding(config, max_len, build.device)
        self.native = False  # whether `forward` is the chain in C; `registry.prepare_for_inference` knows

    def forward(self, batch: ForwardBatch, caches: KVCaches) -> torch.Tensor:
        """Hidden states [R, hidden] of `batch.logits_rows` (or of all T tokens), after the final norm."""
        rope = self.rotary.rows(batch.positions, batch.prompt_lens)
        x = self.embed_tokens(batch.input_ids)
        if self.native:
            return self.norm(self._chain(x, rope, batch, caches))
        x, residual = self.layers[0](x, None, rope, caches[0], batch)
        for layer, cache in zip(self.layers[1:], caches[1:], strict=True):
            x, residual = layer(x, residual, rope, cache, batch)
        if batch.logits_rows is not None:
            x, residual = x[batch.logits_rows], residual[batch.logits_rows]
        return self.norm.add(x, residual)[0]

    def decode(self, batch: ForwardBatch, caches: KVCaches) -> torch.Tensor:
        """One token a sequence through the fused layers: the residual stream [B, hidden], before the final norm."""
        plans = self.split_plans(batch, caches)  # first: attention reads them before it waits for the layer's start
        x = self.embed_tokens.fed(batch.input_ids, batch.sampled)
        layers = cast("Iterable[LlamaDecoderLayer]", self.layers)
        for layer, cache, plan in zip(layers, caches, plans, strict=True):
            x = layer.decode(x, self.rotary.table, cache, batch, plan)
        return x

    def split_plans(self, batch: ForwardBatch, caches: KVCaches) -> list[SplitPlan]:
        """How each layer's attention splits the keys of a decode step; layers with the same window share a plan."""
        windows = [layer.self_attn.window for layer in cast("Iterable[LlamaDecoderLayer]", self.layers)]
        attention = batch.attention
        made = {
            window: plan_rope_attention(caches[0][0], attention.context_lens, attention.max_context_len, window)
            for window in dict.fromkeys(windows)
        }
        return [made[window] for window in windows]

    def _chain(self, x: torch.Tensor, rope: RopeRows, batch: ForwardBatch, caches: KVCaches) -> torch.Tensor:
        """Any step through the layers in C: the residual stream [R, hidden] of `batch.logits_rows`."""
        layers = cast("Iterable[LlamaDecoderLayer]", self.layers)
        for number, (layer, cache) in enumerate(zip(layers, caches, strict=True), start=1):
            attend = partial(
                layer.self_attn.attend, rope=rope, cache=cache, batch=batch, norm_rope_store=native.qk_norm_rope_store
            )
            x = layer.chain(x, attend, batch.logits_rows if number == len(caches) else None)
        return x


class LlamaForCausalLM(nn.Module):
    """Llama 2, 3, 3.x, SmolLM2, TinyLlama: the model with its LM head."""

    model_class: type[LlamaModel] = LlamaModel
    # Checkpoint names that are one part of a packed weight: name -> (our module, part).
    packed_modules: dict[str, tuple[str, int]] = {
        "q_proj": ("qkv_proj", 0),
        "k_proj": ("qkv_proj", 1),
        "v_proj": ("qkv_proj", 2),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }

    def __init__(self, config: ModelConfig, max_len: int, backend: AttentionBackend, build: Build) -> None:
        super().__init__()
        self.config = config
        self.model = self.model_class(config, max_len, backend, build)
        self.lm_head = LMHead(self.model.embed_tokens, config.tie_word_embeddings, build)
        nvtx.annotate(self)

    def forward(self, batch: ForwardBatch, caches: KVCaches) -> torch.Tensor:
        """Hidden states [R, hidden] of the tokens whose logits are wanted."""
        return self.model(batch, caches)

    def decode(self, batch: ForwardBatch, caches: KVCaches) -> torch.Tensor:
        """Logits [B, vocab] of a decode step by the fused kernels; the same as `compute_logits(forward(…))`."""
        x = self.model.decode(batch, caches)
        with nvtx.of(self.lm_head):  # a tied table by itself is called an embedding
            return norm_linear(x, self.model.norm, self.lm_head.table)[:, : self.config.vocab_size]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, hidden] -> logits [R, vocab] in the model's dtype."""
        return self.lm_head(hidden)
