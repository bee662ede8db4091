"""The engine on a CUDA device: bf16 logits judged against fp64, fp32 against Hugging Face, graphs against eager.

bf16 tokens may differ between two correct programs, so bf16 is judged by its logits: our error against an fp64 model
may be at most twice the error that Hugging Face's own bf16 model makes on the same tokens.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_lives import random_life
from teacher_forcing import teacher_forced
from tiny_models import CASES, reference_logits, save_model

from nanovllm import LLM, SamplingParams
from nanovllm.engine import cuda_graph
from nanovllm.engine.cuda_graph import SHORT_CONTEXT
from nanovllm.kernels.chain_config import chain_rows
from nanovllm.kernels.jit import gpu_of

pytestmark = pytest.mark.gpu
ENGINE: dict[str, Any] = dict(
    kvcache_block_size=32, num_kvcache_blocks=128, max_num_batched_tokens=48, max_num_seqs=8, show_progress=False
)
LENGTHS, PROMPT_LENS = [40, 47, 60, 120, 250], [1, 30, 44, 90, 200]


def sequences(lengths: list[int], vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


def errors(rows: list[torch.Tensor], truth: list[torch.Tensor]) -> tuple[float, float]:
    """Largest and root-mean-square difference over all rows of logits."""
    difference = torch.cat([ours.double().cpu() - theirs.cpu() for ours, theirs in zip(rows, truth, strict=True)])
    return difference.abs().max().item(), difference.pow(2).mean().sqrt().item()


def converted(model: Any, dtype: torch.dtype) -> Any:
    """A copy on the GPU in `dtype`; the rotary frequencies stay fp32, as they do when a checkpoint is loaded."""
    twin = copy.deepcopy(model).to("cuda", dtype)
    rotary = twin.model.rotary_emb
    rotary.inv_freq = model.model.rotary_emb.inv_freq.to("cuda", torch.float32)
    return twin


def judge(model: Any, tokens: list[list[int]], prompt_lens: list[int], ours: list[torch.Tensor], dtype: Any) -> None:
    """`ours` against `model` (any dtype, weights representable in `dtype`) computed in fp64 and in `dtype`."""
    low = converted(model, dtype)
    high = converted(low, torch.float64)
    with torch.device("cuda"):
        truth = [reference_logits(high, seq)[n - 1 :] for seq, n in zip(tokens, prompt_lens, strict=True)]
        theirs = [reference_logits(low, seq)[n - 1 :] for seq, n in zip(tokens, prompt_lens, strict=True)]
    our_max, our_rms = errors(ours, truth)
    their_max, their_rms = errors(theirs, truth)
    print(f"max {our_max:.3e} (PyTorch {their_max:.3e}), rms {our_rms:.3e} (PyTorch {their_rms:.3e})")
    assert our_max <= 2 * their_max and our_rms <= 2 * their_rms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case != "llama_dynamic"])
def test_half_precision_error_budget(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = save_model(case, tmp_path)
    tokens = sequences(LENGTHS, 211)
    with LLM(str(tmp_path), dtype=str(dtype).removeprefix("torch."), max_model_len=256, **ENGINE) as llm:
        ours = teacher_forced(llm, tokens, PROMPT_LENS)
    judge(model, tokens, PROMPT_LENS, ours, dtype)


@pytest.mark.parametrize("case", ["llama_llama3", "mistral", "qwen2", "qwen3", "llama_dynamic"])
def test_fp32_equals_hugging_face(case: str, tmp_path: Path) -> None:
    """Same arithmetic in fp32 up to the order of sums: IEEE, no TF32. The dynamic case stays in its trained context."""
    model = save_model(case, tmp_path).cuda()
    lengths, prompt_lens = ([40, 47, 48], [1, 30, 44]) if case == "llama_dynamic" else (LENGTHS, PROMPT_LENS)
    tokens = sequences(lengths, 211)
    with LLM(str(tmp_path), dtype="float32", max_model_len=192 if case == "llama_dynamic" else 256, **ENGINE) as llm:
        ours = teacher_forced(llm, tokens, prompt_lens)
    with torch.device("cuda"):
        theirs = [reference_logits(model, seq)[n - 1 :].cpu() for seq, n in zip(tokens, prompt_lens, strict=True)]
    assert errors(ours, theirs)[0] < 1e-5


def test_graphs_equal_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernels run on the same shapes at the recorded sizes, so logits are equal bit for bit.

    Of decodes, that is: steps with prefill are padded in graphs, and cuBLAS rounds otherwise for another shape.
    """
    save_model("qwen3", tmp_path)
    monkeypatch.setattr(cuda_graph, "CHUNK_SIZES", {})
    prompts = sequences([5, 60, 33, 90, 17, 8, 44], 211)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=5)
    results = []
    for eager in (True, False):
        with LLM(str(tmp_path), dtype="bfloat16", max_model_len=256, enforce_eager=eager, **ENGINE) as llm:
            assert (llm.engine.runner.graphs is None) == eager
            results.append([o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)])
    for eager_output, graph_output in zip(*results, strict=True):
        assert graph_output.token_ids == eager_output.token_ids
        assert graph_output.logprobs == eager_output.logprobs


