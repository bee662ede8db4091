"""Carries out steps on the device: inputs, forward pass, sampling, results.

Owns everything that lives on the device: the model, the KV cache, the input buffers, the graphs. It is told what to
run by a `ScheduledBatch` and knows nothing of queues, blocks or stop conditions.

A step has two halves. `launch` queues its work and returns at once; `collect` waits for its tokens. Between the two the
next step may be launched: its inputs name tokens that only the device knows so far.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.cuda_graph import ChunkGraphs, DecodeGraphs, chunk_sizes, graph_sizes
from nanovllm.engine.input_builder import InputBuilder
from nanovllm.engine.kv_cache import allocate_kv_caches, kv_block_bytes, measure_cuda_memory, num_kv_blocks
from nanovllm.engine.loading import LoadedModel, load_model
from nanovllm.engine.sampling_inputs import SamplingInputs
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.staging import IN_FLIGHT
from nanovllm.kernels.compile_ahead import compile_together
from nanovllm.kernels.sample import sample
from nanovllm.kernels.sample_cut import sample_rows
from nanovllm.layers.attention.backend import AttentionMetadata
from nanovllm.layers.forward_batch import ForwardBatch, KVCaches
from nanovllm.layers.logits import score_prompt
from nanovllm.layers.sampler import Sampler, SamplerOutput
from nanovllm.layers.sampling_batch import SamplingRow
from nanovllm.outputs import Logprob

logger = logging.getLogger(__name__)

_PROMPT_LOGPROB_ROWS = 256  # rows of logits held at a time while scoring a prompt


@dataclass(slots=True)
class StepOutput:
    """Results of one step. Sequences without an entry had nothing to report."""

    token_ids: list[int]  # one for each scheduled sequence that samples, in batch order
    logprobs: dict[int, dict[int, Logprob]] = field(default_factory=dict)  # by seq_id, of its new token
    # (sequence, position of the first token scored, one entry a token)
    prompt_logprobs: list[tuple[Sequence, int, list[dict[int, Logprob]]]] = field(default_factory=list)
    errors: list[tuple[Sequence, str]] = field(default_factory=list)


@dataclass(slots=True)
class LaunchedStep:
    """A step whose work is queued on the device."""

    seqs: list[Sequence]  # those that sample, in batch order
    result: SamplerOutput | None  # None: nobody samples
    token_ids: torch.Tensor  # on the host; filled when `done` has happened
    done: torch.cuda.Event | None
    output: StepOutput  # what is known already


class ModelRunner:
    """The device side of one engine."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.loaded: LoadedModel = load_model(config)
        self.model, self.model_config = self.loaded.model, self.loaded.config
        self.device, self.dtype = self.loaded.device, self.loaded.dtype
        self.max_model_len = self.loaded.max_model_len
        self.token_budget = config.token_budget(self.device.type)
        self.sampler = Sampler(self.model_config.vocab_size, self.device)
        self.inputs = InputBuilder(
            config.max_num_seqs,
            self.token_budget,
            self.max_model_len,
            config.kvcache_block_size,
            self.device,
        )
        self.sampling = SamplingInputs(config.max_num_seqs, self.inputs.positions, self.device)
        self._host_tokens, self._echo = self._pinned_tokens(), self._pinned_tokens()  # copied there; sent by graphs
        self._num_launched = 0
        self.graphs: DecodeGraphs | None = None
        self.chunk_graphs: ChunkGraphs | None = None
        if self.device.type == "cuda" and not config.enforce_eager and self.loaded.backend.graph_safe:
            sizes = graph_sizes(config.max_num_seqs)
            self.graphs = DecodeGraphs(self.decode_and_sample, sizes, self.max_model_len, self.loaded.fused_rows)
            chunks = chunk_sizes(self.token_budget, config.max_num_seqs, self.max_model_len)
            self.chunk_graphs = ChunkGraphs(self.forward_chunks, chunks)
        self.caches: KVCaches = []
        self.num_blocks = self._plan_kv_cache()
        self.caches = self._allocate(self.num_blocks)
        self._record_graphs()

    # -- start-up ----------------------------------------------------------------------------------------------------

    def _plan_kv_cache(self) -> int:
        """How many KV blocks to make; on a GPU, after measuring what the largest step needs besides."""
        config, tp = self.config, self.loaded.tp
        block_bytes = kv_block_bytes(self.model_config, config.kvcache_block_size, self.dtype.itemsize, tp.world_size)
        memory = None
        if self.device.type == "cuda":
            try:
                compile_together(self._profile, self._rehearse, config.show_progress)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{self.device} has no memory left for a step of max_num_batched_tokens={self.token_budget} with "
                    f"max_num_seqs={config.max_num_seqs}: lower the larger of them, or free device memory"
                ) from error
            # Logits in fp32, and the copies that penalties and processors work on.
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
    def _rehearse(self) -> None:
        """All that a start launches, over a throw-away cache, and what a first request samples with.

        For `compile_together`: none of our kernels runs.
        """
        self.caches = self._allocate(1)
        if self.graphs is not None and self.chunk_graphs is not None:
            self.graphs.run_all()
            self.chunk_graphs.run_all()
        self._profile()
        row = self.sampling.view(1)
        logits = torch.zeros(1, self.model_config.vocab_size, dtype=self.dtype, device=self.device)
        sample(logits, row.temperature, row.seeds, row.positions)
        sample_rows(logits, row)
        self.caches = []

    @torch.inference_mode()
    def _record_graphs(self) -> None:
        if self.graphs is None or self.chunk_graphs is None:
            return
        pool = self.graphs.capture("decodes", self.config.show_progress)
        self.inputs.agree()  # what is run before it is recorded takes turns too
        self.chunk_graphs.capture("prefill", self.config.show_progress, pool)

    @torch.inference_mode()
    def _profile(self) -> None:
        """Run the largest step on a throw-away cache of one block, so that the allocator's peak tells its cost."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        rows = self.token_budget
        tokens = min(rows, self.max_model_len)
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
    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Queue one step. Raises whatever the device raises; errors of single requests are in the output."""
        output = StepOutput(token_ids=[])
        seqs = [item.seq for item in batch.scheduled if item.samples]
        echo: torch.Tensor | None = None
        if batch.num_decodes == len(batch.scheduled):
            result, echo = self._launch_decodes(batch, seqs)
        else:
            result = self._launch_mixed(batch, seqs, output)
        tokens = self._host_tokens[self._num_launched % IN_FLIGHT, : len(seqs)] if echo is None else echo
        self._num_launched += 1
        if result is not None:
            if echo is None:
                tokens.copy_(result.token_ids, non_blocking=True)
            self.inputs.remember_sampled([seq.seq_id for seq in seqs])
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        if done is not None:
            done.record()
        return LaunchedStep(seqs, result, tokens, done, output)

    def collect(self, step: LaunchedStep) -> StepOutput:
        """Wait for a launched step; at most one more may have been launched since."""
        output, result, seqs = step.output, step.result, step.seqs
        if step.done is not None:
            # The one place where the engine waits for the device. Also for a step that samples nothing: the pinned
            # buffers that its inputs come from are written again by the step after the next.
            step.done.synchronize()
        if result is None:
            return output
        output.token_ids = step.token_ids.tolist()
        output.errors = [(seqs[row], error) for row, error in result.errors.items()]
        if result.logprobs is not None:
            output.logprobs = {
                seqs[row].seq_id: {token: Logprob(value, rank) for token, value, rank in entries}
                for row, entries in result.logprobs.to_host().items()
            }
        return output

    def _launch_decodes(
        self, batch: ScheduledBatch, seqs: list[Sequence]
    ) -> tuple[SamplerOutput | None, torch.Tensor | None]:
        """A step of decodes only: a replayed graph if there is one, the same operations one by one otherwise.

        Also returns where on the host the tokens will be, if they are on their way there: a graph sends them itself.
        """
        n = len(seqs)
        size = n if self.graphs is None else self.graphs.size_for(n)
        inputs = self.inputs.build_decode(batch, size)
        rows = [seq.sampling for seq in seqs]
        if self.graphs is None:
            self.inputs.send(n)
            return self._sample(self._forward_decode(size, inputs), rows, inputs.positions), None
        in_graph = self.sampling.fill(rows)
        slot = self.inputs.publish(n)
        logits = self.graphs.replay(size, inputs.attention.max_context_len)[:n]
        self.inputs.launched()
        if not in_graph:
            return self._sample(logits, rows, inputs.positions[:n]), None
        return self.sampler.score(logits, rows, self.inputs.sampled(n)), self._echo[slot, :n]

    def _launch_mixed(self, batch: ScheduledBatch, seqs: list[Sequence], output: StepOutput) -> SamplerOutput | None:
        """A step with prefill chunks: a replayed graph if one is large enough, operation by operation otherwise."""
        rotary = self.model.model.rotary
        lens = any(rotary.needs_prompt_lens(item.seq.num_prompt_tokens) for item in batch.scheduled)
        scores = any(item.scores_prompt for item in batch.scheduled)
        size = None
        if self.chunk_graphs is not None and not lens and not scores:
            decodes = [item.context_len for item in batch.scheduled[: batch.num_decodes]]
            size = self.chunk_graphs.key_for(batch.num_tokens, len(batch.scheduled), decodes)
        inputs = self.inputs.build(batch, prompt_lens=lens, size=size)
        n = len(seqs)
        if self.chunk_graphs is not None and size is not None:
            logits = self.chunk_graphs.replay(size)
            if not n:
                return None
        else:
            self.inputs.feed(inputs.input_ids)
            hidden = self.model(inputs.with_all_rows() if scores else inputs, self.caches)
            if scores:
                self._score_prompts(batch, hidden, output)
                hidden = hidden[inputs.logits_rows]
            if not n:
                return None
            logits = self.model.compute_logits(hidden)
        positions = inputs.positions[inputs.logits_rows][:n]
        return self._sample(logits[:n], [seq.sampling for seq in seqs], positions)

    def forward_chunks(self, tokens: int, seqs: int) -> torch.Tensor:
        """What a graph of a step with prefill records: logits [seqs, vocab], of the tokens that `logits_rows` names."""
        inputs = self.inputs.chunk_view(tokens, seqs)
        self.inputs.feed(inputs.input_ids)
        return self.model.compute_logits(self.model(inputs, self.caches))

    def _sample(self, logits: torch.Tensor, rows: list[SamplingRow], positions: torch.Tensor) -> SamplerOutput:
        """Sample outside a graph, and leave the tokens where the next step looks for them."""
        result = self.sampler(logits, rows, positions)
        self.inputs.sampled(len(rows)).copy_(result.token_ids)
        return result

    def decode_and_sample(self, size: int, max_context: int) -> torch.Tensor:
        """What a graph records: from the token ids of the step before to those of this one. Returns the logits."""
        self.inputs.fetch(size, max_context)
        logits = self._forward_decode(size, self.inputs.decode_view(size, [max_context] * size))
        sample_rows(logits, self.sampling.view(size), sink=self.inputs.sink(size, self._echo))
        return logits

    def _forward_decode(self, size: int, inputs: ForwardBatch) -> torch.Tensor:
        """Logits [size, vocab] of one token a sequence."""
        if size <= self.loaded.fused_rows:
            return self.model.decode(inputs, self.caches)
        self.inputs.feed(inputs.input_ids)
        return self.model.compute_logits(self.model(inputs, self.caches))

    def _pinned_tokens(self) -> torch.Tensor:
        """Where tokens go on their way to the host: a row for the step that is collected, one for that behind it."""
        shape = (IN_FLIGHT, self.config.max_num_seqs)
        return torch.zeros(shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")

    def _score_prompts(self, batch: ScheduledBatch, hidden: torch.Tensor, output: StepOutput) -> None:
        """Log-probabilities of prompt tokens; hidden [T, hidden] holds all tokens of the step.

        Logits of a whole chunk would be gigabytes, so a few hundred rows are made at a time.
        """
        first = 0
        for item in batch.scheduled:
            # The hidden state of token j predicts token j + 1, which must belong to the prompt.
            count = min(item.num_tokens, item.seq.num_prompt_tokens - 1 - item.start)
            if item.scores_prompt:
                entries: list[dict[int, Logprob]] = []
                for a in range(0, count, _PROMPT_LOGPROB_ROWS):
                    b = min(a + _PROMPT_LOGPROB_ROWS, count)
                    logits = self.model.compute_logits(hidden[first + a : first + b])
                    ids = item.seq.prompt_token_ids[item.start + a + 1 : item.start + b + 1]
                    next_ids = torch.tensor(ids, device=self.device)
                    scores = score_prompt(logits, next_ids, item.seq.num_prompt_logprobs or 0).to_host()
                    entries += [{t: Logprob(value, rank) for t, value, rank in row} for row in scores.values()]
                output.prompt_logprobs.append((item.seq, item.start + 1, entries))
            first += item.num_tokens

    # -- facts about the model that requests need --------------------------------------------------------------------

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """What `generation_config.json` says about sampling."""
        return dataclasses.asdict(self.loaded.generation)

    def cache_salt(self, prompt_len: int) -> bytes:
        """Prompts under different salts never share KV: dynamic NTK rotates keys by the length of their prompt."""
        return str(prompt_len).encode() if self.model.model.rotary.needs_prompt_lens(prompt_len) else b""

    def drain(self) -> None:
        """Wait for what is queued on the device, without its results: it may write buffers of the host.

        Needed after a launch that did not return, and after graphs that were run by others than `launch`: of those the
        host cannot say whether they advanced the device's turn, so the two agree about it anew.
        A device that failed says so where results are asked for; here it only has nothing left to wait for.
        """
        with contextlib.suppress(RuntimeError):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.inputs.agree()

    def close(self) -> None:
        """Drop everything on the device; the runner cannot be used afterwards."""
        self.drain()
        self.graphs = self.chunk_graphs = None
        self.caches = []
        del self._host_tokens, self._echo, self.model, self.loaded, self.inputs, self.sampler, self.sampling
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
