"""Steps with prefill in graphs: which graph a step takes, and that padded steps say what exact ones say.

A stand-in runs what a graph would have recorded, so that all but the recording is tested without a GPU;
`tests/test_gpu_engine.py` runs the graphs themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_decode_chain import OPTIONS
from tiny_models import save_model

from nanovllm import LLM, SamplingParams
from nanovllm.engine.cuda_graph import CHUNK_SIZES, MAX_DECODE_CONTEXT, MAX_DECODE_KEYS, ChunkGraphs, Key, chunk_sizes
from nanovllm.engine.input_builder import InputBuilder


class Unrecorded(ChunkGraphs):
    """Runs each pass when it is asked for, and keeps a list of them."""

    used: list[Key]

    def replay(self, key: Key) -> torch.Tensor:
        self.used.append(key)
        return self._forward(*key)


def forward(tokens: int, seqs: int) -> torch.Tensor:
    raise AssertionError("choosing a graph runs nothing")


def test_a_step_takes_the_smallest_graph_with_room() -> None:
    graphs = ChunkGraphs(forward, chunk_sizes(8192, 256, 40960))
    assert graphs.key_for(1, 1, []) == (32, 1)
    assert graphs.key_for(32, 1, []) == (32, 1)
    assert graphs.key_for(33, 1, []) == (64, 1)
    assert graphs.key_for(33, 2, [5]) == (64, 16)
    assert graphs.key_for(300, 16, [5]) == (512, 16)
    assert graphs.key_for(300, 17, [5] * 16) == (512, 64)
    assert graphs.key_for(2048, 16, [MAX_DECODE_CONTEXT]) == (2048, 16)
    for step in ((4097, 1), (2049, 2), (80, 65)):
        assert graphs.key_for(*step, []) is None


def test_long_contexts_beside_a_chunk_take_no_graph() -> None:
    graphs = ChunkGraphs(forward, chunk_sizes(8192, 256, 40960))
    assert graphs.key_for(40, 2, [MAX_DECODE_CONTEXT + 1]) is None
    many = [MAX_DECODE_KEYS // 32] * 32
    assert graphs.key_for(100, 40, many) == (128, 64)
    assert graphs.key_for(100, 40, [*many, 1]) is None


def test_sizes_are_those_that_a_step_can_have() -> None:
    assert chunk_sizes(1000, 4, 256) == [
        (32, 1), (64, 1), (64, 4), (128, 1), (128, 4), (256, 1), (256, 4), (512, 4), (1000, 4)
    ]  # fmt: skip
    assert chunk_sizes(16, 1, 4096) == [(16, 1)]
    largest = chunk_sizes(8192, 256, 40960)
    assert len(largest) == sum(map(len, CHUNK_SIZES.values())) and largest[-1] == (4096, 1)
    for tokens in range(1, 1001):  # whatever the budget, a step within it finds room
        assert ChunkGraphs(forward, chunk_sizes(1000, 4, 256)).key_for(tokens, min(tokens, 4), []) is not None


def test_arrays_of_a_size_are_made_once() -> None:
    """Also of the largest size in the smallest engine: one block a sequence, and no room to spare."""
    inputs = InputBuilder(1, 32, 8, 8, torch.device("cpu"))
    first, second = inputs.chunk_view(32, 1), inputs.chunk_view(32, 1)
    assert first.input_ids is second.input_ids and first.attention.block_table is second.attention.block_table


@pytest.mark.interpret
@pytest.mark.parametrize("kind", ["qwen3_tied", "mistral"])
def test_padded_steps_say_what_exact_ones_say(tmp_path: Path, kind: str) -> None:
    """Chunked prompts beside decodes, chunks that sample nothing, prefix hits, padding tokens and padding sequences."""
    save_model(kind, tmp_path)
    options: dict[str, Any] = {**OPTIONS, "max_num_batched_tokens": 16, "fusion": "off"}
    shared = list(range(3, 20))
    prompts = [[5, 6, 7], shared, shared + [30, 31], list(range(40, 70))]
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=3)
    results, used = [], []
    for padded in (False, True):
        with LLM(str(tmp_path), **options) as llm:
            runner = llm.engine.runner
            if padded:
                runner.chunk_graphs = Unrecorded(runner.forward_chunks, [(8, 1), (16, 1), (8, 4), (16, 4)])
                runner.chunk_graphs.used = used
            alone = llm.generate(prompts[3], greedy, use_tqdm=False)
            results.append(alone + llm.generate(prompts, greedy, use_tqdm=False))
    assert {(16, 1), (16, 4)} <= set(used)
    for exact, ours in zip(*results, strict=True):
        assert ours.error is None and ours["token_ids"] == exact["token_ids"]
        for left, right in zip(ours.outputs[0].logprobs, exact.outputs[0].logprobs, strict=True):
            assert all(left[t].logprob == pytest.approx(right[t].logprob, abs=1e-5) for t in left.keys() & right)