@pytest.mark.parametrize("case", ["qwen3_tied", "mistral"])
def test_prefill_graphs_equal_eager_in_fp32(case: str, tmp_path: Path) -> None:
    """Chunks alone, several at once and beside decodes; same greedy tokens, log-probabilities within 1e-5."""
    save_model(case, tmp_path)
    prompts = sequences([5, 60, 133, 90, 17, 8, 44, 200], 211)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=5)
    options = {**ENGINE, "dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 96}
    results = []
    for eager in (True, False):
        with LLM(str(tmp_path), enforce_eager=eager, **options) as llm:
            graphs = llm.engine.runner.chunk_graphs
            assert (graphs is None) == eager
            used = set()
            if graphs is not None:
                replay = graphs.replay
                graphs.replay = lambda key, used=used, replay=replay: used.add(key) or replay(key)
            outputs = llm.generate(prompts[:1], params, use_tqdm=False) + llm.generate(prompts, params, use_tqdm=False)
            results.append([output.outputs[0] for output in outputs])
    assert {seqs for _, seqs in used} == {1, ENGINE["max_num_seqs"]}
    for eager_output, ours in zip(*results, strict=True):
        assert ours.token_ids == eager_output.token_ids
        for left, right in zip(ours.logprobs, eager_output.logprobs, strict=True):
            assert all(left[t].logprob == pytest.approx(right[t].logprob, abs=1e-5) for t in left.keys() & right)


@pytest.mark.parametrize("case", ["llama_bias", "qwen2", "qwen3_tied", "mistral"])
def test_fused_equals_unfused_in_fp32(case: str, tmp_path: Path) -> None:
    """Same greedy tokens, and log-probabilities within 1e-5, at every number of rows that is fused."""
    save_model(case, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=5)
    results = {}
    for fusion in ("off", "on"):
        with LLM(str(tmp_path), dtype="float32", max_model_len=256, fusion=fusion, **ENGINE) as llm:
            assert (llm.engine.runner.loaded.fused_rows > 0) == (fusion == "on")
            results[fusion] = [
                output.outputs[0]
                for rows in (1, 2, 3, 4)
                for output in llm.generate(sequences([5, 60, 33, 90][:rows], 211), params, use_tqdm=False)
            ]
    for plain, fused in zip(results["off"], results["on"], strict=True):
        assert fused.token_ids == plain.token_ids
        for ours, theirs in zip(fused.logprobs, plain.logprobs, strict=True):
            assert all(ours[t].logprob == pytest.approx(theirs[t].logprob, abs=1e-5) for t in ours.keys() & theirs)


def test_contexts_that_outgrow_the_short_graphs(tmp_path: Path) -> None:
    """A sequence that crosses the short graphs' limit goes on in the other graph with the same tokens as unfused."""
    save_model("qwen3", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    prompts = sequences([SHORT_CONTEXT - 9, 30], 211)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    results = []
    for fusion in ("off", "on"):
        with LLM(str(tmp_path), dtype="float32", max_model_len=1024, fusion=fusion, **ENGINE) as llm:
            results.append([output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)])
            if fusion == "on":
                assert {limit for _, limit in llm.engine.runner.graphs._graphs} == {SHORT_CONTEXT, 1024}
    assert results[0] == results[1]


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 32, 33, 64])
def test_fused_half_precision_error_budget(rows: int, tmp_path: Path) -> None:
    """Every kernel variant of the chain (one row, up to 8, up to 16, and pairs up to 64) judged against fp64."""
    model = save_model("qwen3", tmp_path)
    options = {**ENGINE, "max_num_seqs": 64, "num_kvcache_blocks": 512, "max_num_batched_tokens": 1024}
    tokens = sequences([40 + 3 * i for i in range(rows)], 211)
    with LLM(str(tmp_path), dtype="bfloat16", max_model_len=256, fusion="on", **options) as llm:
        assert llm.engine.runner.loaded.fused_rows == chain_rows(2, gpu_of(torch.device("cuda")))
        ours = teacher_forced(llm, tokens, [10] * rows)
    judge(model, tokens, [10] * rows, ours, torch.bfloat16)


