"""Graphs without a GPU: decodes from the host's slots, the turn that both sides keep, and whole lives of an engine.

A stand-in runs what a graph would have recorded, when it is asked for; `tests/test_gpu_engine.py` runs the graphs.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_lives import random_life
from test_chunk_graphs import Unrecorded as UnrecordedChunks
from test_decode_chain import OPTIONS
from tiny_models import save_model

from nanovllm import LLM, SamplingParams
from nanovllm.engine import cuda_graph
from nanovllm.engine.cuda_graph import DecodeGraphs
from nanovllm.engine.model_runner import ModelRunner

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PARAMS = [GREEDY, GREEDY.clone(max_tokens=7), SamplingParams(temperature=0.9, seed=3, max_tokens=15, ignore_eos=True)]
PROMPTS = [[5, 6, 7], [9] * 11, [3, 1, 4, 1, 5, 9, 2, 6]]


class Unrecorded(DecodeGraphs):
    """Runs each step when it is asked for; `fault`, if there is one, is raised once, by a replay that has run."""

    fault: BaseException | None = None

    def __init__(self, runner: ModelRunner) -> None:
        sizes = sorted({1, runner.config.max_num_seqs})  # all others are padded
        super().__init__(runner.decode_and_sample, sizes, runner.max_model_len, 0)

    def replay(self, size: int, max_context: int) -> torch.Tensor:
        with torch.inference_mode():
            logits = self._forward(size, self.context_for(size, max_context))
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        return logits


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("model")
    save_model("qwen3_tied", path)
    options: dict[str, Any] = {**OPTIONS, "attention_backend": "native", "fusion": "off"}
    with LLM(str(path), **options, async_scheduling=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def answers(llm: LLM) -> list[list[int]]:
    """What the same engine says without graphs."""
    assert llm.engine.runner.graphs is None
    return [output["token_ids"] for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture
def graphs(llm: LLM, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> Unrecorded:
    made = Unrecorded(llm.engine.runner)
    monkeypatch.setattr(llm.engine.runner, "graphs", made)
    return made


def test_steps_in_slots_say_what_copied_ones_say(llm: LLM, graphs: Unrecorded, answers: list[list[int]]) -> None:
    """Batches that shrink, between steps with prefill and rows that are sampled outside the graph."""
    for company in (GREEDY.clone(presence_penalty=0.5), GREEDY.clone(max_tokens=3, logprobs=2)):
        outputs = llm.generate([*PROMPTS, [8, 8]], [*PARAMS, company], use_tqdm=False)
        assert [output["token_ids"] for output in outputs[:3]] == answers


@pytest.mark.parametrize("error", [RuntimeError("device on fire"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("steps", [2, 3])
def test_a_launch_that_did_not_return_leaves_the_turn_right(
    llm: LLM, graphs: Unrecorded, answers: list[list[int]], error: BaseException, steps: int
) -> None:
    """The graph ran, but the host does not know it: what runs next must not be given the inputs of the step before."""
    engine = llm.engine
    requests = [engine.make_request(p, params) for p, params in zip(PROMPTS, PARAMS, strict=True)]
    engine.submit(requests)
    for _ in range(steps):
        engine.step()
    graphs.fault = error
    while engine.has_unfinished:
        with contextlib.suppress(KeyboardInterrupt):
            engine.step()
    assert graphs.fault is None
    for request, answer in zip(requests, answers, strict=True):
        wanted = answer if isinstance(error, KeyboardInterrupt) else answer[: steps - 1]  # one was in flight
        assert request.output()["token_ids"] == wanted
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == answers


@pytest.mark.parametrize(("kind", "seqs", "budget"), [("qwen3_tied", 8, 64), ("mistral", 8, 64), ("qwen2", 1, 20)])
def test_a_life_in_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seqs: int, budget: int) -> None:
    """Steps of both kinds in turn, stops, aborts, preemptions; padding has no say in any of it."""
    save_model(kind, tmp_path)
    monkeypatch.setattr(cuda_graph, "CHUNK_SIZES", {1: (8, 16, 64), 4: (16,), 8: (64,)})
    options: dict[str, Any] = {
        **OPTIONS, "attention_backend": "native", "fusion": "off", "max_model_len": 128, "max_num_seqs": seqs,
        "max_num_batched_tokens": budget,
    }  # fmt: skip
    lives, used = [], list[tuple[int, int]]()
    for in_graphs in (False, True):
        with LLM(str(tmp_path), **options, async_scheduling=True) as llm:
            runner = llm.engine.runner
            if in_graphs:
                runner.graphs = Unrecorded(runner)
                sizes = cuda_graph.chunk_sizes(runner.token_budget, seqs, runner.max_model_len)
                runner.chunk_graphs = chunks = UnrecordedChunks(runner.forward_chunks, sizes)
                chunks.used = used
            lives.append(random_life(llm, seed=3, num_steps=150, vocab_size=211)[0])
    assert lives[0] == lives[1] and len(lives[0]) > 10
    assert {1, seqs} <= {size[1] for size in used}
