"""Carries out steps on the device: inputs, forward pass, sampling, results.

Owns everything that lives on the device: the model, the KV cache, the input buffers, the graphs. It is told what to
run by a `ScheduledBatch` and knows nothing of queues, blocks or stop conditions.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.cuda_graph import DecodeGraphs, graph_sizes
from nanovllm.engine.input_builder import InputBuilder
from nanovllm.engine.kv_cache import allocate_kv_caches, kv_block_bytes, measure_cuda_memory, num_kv_blocks
from nanovllm.engine.loading import LoadedModel, load_model
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.attention.backend import AttentionMetadata
from nanovllm.layers.forward_batch import ForwardBatch, KVCaches
from nanovllm.layers.sampler import Sampler
from nanovllm.outputs import Logprob

logger = logging.getLogger(__name__)

_PROMPT_LOGPROB_ROWS = 256  # rows of logits held at a time while scoring a prompt


@dataclass(slots=True)
class StepOutput:
    """Results of one step. Sequences without an entry had nothing to report."""

    token_ids: list[int]  # one for each scheduled sequence that samples, in batch order
    logprobs: dict[int, dict[int, Logprob]] = field(default_factory=dict)  # by seq_id, of its new token
    prompt_logprobs: list[tuple[Sequence, int, list[dict[int, Logprob]]]] = field(default_factory=list)
    errors: list[tuple[Sequence, str]] = field(default_factory=list)


class ModelRunner:
    """The device side of one engine."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.loaded: LoadedModel = load_model(config)
        self.model, self.model_config = self.loaded.model, self.loaded.config
        self.device, self.dtype = self.loaded.device, self.loaded.dtype
        self.max_model_len = self.loaded.max_model_len
        self.sampler = Sampler(self.model_config.vocab_size, self.device)
        self.inputs = InputBuilder(
            config.max_num_seqs, config.max_num_batched_tokens, self.max_model_len, config.kvcache_block_size, self.device
        )
        self.num_blocks = self._plan_kv_cache()
        self.caches: KVCaches = self._allocate(self.num_blocks)
        self.graphs: DecodeGraphs | None = None
        if self.device.type == "cuda" and not config.enforce_eager and self.loaded.backend.graph_safe:
            self.graphs = DecodeGraphs(self._forward_decode, graph_sizes(config.max_num_seqs))
            with torch.inference_mode():
                self.graphs.capture(config.show_progress)

    # -- start-up ----------------------------------------------------------------------------------------------------

    def _plan_kv_cache(self) -> int:
        """How many KV blocks to make; on a GPU, after measuring what the largest step needs besides."""
        config, tp = self.config, self.loaded.tp
        block_bytes = kv_block_bytes(self.model_config, config.kvcache_block_size, self.dtype.itemsize, tp.world_size)
        memory = None
        if self.device.type == "cuda":
            self._profile()
            # Logits in fp32 and the copies that filtering by top-p makes of them.
            sampling = config.max_num_seqs * self.model_config.vocab_size * 4 * 4
            memory = measure_cuda_memory(self.device, reserve=sampling)
        blocks = num_kv_blocks(config, block_bytes, self.max_model_len, memory)
        logger.info("KV cache: %d blocks, %.2f GiB", blocks, blocks * block_bytes / 2**30)
        return blocks

    def _allocate(self, num_blocks: int) -> KVCaches:
        config, tp = self.config, self.loaded.tp
        return allocate_kv_caches(
            self.model_config, num_blocks, config.kvcache_block_size, self.dtype, self.device, tp.world_size
        )

    @torch.inference_mode()
    def _profile(self) -> None:
        """Run the largest step on a throw-away cache of one block, so that the allocator's peak tells its cost."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        tokens = min(self.config.max_num_batched_tokens, self.max_model_len)
        rows = self.config.max_num_batched_tokens
        lengths = [tokens] * (rows // tokens) + ([rows % tokens] if rows % tokens else [])

        def tensor(values: list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        width = -(-tokens // self.config.kvcache_block_size)
        metadata = AttentionMetadata(
            num_decodes=0,
            query_start=tensor(starts, torch.int32),
            context_lens=tensor(lengths, torch.int32),
            block_table=torch.zeros(len(lengths), width, dtype=torch.int32, device=self.device),
            slot_mapping=torch.full((rows,), -1, device=self.device),
            max_query_len=tokens,
            max_context_len=tokens,
            query_lens_cpu=lengths,
            context_lens_cpu=lengths,
        )
        zeros = torch.zeros(rows, dtype=torch.int64, device=self.device)
        batch = ForwardBatch(zeros, zeros, metadata, logits_rows=zeros[: self.config.max_num_seqs])
        self.model.compute_logits(self.model(batch, self._allocate(1)))
        torch.cuda.synchronize(self.device)

    # -- steps -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """Run one step. Raises whatever the device raises; errors of single requests are in the output."""
        seqs = [item.seq for item in batch.scheduled if item.samples]
        output = StepOutput(token_ids=[])
        hidden = self._forward(batch, output)
        if seqs:
            logits = self.model.compute_logits(hidden)
            self._sample(seqs, logits, output)
        return output

    def _forward(self, batch: ScheduledBatch, output: StepOutput) -> torch.Tensor:
        """Hidden states [R, hidden] of the R tokens to sample from."""
        n = len(batch.scheduled)
        if batch.num_decodes == n:
            if self.graphs is None:
                return self.model(self.inputs.build_decode(batch, n), self.caches)
            size = self.graphs.size_for(n)
            self.inputs.build_decode(batch, size)
            return self.graphs.replay(size)[:n]
        rotary = self.model.model.rotary
        lens = any(rotary.needs_prompt_lens(item.seq.num_prompt_tokens) for item in batch.scheduled)
        inputs = self.inputs.build(batch, prompt_lens=lens)
        if not any(self._scores_prompt(item.seq, item.start) for item in batch.scheduled):
            return self.model(inputs, self.caches)
        hidden = self.model(inputs.with_all_rows(), self.caches)
        self._score_prompts(batch, hidden, output)
        return hidden[inputs.logits_rows]

    def _forward_decode(self, size: int) -> torch.Tensor:
        return self.model(self.inputs.decode_view(size), self.caches)

    def close(self) -> None:
        """Drop everything on the device; the runner cannot be used afterwards."""
        self.graphs = None
        self.caches = []
        del self.model, self.loaded, self.inputs, self.sampler
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