@pytest.mark.parametrize("rows", [17, 32, 33, 64])
def test_pairs_of_a_graph_equal_eager(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and the tiles that started beside them: the same tokens and log-probabilities, bit for bit."""
    save_model("qwen3", tmp_path)
    monkeypatch.setattr(cuda_graph, "CHUNK_SIZES", {})
    options = {**ENGINE, "max_num_seqs": rows, "num_kvcache_blocks": 512, "max_num_batched_tokens": 2048}
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=5)
    results = []
    for eager in (True, False):
        with LLM(str(tmp_path), dtype="bfloat16", max_model_len=256, enforce_eager=eager, **options) as llm:
            outputs = llm.generate(sequences([12] * rows, 211), params, use_tqdm=False)
            results.append([(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs])
    assert results[0] == results[1]


def test_async_scheduling_changes_no_token(tmp_path: Path) -> None:
    """10,000 decode steps under random arrivals, stops and aborts: the same text with overlap and without."""
    save_model("qwen3", tmp_path)
    options = {**ENGINE, "max_num_seqs": 4, "num_kvcache_blocks": 24}
    results = []
    for overlap in (False, True):
        with LLM(str(tmp_path), dtype="float32", max_model_len=256, async_scheduling=overlap, **options) as llm:
            results.append(random_life(llm, seed=11, num_steps=10_000, vocab_size=211)[0])
    both = set(results[0]) & set(results[1])
    assert len(both) > 1000 and all(results[0][i] == results[1][i] for i in both)


def test_preemption_and_prefix_cache_on_the_gpu(tmp_path: Path) -> None:
    """fp32 greedy tokens are the same alone, batched, with a warm prefix cache and with a cache that is too small."""
    save_model("llama", tmp_path)
    prompts = sequences([70, 100, 33, 90, 64, 96], 211)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    base = dict(dtype="float32", max_model_len=256)
    with LLM(str(tmp_path), **{**ENGINE, **base}) as llm:
        alone = [llm.generate(prompt, params, use_tqdm=False)[0]["token_ids"] for prompt in prompts]
        batched = llm.generate(prompts, params, use_tqdm=False)
    with LLM(str(tmp_path), **{**ENGINE, **base, "num_kvcache_blocks": 10}) as llm:
        crowded = llm.generate(prompts, params, use_tqdm=False)
    assert [o["token_ids"] for o in batched] == alone == [o["token_ids"] for o in crowded]
    assert sum(o.metrics.num_preemptions for o in crowded if o.metrics) > 0
    assert any(o.metrics.num_cached_tokens > 0 for o in batched if o.metrics)


def test_memory_budget_counts_this_process_only(tmp_path: Path) -> None:
    """Two engines in one process, each with a cache of its own; closing gives the memory back."""
    save_model("llama", tmp_path)
    options: dict[str, Any] = dict(max_model_len=256, max_num_seqs=8, show_progress=False)
    LLM(str(tmp_path), num_kvcache_blocks=64, **options).close()  # leaves cuBLAS's workspaces, 32 MiB a stream
    before = torch.cuda.memory_allocated()
    with (
        LLM(str(tmp_path), kv_cache_memory_bytes=64 << 20, **options) as first,
        LLM(str(tmp_path), gpu_memory_utilization=0.05, **options) as second,
    ):
        assert first.engine.runner.num_blocks <= (64 << 20) // (2 * 3 * 2 * 32 * 16 * 2)
        assert second.engine.runner.num_blocks > 0
        assert not torch.distributed.is_initialized()
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        outputs = [engine.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"] for engine in (first, second)]
    assert outputs[0] == outputs[1]
    assert torch.cuda.memory_allocated() - before < 1 << 20


def test_graphs_share_the_memory_of_their_logits(tmp_path: Path) -> None:
    """What graphs take is that of the largest, not the sum over their sizes, which is 17 times as much."""
    save_model("llama", tmp_path)
    rows, vocab = 256, 211
    options: dict[str, Any] = dict(max_model_len=256, max_num_seqs=rows, num_kvcache_blocks=64, dtype="float32")
    taken = []
    for eager in (False, True, False):  # the first one leaves cuBLAS's workspaces behind
        with LLM(str(tmp_path), enforce_eager=eager, show_progress=False, **options) as llm:
            taken.append(torch.cuda.memory_allocated())
            if not eager:
                assert llm.engine.runner.graphs is not None
    assert taken[2] - taken[1] < 4 * rows * vocab * 4


def test_smollm2_bf16_error_budget() -> None:
    """The real SmolLM2 on real text."""
    from transformers import AutoModelForCausalLM

    from nanovllm.loader.resolve import resolve_model

    try:
        gguf = resolve_model("smollm2").path
    except FileNotFoundError as error:
        pytest.skip(str(error))
    cases = json.loads(Path(__file__).with_name("data").joinpath("smollm2_greedy.json").read_text())["cases"]
    tokens = [case["prompt_token_ids"] + case["token_ids"][:-1] for case in cases]
    prompt_lens = [len(case["prompt_token_ids"]) for case in cases]
    with LLM(
        str(gguf), dtype="bfloat16", max_model_len=1024, kv_cache_memory_bytes=1 << 30, show_progress=False
    ) as llm:
        ours = teacher_forced(llm, tokens, prompt_lens)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    judge(model, tokens, prompt_lens, ours, torch.bfloat16)
